// Files for the person: tables as CSV, pictures as PNG and SVG.

/**
 * @param {string} name
 * @param {Blob} content
 */
export function save(name, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name.replace(/[^\w.-]+/g, "_");
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/**
 * @param {string} name
 * @param {string[]} columns
 * @param {(string | number | null)[][]} rows
 */
export function saveCsv(name, columns, rows) {
  save(name, new Blob([csv([columns, ...rows])], { type: "text/csv" }));
}

/**
 * Numbers with all their digits. A text that a spreadsheet would take for a formula gets an apostrophe before it.
 * @param {(string | number | null)[][]} rows
 */
export function csv(rows) {
  /** @param {string | number | null} cell */
  const told = (cell) => {
    if (cell === null || (typeof cell === "number" && Number.isNaN(cell))) return "";
    if (typeof cell === "number") return String(cell);
    const text = /^[=+\-@\t\r]/.test(cell) ? `'${cell}` : cell;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(told).join(",")).join("\r\n") + "\r\n";
}

/** @param {string} name @param {HTMLCanvasElement} canvas */
export function savePng(name, canvas) {
  canvas.toBlob((blob) => blob && save(name, blob), "image/png");
}

const NAMESPACE = "http://www.w3.org/2000/svg";

/**
 * @param {string} tag
 * @param {Record<string, string | number>} attributes
 * @param {string} [text]
 */
export function svg(tag, attributes, text) {
  const element = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  if (text !== undefined) element.textContent = text;
  return element;
}

/** @param {string} name @param {SVGElement} picture */
export function saveSvg(name, picture) {
  save(name, new Blob([new XMLSerializer().serializeToString(picture)], { type: "image/svg+xml" }));
}
