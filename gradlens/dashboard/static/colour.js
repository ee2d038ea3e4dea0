// Colours that colour-blind people can tell apart, and that keep their order in grey.

/** Sequential: viridis, dark to bright. */
const VIRIDIS = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37]];
/** Diverging: blue, through a neutral middle, to orange. The middle is that of the page. */
const BLUE = [[8, 48, 107], [33, 102, 172], [107, 174, 214]];
const ORANGE = [[253, 174, 97], [217, 95, 14], [127, 39, 4]];
const NEUTRAL = { light: [244, 244, 242], dark: [58, 60, 66] };

/** Lines: of Okabe and Ito, lighter ones on a dark page. */
export const LINES = {
  light: { blue: "#0072b2", orange: "#d55e00", green: "#00795a", pink: "#b3478a", grey: "#6b6b6b", sky: "#2f89c5" },
  dark: { blue: "#56b4e9", orange: "#f0935a", green: "#35c79a", pink: "#e29ac7", grey: "#a8a8a8", sky: "#8ecbf0" },
};

export const ILL = { light: [214, 0, 120], dark: [255, 70, 170] };

/** @returns {"light" | "dark"} */
export function theme() {
  return document.documentElement.dataset.theme === "dark" ? "dark" : "light";
}

/** @param {number[][]} stops @param {number} at from 0 to 1 */
function between(stops, at) {
  const place = Math.min(Math.max(at, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  const share = place - low;
  return [0, 1, 2].map((i) => Math.round(stops[low][i] * (1 - share) + stops[low + 1][i] * share));
}

/**
 * 256 colours from low to high, as RGB triples.
 * @param {"sequential" | "diverging"} kind
 * @returns {Uint8ClampedArray}
 */
export function ramp(kind) {
  const stops = kind === "sequential" ? VIRIDIS : [...BLUE, NEUTRAL[theme()], ...ORANGE];
  const colours = new Uint8ClampedArray(256 * 3);
  for (let i = 0; i < 256; i++) colours.set(between(stops, i / 255), 3 * i);
  return colours;
}

/** @param {Uint8ClampedArray} colours @param {number} at from 0 to 1 */
export function pick(colours, at) {
  const i = 3 * Math.min(255, Math.max(0, Math.round(255 * at)));
  return `rgb(${colours[i]}, ${colours[i + 1]}, ${colours[i + 2]})`;
}

/** @param {Uint8ClampedArray} colours */
export function gradient(colours) {
  const stops = [];
  for (let i = 0; i <= 16; i++) stops.push(pick(colours, i / 16));
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

/** @param {number[]} rgb */
export function rgb(rgb) {
  return `rgb(${rgb.join(", ")})`;
}
