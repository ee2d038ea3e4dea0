// The weight matrix of a parameter as a heat map, where whole partials were kept: partials, values or directions, at each step.

import { numbers } from "./api.js";
import { menu } from "./chart.js";
import { ILL, gradient, ramp, rgb, theme } from "./colour.js";
import { css, empty, fill, framed, h, hint, say, sized } from "./dom.js";
import { exact, number, whole } from "./format.js";
import { saveCsv, savePng } from "./save.js";
import { go, now } from "./state.js";

/** @typedef {import("./state.js").State} State */
/** @typedef {import("./index.js").Info} Info */
/** @typedef {import("./api.js").Answer} Answer */

const SHOWN = { partial: "partials", value: "weights", direction: "directions" };
const HEIGHT = 420;

export class Matrix {
  constructor() {
    this.what = h("select", { "aria-label": "what the heat map shows", onchange: () => this.draw() }, Object.entries(SHOWN).map(([name, label]) => h("option", { value: name }, label)));
    this.slider = h("input", { type: "range", min: "0", step: "1", "aria-label": "step of the heat map", oninput: () => this.slide() });
    this.at = h("output", { class: "step" });
    this.canvas = h("canvas", { class: "matrix", role: "img", tabIndex: 0, onmousemove: (/** @type {MouseEvent} */ event) => this.hover(event), onmouseleave: () => say(this.told, ""), onkeydown: (/** @type {KeyboardEvent} */ event) => this.key(event) });
    this.frame = h("div", { class: "plot" }, this.canvas);
    this.told = h("p", { class: "faint told", "aria-live": "polite" });
    this.legend = h("span", { class: "legend" });
    this.title = h("h3", {}, "weight matrix");
    this.content = h(
      "div",
      {},
      h("div", { class: "toolbar" }, this.title, hint("Rows and columns are the parameter's first and remaining dimensions. The scale is symmetric about 0 and ends at the 99.5th percentile of the sizes. Arrow keys read single weights."), this.what, h("label", { class: "slider" }, "step ", this.slider), this.at, menu("the heat map", { PNG: () => savePng(`${now().parameter}-matrix.png`, this.canvas), CSV: () => this.toCsv() })),
      this.legend,
      this.frame,
      this.told,
    );
    this.none = h("div");
    this.element = h("div", {}, this.none, this.content);
    /** @type {number[]} */
    this.steps = [];
    /** @type {Answer | null} */
    this.answer = null;
    this.key_ = "";
    this.cursor = { row: 0, column: 0 };
    new ResizeObserver(framed(() => this.draw())).observe(this.frame);
  }

  /** @param {State} state @param {Info} info */
  async show(state, info) {
    this.steps = info.kept?.[state.parameter] ?? [];
    const none = !this.steps.length;
    this.content.hidden = none;
    fill(
      this.none,
      none
        ? empty("No matrix of this parameter was kept", h("span", {}, "To see every weight over time, name it when watching: "), h("code", { class: "block" }, `gradlens.watch(model, optimizer, run=…, keep=["${state.parameter}"])`))
        : null,
    );
    if (none) return;
    const wanted = state.step === "" ? Infinity : Number(state.step);
    let place = this.steps.findLastIndex((step) => step <= wanted);
    if (place < 0) place = 0;
    this.slider.max = String(this.steps.length - 1);
    if (document.activeElement !== this.slider) this.slider.value = String(place);
    say(this.at, `${whole(this.steps[place])} (${place + 1} of ${this.steps.length} kept)`);
    const key = `${state.run} ${state.parameter} ${this.steps[place]} ${info.version}`;
    if (key === this.key_) return;
    const answer = await numbers("partials", { run: state.run, parameter: state.parameter, step: this.steps[place] });
    if (now().parameter !== state.parameter || now().run !== state.run) return;
    this.key_ = key;
    this.answer = answer;
    this.draw();
  }

  slide() {
    go({ step: String(this.steps[Number(this.slider.value)]) }, true);
  }

  /** Numbers shown, and the end of the colour scale. */
  values() {
    const { arrays } = /** @type {Answer} */ (this.answer);
    if (this.what.value === "direction") return { values: arrays.partial.map((/** @type {number} */ partial) => Math.sign(partial)), end: 1 };
    const values = arrays[this.what.value];
    const sizes = Float64Array.from(values, Math.abs).filter(Number.isFinite).sort();
    const end = sizes.length ? sizes[Math.min(Math.ceil(0.995 * sizes.length), sizes.length - 1)] : 1;
    return { values, end: end || 1 };
  }

  draw() {
    const width = this.frame.clientWidth;
    if (!width || !this.answer) return;
    const { rows, columns, reduced } = this.answer.header;
    const { values, end } = this.values();
    const colours = ramp("diverging");
    const picture = new ImageData(columns, rows);
    const ill = ILL[theme()];
    for (let i = 0; i < values.length; i++) {
      const at = Math.max(0, Math.min(255, Math.round(127.5 + (127.5 * values[i]) / end)));
      const colour = Number.isFinite(values[i]) ? colours.subarray(3 * at, 3 * at + 3) : ill;
      picture.data[4 * i] = colour[0];
      picture.data[4 * i + 1] = colour[1];
      picture.data[4 * i + 2] = colour[2];
      picture.data[4 * i + 3] = 255;
    }
    const small = h("canvas", { width: columns, height: rows });
    small.getContext("2d")?.putImageData(picture, 0, 0);
    this.scale = Math.min(width / columns, HEIGHT / rows, 28);
    if (this.scale > 1) this.scale = Math.floor(this.scale * devicePixelRatio) / devicePixelRatio;
    const tall = Math.max(rows * this.scale, Math.min(rows * 28, 14));
    const context = sized(this.canvas, Math.max(columns * this.scale, 1), tall);
    context.imageSmoothingEnabled = this.scale < 1;
    context.drawImage(small, 0, 0, columns * this.scale, tall);
    this.tall = tall / rows;
    if (document.activeElement === this.canvas) {
      context.strokeStyle = css("--ink");
      context.lineWidth = 2;
      context.strokeRect(this.cursor.column * this.scale, this.cursor.row * this.tall, Math.max(this.scale, 3), Math.max(this.tall, 3));
    }
    const directions = this.what.value === "direction";
    fill(
      this.legend,
      h("span", {}, directions ? "increase" : `≤ ${number(-end)}`), h("span", { class: "ramp", style: { background: gradient(colours) } }), h("span", {}, directions ? "decrease" : `≥ ${number(end)}`),
      h("span", { class: "swatch", style: { background: rgb(ill) } }), h("span", {}, "not finite"),
      reduced > 1 ? h("span", {}, `each cell is the largest of ${reduced} × ${reduced} weights`) : null,
    );
    this.canvas.setAttribute("aria-label", `${SHOWN[/** @type {keyof typeof SHOWN} */ (this.what.value)]} of ${this.answer.header.parameter} at step ${this.answer.header.step}: ${rows} by ${columns}`);
  }

  /** @param {number} row @param {number} column */
  words(row, column) {
    const { header, arrays } = /** @type {Answer} */ (this.answer);
    const at = row * header.columns + column;
    const flat = arrays.index[at];
    const index = [];
    let rest = flat;
    for (const size of [...header.shape].reverse()) {
      index.unshift(rest % size);
      rest = Math.floor(rest / size);
    }
    const [partial, value] = [arrays.partial[at], arrays.value[at]];
    const direction = partial < 0 ? "increase" : partial > 0 ? "decrease" : partial === 0 ? "hold" : "undefined";
    return `[${index.join(", ")}]: partial ${exact(partial)}, so ${direction}; weight ${exact(value)}`;
  }

  /** @param {MouseEvent} event */
  hover(event) {
    if (!this.answer || !this.scale || !this.tall) return;
    const [row, column] = [Math.floor(event.offsetY / this.tall), Math.floor(event.offsetX / this.scale)];
    const { rows, columns } = this.answer.header;
    if (row >= 0 && column >= 0 && row < rows && column < columns) say(this.told, this.words(row, column));
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    /** @type {Record<string, [number, number]>} */
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    if (!move || !this.answer) return;
    event.preventDefault();
    const { rows, columns } = this.answer.header;
    this.cursor = { row: Math.min(Math.max(this.cursor.row + move[0], 0), rows - 1), column: Math.min(Math.max(this.cursor.column + move[1], 0), columns - 1) };
    say(this.told, this.words(this.cursor.row, this.cursor.column));
    this.draw();
  }

  toCsv() {
    if (!this.answer) return;
    const { header, arrays } = this.answer;
    const rows = Array.from(arrays.partial, (partial, i) => [arrays.index[i], partial, arrays.value[i]]);
    saveCsv(`${header.parameter}-partials-step-${header.step}.csv`, ["flat_index", "partial", "value"], rows);
  }
}
