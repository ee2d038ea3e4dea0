// The layer by step map: rows are parameters in model order, folded into modules; columns are steps. Each cell shows the value
// of its steps that is farthest from the middle of its row, so that no spike and no hole vanishes.

import { ILL, gradient, ramp, rgb, theme } from "./colour.js";
import { menu, triangle } from "./chart.js";
import { css, fill, framed, h, say, sized } from "./dom.js";
import { number, percent, whole } from "./format.js";
import { savePng } from "./save.js";
import { rows as rowsOf, tree } from "./tree.js";

const [SEEN, NONFINITE, MISSING] = [1, 2, 4];
const [NOTHING, ZERO, PER_DECADE, PER_ONE] = [-32768, -32767, 500, 30000];
const ROW = 16;
const ROWS = 44;

/** @typedef {import("./api.js").Answer} Answer */
/** @typedef {import("./tree.js").Row} Row */
/** @typedef {{parameter: string | null, parameters: string[], step: number, severity: string, rule: string, seen: string}} Finding */

export class LayerMap {
  /**
   * @param {{onPick: (parameter: string, from: number, to: number) => void, onOpen: (parameter: string) => void,
   *   onFold: (folds: Map<string, boolean>) => void, gutter: () => number, onHover: (step: number | null) => void}} calls
   */
  constructor(calls) {
    this.calls = calls;
    /** @type {string[]} */
    this.names = [];
    /** @type {Answer | null} */
    this.answer = null;
    /** @type {Row[]} */
    this.rows = [];
    /** @type {Map<string, boolean>} */
    this.byHand = new Map();
    /** @type {Finding[]} */
    this.findings = [];
    this.selected = { parameter: "", step: /** @type {number | null} */ (null) };
    /** @type {[number, number] | null} */
    this.range = null;
    this.at = { row: 0, column: 0 };
    this.canvas = h("canvas", { class: "map-canvas" });
    this.tall = h("div", { class: "map-tall" }, this.canvas);
    this.scroller = h(
      "div",
      {
        class: "map-scroll", tabIndex: 0, role: "application", "aria-roledescription": "map", "aria-describedby": "map-keys",
        onscroll: framed(() => this.draw()), onkeydown: (/** @type {KeyboardEvent} */ event) => this.key(event),
        onmousemove: (/** @type {MouseEvent} */ event) => this.hover(event), onmouseleave: () => this.leave(),
        onclick: (/** @type {MouseEvent} */ event) => this.click(event), ondblclick: (/** @type {MouseEvent} */ event) => this.open(event),
        onfocus: () => this.draw(), onblur: () => this.draw(),
      },
      this.tall,
    );
    this.tip = h("div", { class: "tip", hidden: true });
    this.told = h("div", { class: "sr-only", "aria-live": "polite" });
    this.legend = h("div", { class: "legend" });
    this.progress = h("progress", { max: 1, hidden: true, "aria-label": "share of the map that was read" });
    this.keys = h("span", { class: "sr-only", id: "map-keys" }, "Arrow keys move over parameters and columns of steps, Enter chooses, space folds a module, o opens a parameter's page.");
    this.element = h("div", { class: "map" }, this.legend, this.progress, this.scroller, this.tip, this.told, this.keys);
    new ResizeObserver(framed(() => this.layout())).observe(this.scroller);
  }

  /** @param {string[]} names @param {Map<string, boolean>} byHand */
  setNames(names, byHand) {
    const same = names.length === this.names.length && names.every((name, i) => name === this.names[i]);
    const folds = JSON.stringify([...byHand]) === JSON.stringify([...this.byHand]);
    if (same && folds && this.rows.length) return;
    this.names = names;
    this.byHand = new Map(byHand);
    this.tree = tree(names);
    this.refold();
  }

  refold() {
    if (!this.tree) return;
    this.rows = rowsOf(this.tree, ROWS, this.byHand);
    /** @type {Map<string, number>} */
    this.rowOf = new Map();
    this.rows.forEach((row, i) => {
      for (const leaf of row.leaves) this.rowOf?.set(this.names[leaf], i);
    });
    this.paint();
    this.layout();
  }

  /** @param {Answer} answer */
  setAnswer(answer) {
    this.answer = answer;
    this.progress.hidden = answer.header.complete;
    this.progress.value = answer.header.share;
    this.medians = medians(answer);
    this.paint();
    this.layout();
    this.drawLegend();
    this.scroller.setAttribute("aria-label", `${answer.header.title}, ${this.names.length} parameters by ${answer.header.columns} columns of ${answer.header.width} steps`);
  }

  /** @param {Finding[]} findings */
  setFindings(findings) {
    this.findings = findings;
    this.draw();
  }

  /** @param {string} parameter @param {number | null} step @param {[number, number] | null} range */
  select(parameter, step, range) {
    this.selected = { parameter, step };
    this.range = range;
    this.draw();
  }

  retheme() {
    this.paint();
    this.drawLegend();
    this.draw();
  }

  layout() {
    const most = Math.max(this.rows.length, 1) * this.rowHeight();
    this.tall.style.height = `${most}px`;
    this.scroller.style.height = `${Math.min(most, 520)}px`;
    this.draw();
  }

  rowHeight() {
    return this.rows.length <= 12 ? 24 : this.rows.length <= 24 ? 18 : ROW;
  }

  /**
   * What a row shows in a column: of several parameters one that left its own usual range, else the one in the middle.
   * @param {Row} row @param {number} column
   */
  cell(row, column) {
    const answer = /** @type {Answer} */ (this.answer);
    const { values, flags } = answer.arrays;
    const { columns, log } = answer.header;
    const [only] = row.leaves;
    if (row.leaves.length === 1) return { value: values[only * columns + column], flags: flags[only * columns + column], leaf: only };
    let [best, far, all, leaf] = [NOTHING, 0, 0, only];
    const there = [];
    for (const each of row.leaves) {
      const at = each * columns + column;
      const value = values[at];
      all |= flags[at];
      if (value === NOTHING || value === undefined) continue;
      there.push(each);
      const distance = value === ZERO ? 1e6 : Math.abs(value - /** @type {Float64Array} */ (this.medians)[each]);
      if (distance > far) [best, far, leaf] = [value, distance, each];
    }
    if (there.length && far < (log ? PER_DECADE : PER_ONE / 2)) {
      there.sort((a, b) => values[a * columns + column] - values[b * columns + column]);
      leaf = there[there.length >> 1];
      best = values[leaf * columns + column];
    }
    return { value: best, flags: all, leaf };
  }

  /** The picture of all rows, a pixel a cell. */
  paint() {
    const answer = this.answer;
    this.picture = null;
    if (!answer || !answer.header.columns || answer.header.rows !== this.names.length) return;
    const { columns, log } = answer.header;
    const colours = this.colours();
    const [low, high] = this.bounds();
    const ill = ILL[theme()];
    const dark = theme() === "dark";
    const none = dark ? [34, 35, 40] : [250, 250, 250];
    const missing = dark ? [70, 72, 80] : [206, 208, 212];
    const zero = dark ? [0, 0, 0] : [20, 20, 24];
    const picture = new ImageData(columns, this.rows.length);
    const span = high - low || 1;
    this.rows.forEach((row, r) => {
      if (row.open) return; // its members stand below it
      for (let c = 0; c < columns; c++) {
        const { value, flags } = this.cell(row, c);
        /** @type {ArrayLike<number>} */
        let colour = none;
        if (flags & NONFINITE) colour = ill;
        else if (value === ZERO && log) colour = zero;
        else if (value !== NOTHING) {
          const i = 3 * Math.min(255, Math.max(0, Math.round((255 * (value - low)) / span)));
          colour = colours.subarray(i, i + 3);
        } else if (flags & MISSING) colour = missing;
        const at = 4 * (r * columns + c);
        picture.data[at] = colour[0];
        picture.data[at + 1] = colour[1];
        picture.data[at + 2] = colour[2];
        picture.data[at + 3] = 255;
      }
    });
    this.picture = h("canvas", { width: columns, height: Math.max(this.rows.length, 1) });
    this.picture.getContext("2d")?.putImageData(picture, 0, 0);
  }

  colours() {
    const { log } = /** @type {Answer} */ (this.answer).header;
    return ramp(log ? "sequential" : "diverging");
  }

  /** @returns {[number, number]} of the colours, in codes */
  bounds() {
    const { header, arrays } = /** @type {Answer} */ (this.answer);
    if (header.bounds) return [header.bounds[0] * PER_ONE, header.bounds[1] * PER_ONE];
    const every = Math.max(1, Math.floor(arrays.values.length / 50_000)); // enough for the ends of a scale
    const some = arrays.values.filter((/** @type {number} */ value, /** @type {number} */ i) => value > ZERO && i % every === 0);
    const there = some.sort();
    if (!there.length) return [0, 1];
    const at = (/** @type {number} */ share) => there[Math.round(share * (there.length - 1))];
    const [low, high] = [at(0.002), at(0.998)];
    return high - low < PER_DECADE ? [(low + high - PER_DECADE) / 2, (low + high + PER_DECADE) / 2] : [low, high];
  }

  /** First and last step of the columns in view. */
  view() {
    const { header } = /** @type {Answer} */ (this.answer);
    const first = header.first_step;
    const stop = first + header.columns * header.width;
    if (!this.range) return [first, stop];
    return [Math.max(this.range[0], first), Math.min(this.range[1] + 1, stop)];
  }

  width() {
    return Math.max(this.scroller.clientWidth - this.calls.gutter() - 8, 10);
  }

  draw() {
    const gutter = this.calls.gutter();
    const [width, height] = [this.scroller.clientWidth, this.scroller.clientHeight];
    if (!width || !height) return;
    const context = sized(this.canvas, width, height);
    context.clearRect(0, 0, width, height);
    const top = this.scroller.scrollTop;
    const row = this.rowHeight();
    const first = Math.floor(top / row);
    const last = Math.min(this.rows.length, Math.ceil((top + height) / row));
    this.labels(context, gutter, first, last, top, row);
    if (!this.answer || !this.picture) return;
    const [from, stop] = this.view();
    const { header } = this.answer;
    const [c0, c1] = [(from - header.first_step) / header.width, (stop - header.first_step) / header.width];
    context.imageSmoothingEnabled = false;
    context.drawImage(this.picture, c0, first, c1 - c0, Math.max(last - first, 1), gutter, first * row - top, this.width(), (last - first) * row);
    context.fillStyle = css("--surface");
    if (row > 15) for (let r = first; r <= last; r++) context.fillRect(gutter, r * row - top - 0.5, this.width(), 1);
    this.overlay(context, gutter, top, row);
  }

  /** @param {CanvasRenderingContext2D} context @param {number} gutter @param {number} first @param {number} last @param {number} top @param {number} row */
  labels(context, gutter, first, last, top, row) {
    context.font = css("--font-small");
    context.textBaseline = "middle";
    for (let r = first; r < last; r++) {
      const each = this.rows[r];
      const y = r * row - top + row / 2;
      const chosen = this.rowOf?.get(this.selected.parameter) === r;
      context.fillStyle = css(chosen ? "--accent" : "--ink");
      const x = 6 + 12 * Math.min(each.depth, 5);
      if (each.folds) context.fillText(each.open ? "▾" : "▸", x, y);
      const text = each.folds && !each.open ? `${each.label} (${each.leaves.length})` : each.label;
      context.fillText(shortened(context, text, gutter - x - 20), x + 13, y);
    }
  }

  /** @param {CanvasRenderingContext2D} context @param {number} gutter @param {number} top @param {number} row */
  overlay(context, gutter, top, row) {
    const [from, stop] = this.view();
    const x = (/** @type {number} */ step) => gutter + ((step + 0.5 - from) / (stop - from)) * this.width();
    context.save();
    context.beginPath();
    context.rect(gutter - 6, 0, this.width() + 12, this.scroller.clientHeight);
    context.clip();
    const { step, parameter } = this.selected;
    if (step !== null) {
      context.strokeStyle = css("--accent");
      context.lineWidth = 1.5;
      context.strokeRect(x(step), -2, 0.01, this.scroller.clientHeight + 4);
    }
    const chosen = this.rowOf?.get(parameter);
    if (chosen !== undefined) {
      context.strokeStyle = css("--accent");
      context.lineWidth = 2;
      context.strokeRect(gutter, chosen * row - top + 1, this.width(), row - 2);
    }
    for (const finding of this.findings) {
      if (finding.step < from || finding.step >= stop) continue;
      const named = finding.parameter ? [finding.parameter] : finding.parameters.slice(0, 40);
      const places = new Set(named.map((name) => this.rowOf?.get(name)).filter((r) => r !== undefined));
      if (!places.size) places.add(0);
      for (const r of places) triangle(context, x(finding.step), /** @type {number} */ (r) * row - top + row / 2 + 5, 5, css(`--${finding.severity}`));
    }
    if (document.activeElement === this.scroller) {
      const header = /** @type {Answer} */ (this.answer).header;
      context.strokeStyle = css("--ink");
      context.setLineDash([3, 2]);
      const wide = (this.width() * header.width) / (stop - from);
      context.strokeRect(x(header.first_step + this.at.column * header.width) - (0.5 * this.width()) / (stop - from), this.at.row * row - top, Math.max(wide, 3), row);
    }
    context.restore();
  }

  /** @param {MouseEvent} event @returns {{row: number, column: number, gutter: boolean} | null} */
  under(event) {
    const box = this.scroller.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top + this.scroller.scrollTop) / this.rowHeight());
    const x = event.clientX - box.left - this.calls.gutter();
    if (row < 0 || row >= this.rows.length) return null;
    if (x < 0 || !this.answer || !this.answer.header.columns) return { row, column: 0, gutter: true };
    const [from, stop] = this.view();
    const { header } = this.answer;
    const step = from + (x / this.width()) * (stop - from);
    const column = Math.floor((step - header.first_step) / header.width);
    return column >= header.columns || x > this.width() ? null : { row, column, gutter: false };
  }

  /** @param {number} r @param {number} column */
  words(r, column) {
    const { header } = /** @type {Answer} */ (this.answer);
    const row = this.rows[r];
    const { value, flags, leaf } = this.cell(row, column);
    const from = header.first_step + column * header.width;
    const steps = header.width > 1 ? `steps ${whole(from)} to ${whole(from + header.width - 1)}` : `step ${whole(from)}`;
    const size = decoded(value, header.log);
    const told = header.log ? number(size) : header.quantity === "agreement" ? percent(size) : number(size);
    const notes = [
      flags & NONFINITE ? "not finite" : "",
      value === ZERO && header.log ? "all partials are 0" : "",
      flags & MISSING ? "no gradient" : "",
      flags & SEEN ? "" : "nothing recorded",
    ].filter(Boolean);
    return { name: this.names[leaf], module: row.folds ? `${row.path}, ${row.leaves.length} parameters` : "", steps, told: value === NOTHING ? "" : `${header.title}: ${told}`, notes };
  }

  /** @param {MouseEvent} event */
  hover(event) {
    const at = this.under(event);
    this.scroller.style.cursor = at ? "pointer" : "";
    if (!at || at.gutter || !this.answer) return this.leave();
    const words = this.words(at.row, at.column);
    fill(this.tip, h("b", {}, words.name), words.module ? h("div", { class: "faint" }, `of ${words.module}: one that left its usual range, else the middle one`) : null, h("div", {}, words.steps), words.told ? h("div", {}, words.told) : null, ...words.notes.map((note) => h("div", {}, note)));
    const box = this.element.getBoundingClientRect();
    this.tip.hidden = false;
    const left = Math.min(event.clientX - box.left + 14, box.width - this.tip.offsetWidth - 4);
    Object.assign(this.tip.style, { left: `${Math.max(left, 0)}px`, top: `${event.clientY - box.top + 18}px` });
    const { header } = this.answer;
    this.calls.onHover(header.first_step + (at.column + 0.5) * header.width);
  }

  leave() {
    if (!this.tip.hidden) this.calls.onHover(null);
    this.tip.hidden = true;
  }

  /** @param {MouseEvent} event */
  click(event) {
    const at = this.under(event);
    if (!at) return;
    this.at = { row: at.row, column: at.gutter ? this.at.column : at.column };
    if (at.gutter) this.toggle(at.row);
    else this.pick(at.row, at.column);
  }

  /** @param {MouseEvent} event */
  open(event) {
    const at = this.under(event);
    if (at && !at.gutter) this.calls.onOpen(this.names[this.cell(this.rows[at.row], at.column).leaf]);
  }

  /** @param {number} r */
  toggle(r) {
    const row = this.rows[r];
    if (!row.folds) return this.calls.onOpen(row.path);
    this.byHand.set(row.path, !row.open);
    this.refold();
    this.calls.onFold(this.byHand);
  }

  /** @param {number} r @param {number} column */
  pick(r, column) {
    const { header } = /** @type {Answer} */ (this.answer);
    const from = header.first_step + column * header.width;
    this.calls.onPick(this.names[this.cell(this.rows[r], column).leaf], from, from + header.width);
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    if (!this.answer || !this.rows.length) return;
    const columns = this.answer.header.columns;
    const far = event.shiftKey ? 10 : 1;
    /** @type {Record<string, () => void>} */
    const keys = {
      ArrowUp: () => (this.at.row -= far), ArrowDown: () => (this.at.row += far),
      ArrowLeft: () => (this.at.column -= far), ArrowRight: () => (this.at.column += far),
      Home: () => (this.at.column = 0), End: () => (this.at.column = columns - 1),
      PageUp: () => (this.at.row -= 20), PageDown: () => (this.at.row += 20),
      Enter: () => this.pick(this.at.row, this.at.column),
      " ": () => this.rows[this.at.row].folds && this.toggle(this.at.row),
      o: () => this.calls.onOpen(this.names[this.cell(this.rows[this.at.row], this.at.column).leaf]),
    };
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
    this.at.row = Math.min(Math.max(this.at.row, 0), this.rows.length - 1);
    this.at.column = Math.min(Math.max(this.at.column, 0), Math.max(columns - 1, 0));
    const [y, row] = [this.at.row * this.rowHeight(), this.rowHeight()];
    if (y < this.scroller.scrollTop) this.scroller.scrollTop = y;
    if (y + row > this.scroller.scrollTop + this.scroller.clientHeight) this.scroller.scrollTop = y + row - this.scroller.clientHeight;
    const words = this.words(this.at.row, this.at.column);
    say(this.told, [words.name, words.steps, words.told, ...words.notes].filter(Boolean).join(", "));
    this.draw();
  }

  drawLegend() {
    if (!this.answer) return;
    const { header } = this.answer;
    const [low, high] = this.bounds();
    const ends = [low, high].map((code) => number(decoded(Math.round(code), header.log)));
    const swatch = (/** @type {string} */ colour, /** @type {string} */ word) => [h("span", { class: "swatch", style: { background: colour } }), h("span", {}, word)];
    const dark = theme() === "dark";
    fill(
      this.legend,
      h("span", {}, ends[0]), h("span", { class: "ramp", style: { background: gradient(this.colours()) } }), h("span", {}, ends[1]),
      ...swatch(rgb(ILL[theme()]), "not finite"),
      ...(header.log ? swatch(dark ? "rgb(0,0,0)" : "rgb(20,20,24)", "all 0") : []),
      ...swatch(dark ? "rgb(70,72,80)" : "rgb(206,208,212)", "no gradient"),
      h("span", { class: "faint" }, header.width > 1 ? `a column is ${whole(header.width)} steps and shows the value that stands out` : ""),
      menu("the map", { PNG: () => savePng("gradlens-map.png", this.canvas) }),
    );
  }
}

/** @param {number} code @param {boolean} log */
function decoded(code, log) {
  if (code === NOTHING) return NaN;
  if (log) return code === ZERO ? 0 : 10 ** (code / PER_DECADE);
  return code / PER_ONE;
}

/** Of each row the middle of its codes. @param {Answer} answer */
function medians(answer) {
  const { rows, columns } = answer.header;
  const result = new Float64Array(rows);
  for (let r = 0; r < rows; r++) {
    const there = answer.arrays.values.slice(r * columns, (r + 1) * columns).filter((/** @type {number} */ value) => value > ZERO).sort();
    result[r] = there.length ? there[there.length >> 1] : 0;
  }
  return result;
}

/** @param {CanvasRenderingContext2D} context @param {string} text @param {number} width */
function shortened(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let [low, high] = [0, text.length];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (context.measureText(`…${text.slice(-middle)}`).width <= width) low = middle;
    else high = middle - 1;
  }
  return `…${text.slice(text.length - low)}`;
}

/**
 * A row's values, for a spark line: the codes of at most so many columns, extremes kept.
 * @param {Answer} answer @param {number} row @param {number} most
 * @returns {(number | null)[]}
 */
export function spark(answer, row, most) {
  const { columns } = answer.header;
  const values = answer.arrays.values;
  const each = Math.max(1, Math.ceil(columns / most));
  const result = [];
  for (let c = 0; c < columns; c += each) {
    let [low, high] = [Infinity, -Infinity];
    for (let i = c; i < Math.min(c + each, columns); i++) {
      const value = values[row * columns + i];
      if (value === NOTHING) continue;
      const shown = value === ZERO ? -16000 : value;
      if (shown < low) low = shown;
      if (shown > high) high = shown;
    }
    if (low === Infinity) result.push(null);
    else if (each === 1) result.push(low);
    else result.push(low, high);
  }
  return result;
}
