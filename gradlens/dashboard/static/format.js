// Numbers as people read them.

/**
 * Three digits; small and large numbers with a power of ten.
 * @param {number | null | undefined} value
 */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
  return text.replace("-", "−").replace("e+", "e").replace("e-", "e−").replace("e−", "e−");
}

/** All digits that a double has. @param {number | null | undefined} value */
export function exact(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "none";
  return String(value);
}

/** With thousands apart. @param {number | null | undefined} value */
export function whole(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return Math.round(value).toLocaleString("en-US");
}

/** A share in percent. @param {number | null | undefined} value */
export function percent(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const hundred = 100 * value;
  return `${hundred === 0 || hundred >= 10 ? Math.round(hundred) : hundred.toPrecision(2)} %`;
}

/** @param {number[]} shape */
export function shape(shape) {
  return shape.length ? shape.join(" × ") : "scalar";
}

/** @param {number | null} seconds since the epoch */
export function moment(seconds) {
  if (!seconds) return "";
  return new Date(1000 * seconds).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}
