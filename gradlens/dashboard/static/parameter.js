// One parameter: its numbers over steps, its histogram over time, its weights.

import { ask, numbers } from "./api.js";
import { Chart, menu } from "./chart.js";
import { gradient, pick, ramp } from "./colour.js";
import { css, empty, fill, framed, h, hint, say, sized, settled } from "./dom.js";
import { exact, number, shape, whole } from "./format.js";
import { Matrix } from "./matrix.js";
import { saveCsv, savePng } from "./save.js";
import { go, now } from "./state.js";

/** @typedef {import("./state.js").State} State */
/** @typedef {import("./index.js").Info} Info */
/** @typedef {import("./api.js").Answer} Answer */

/** @type {Record<string, {title: string, help: string, log?: boolean, unit?: "share", bounds?: [number, number], lines: import("./chart.js").Line[]}>} */
export const CHARTS = {
  size: {
    title: "size of the partials", help: "root mean square, and the largest", log: true,
    lines: [{ name: "rms", label: "rms", colour: "blue" }, { name: "abs_max", label: "largest |partial|", colour: "orange", dash: [5, 3] }],
  },
  shares: {
    title: "which way its weights should move", help: "shares of the finite partials, to lower the loss", unit: "share", bounds: [0, 1],
    lines: [{ name: "increase_share", label: "increase", colour: "blue" }, { name: "decrease_share", label: "decrease", colour: "orange", dash: [6, 3] }, { name: "hold_share", label: "hold", colour: "grey", dash: [2, 3] }],
  },
  cosine: {
    title: "direction", help: "cosine with the last observed gradient; cosine of the update with downhill", bounds: [-1, 1],
    lines: [{ name: "cosine", label: "with the last gradient", colour: "green" }, { name: "alignment", label: "update with downhill", colour: "pink", dash: [5, 3] }],
  },
  flips: {
    title: "flips, and moves against the gradient", help: "shares of the weights", unit: "share", bounds: [0, 1],
    lines: [{ name: "flip_share", label: "sign changed", colour: "sky" }, { name: "against_share", label: "moved against", colour: "orange", dash: [5, 3] }],
  },
  update_ratio: { title: "update ratio |dw| / |w|", help: "about 1e-3 is usual", log: true, lines: [{ name: "update_ratio", label: "|dw| / |w|", colour: "green" }] },
  loss_change: { title: "first-order change of the loss", help: "g·dw: what the step changes the loss by, to first order", lines: [{ name: "loss_change", label: "g·dw", colour: "pink" }] },
  nonfinite: { title: "partials that are not finite", help: "NaN and infinite ones, counted", lines: [{ name: "nan", label: "NaN", colour: "pink" }, { name: "inf", label: "infinite", colour: "orange", dash: [5, 3] }] },
};

export class ParameterPage {
  constructor() {
    /** @type {Record<string, Chart>} */
    this.charts = {};
    for (const [name, chart] of Object.entries(CHARTS)) {
      this.charts[name] = new Chart({
        ...chart,
        onStep: (step) => go({ step: String(step) }),
        onZoom: (from, to) => go({ from: from === null ? "" : String(Math.max(from, 0)), to: to === null ? "" : String(to) }),
      });
    }
    this.name = h("h2", { class: "sr-only" });
    this.facts = h("span", { class: "faint" });
    this.slider = h("input", { type: "range", min: "0", "aria-label": "step", oninput: () => this.slide() });
    this.stepText = h("output", { class: "step" });
    this.zoomed = h("button", { class: "small", type: "button", hidden: true, onclick: () => go({ from: "", to: "" }) }, "whole run");
    this.pick = h("input", { class: "wide", "aria-label": "parameter", list: "parameter-names", spellcheck: false, onchange: () => this.choose() });
    this.names = h("datalist", { id: "parameter-names" });
    this.histogram = new Histogram();
    this.matrix = new Matrix();
    this.weights = h("div", { class: "weights" });
    this.weightsTitle = h("h3", {}, "most sensitive weights");
    this.problem = h("div", { role: "alert" });
    this.grid = h("div", { class: "charts" }, Object.values(this.charts).map((chart) => chart.element));
    this.content = h(
      "div",
      {},
      h("section", { class: "card", "aria-label": "numbers over steps" }, this.grid),
      h("div", { class: "columns even" }, h("section", { class: "card", "aria-label": "histogram over time" }, this.histogram.element), h("section", { class: "card", "aria-label": "most sensitive weights" }, this.weightsTitle, this.weights)),
      h("section", { class: "card", "aria-label": "weight matrix" }, this.matrix.element),
    );
    this.none = empty("No parameter is chosen", "Choose one above, click a cell of the map on the overview, or a row of the table.");
    this.element = h(
      "div",
      { class: "parameter-page" },
      h(
        "section",
        { class: "card", "aria-label": "parameter" },
        h("div", { class: "toolbar" }, h("button", { type: "button", "aria-label": "previous parameter", title: "previous parameter: [", onclick: () => this.move(-1) }, "‹"), h("button", { type: "button", "aria-label": "next parameter", title: "next parameter: ]", onclick: () => this.move(1) }, "›"), this.pick, this.names, this.name, this.facts),
        h("div", { class: "toolbar" }, h("label", { class: "slider" }, "step ", this.slider), this.stepText, h("button", { class: "small", type: "button", onclick: () => go({ step: "" }) }, "last"), this.zoomed, hint("Drag over a chart to zoom into steps, double-click to see the whole run, click to choose a step. All charts follow.")),
      ),
      this.problem,
      this.none,
      this.content,
    );
    this.asking = 0;
    this.chartsKey = this.histogramKey = this.weightsKey = "";
    this.sliding = settled(() => go({ step: this.slider.value }, true), 60);
  }

  slide() {
    say(this.stepText, whole(Number(this.slider.value)));
    this.sliding();
  }

  choose() {
    if (this.info?.names.includes(this.pick.value)) go({ parameter: this.pick.value });
    else say(this.problem, `There is no parameter ${this.pick.value}.`);
  }

  /** @param {number} by */
  move(by) {
    const names = this.info?.names ?? [];
    if (!names.length) return;
    const at = names.indexOf(now().parameter);
    go({ parameter: names[(at + by + names.length) % names.length] });
  }

  /** @param {State} state @param {Info} info @param {string} stage */
  async show(state, info, stage) {
    if (this.info?.names !== info.names) fill(this.names, info.names.slice(0, 2000).map((name) => h("option", { value: name })));
    this.info = info;
    const { parameter } = state;
    const there = info.names.includes(parameter);
    this.none.hidden = there;
    this.content.hidden = !there;
    say(this.problem, parameter && !there ? `There is no parameter ${parameter} in this run.` : "");
    say(this.name, there ? parameter : "");
    if (document.activeElement !== this.pick) this.pick.value = parameter;
    say(this.facts, there ? `${shape(info.shapes[parameter] ?? [])} · ${info.dtypes[parameter] ?? ""} · stage ${stage}` : "");
    this.bounds(state, info);
    if (!there || info.steps === null) return;
    this.mark(state, info);
    const asking = ++this.asking;
    const charts = this.drawCharts(state, info, stage, asking);
    const others = [this.drawHistogram(state, info, stage, asking), this.drawWeights(state, info, asking), this.matrix.show(state, info)];
    await Promise.all([charts, ...others]);
  }

  /** @param {State} state @param {Info} info */
  bounds(state, info) {
    const [first, last] = info.steps ?? [0, 0];
    this.slider.min = String(state.from || first);
    this.slider.max = String(state.to || last);
    if (document.activeElement !== this.slider) this.slider.value = state.step || String(last);
    say(this.stepText, state.step ? whole(Number(state.step)) : `last (${whole(last)})`);
    this.zoomed.hidden = !state.from;
  }

  /** @param {State} state @param {Info} info */
  mark(state, info) {
    const marks = info.listed.filter((finding) => finding.parameter === state.parameter || finding.parameters.includes(state.parameter)).map((finding) => ({ step: finding.step, label: finding.rule, severity: finding.severity }));
    for (const chart of Object.values(this.charts)) chart.setStep(state.step === "" ? null : Number(state.step), marks);
    this.histogram.setStep(state.step === "" ? null : Number(state.step));
  }

  /** @param {State} state @param {Info} info @param {string} stage @param {number} asking */
  async drawCharts(state, info, stage, asking) {
    const key = [state.run, state.parameter, stage, state.from, state.to, info.version].join(" ");
    if (key === this.chartsKey) return;
    const query = { run: state.run, parameter: state.parameter, stage, from: state.from, to: state.to, points: 600 };
    // Of a long run one chart at a time, so that the first is there at once.
    const names = Object.keys(CHARTS);
    const groups = (info.steps ? info.steps[1] - info.steps[0] : 0) > 100_000 ? names.map((name) => [name]) : [names];
    for (const group of groups) {
      const { arrays } = await numbers("timelines", { ...query, charts: group.join(",") });
      if (asking !== this.asking) return;
      for (const name of group) this.fillChart(name, arrays, state);
    }
    this.chartsKey = key;
  }

  /** @param {string} name @param {Record<string, any>} arrays @param {State} state */
  fillChart(name, arrays, state) {
    const chart = this.charts[name];
    const lines = chart.options.lines.map((line) => arrays[`${name}.${line.name}`]);
    const nothing = name === "nonfinite" ? lines.every((line) => line.every((/** @type {number} */ value) => !value)) : lines.every((line) => line.every(Number.isNaN));
    chart.element.hidden = nothing;
    if (state.from !== "" && state.to !== "") chart.setZoom(Number(state.from), Number(state.to));
    else chart.setZoom(null, null);
    if (!nothing) chart.set([arrays[`${name}.step`], ...lines]);
  }

  /** @param {State} state @param {Info} info @param {string} stage @param {number} asking */
  async drawHistogram(state, info, stage, asking) {
    const key = [state.run, state.parameter, stage, info.version].join(" ");
    if (key === this.histogramKey) return;
    const answer = await numbers("histogram", { run: state.run, parameter: state.parameter, stage });
    if (asking !== this.asking) return;
    this.histogramKey = key;
    this.histogram.set(answer);
  }

  /** @param {State} state @param {Info} info @param {number} asking */
  async drawWeights(state, info, asking) {
    const key = [state.run, state.parameter, state.step, info.version].join(" ");
    if (key === this.weightsKey) return;
    let answer;
    try {
      answer = await ask("weights", { run: state.run, parameter: state.parameter, step: state.step });
    } catch (error) {
      if (asking === this.asking) fill(this.weights, h("p", { class: "note" }, /** @type {Error} */ (error).message));
      return;
    }
    if (asking !== this.asking) return;
    this.weightsKey = key;
    say(this.weightsTitle, answer.step === null ? "most sensitive weights" : `most sensitive weights, step ${whole(answer.step)}, stage ${answer.stage}`);
    const rows = answer.weights;
    const extra = answer.columns.filter((/** @type {string} */ name) => !["value", "partial", "direction", "sensitivity", "saliency", "verdict", "agreement"].includes(name));
    if (!rows.length) return fill(this.weights, h("p", { class: "note" }, "None were kept at this step."));
    const csv = () => saveCsv(`${state.parameter}-weights-step-${answer.step}.csv`, ["index", ...answer.columns], rows.map((/** @type {any} */ row) => [row.index ? row.index.join(" ") : "", ...answer.columns.map((/** @type {string} */ name) => row[name])]));
    fill(
      this.weights,
      h("p", { class: "faint" }, "Verdict: which way over the recorded steps, by a sign test.", hint(answer.meaning)),
      menu("the weights", { CSV: csv }),
      h(
        "table",
        { class: "plain" },
        h("thead", {}, h("tr", {}, ["index", "value", "partial", "to lower the loss", "verdict", "saliency", ...extra].map((name) => h("th", { scope: "col" }, name)))),
        h("tbody", {}, rows.map((/** @type {any} */ row) =>
          h("tr", {}, h("th", { scope: "row" }, row.index ? `[${row.index.join(", ")}]` : "?"), h("td", { class: "number", title: exact(row.value) }, number(row.value)), h("td", { class: "number", title: exact(row.partial) }, number(row.partial)), h("td", {}, h("span", { class: `direction ${row.direction}` }, arrow(row.direction), " ", row.direction)), h("td", { class: "sure" }, row.verdict, h("br"), h("span", { class: "faint" }, row.agreement)), h("td", { class: "number", title: exact(row.saliency) }, number(row.saliency)), extra.map((/** @type {string} */ name) => h("td", {}, typeof row[name] === "number" ? number(row[name]) : String(row[name] ?? "–")))),
        )),
      ),
    );
  }

  retheme() {
    for (const chart of Object.values(this.charts)) chart.draw();
    this.histogram.draw();
    this.matrix.draw();
  }
}

/** @param {string} direction */
function arrow(direction) {
  return /** @type {Record<string, string>} */ ({ increase: "↑", decrease: "↓", hold: "=" })[direction] ?? "!";
}

/** Counts by sign and power of two, over the steps whose histograms were kept. */
class Histogram {
  constructor() {
    this.canvas = h("canvas", { class: "histogram", role: "img", onmousemove: (/** @type {MouseEvent} */ event) => this.hover(event), onmouseleave: () => say(this.told, ""), onclick: (/** @type {MouseEvent} */ event) => this.click(event) });
    this.told = h("p", { class: "faint told" });
    this.none = h("p", { class: "note", hidden: true }, "No histogram was kept of this parameter at this stage.");
    this.legend = h("span", { class: "legend" });
    this.frame = h("div", { class: "plot" }, this.canvas);
    this.element = h("div", {}, h("h3", {}, "histogram over time", hint("Upper half: positive partials (decrease), lower half: negative ones (increase), by size. The line between them is zero. Colour: the share of the weights."), menu("the histogram", { PNG: () => savePng(`${now().parameter}-histogram.png`, this.canvas), CSV: () => this.toCsv() })), this.legend, this.frame, this.none, this.told);
    /** @type {Answer | null} */
    this.answer = null;
    /** @type {number | null} */
    this.step = null;
    new ResizeObserver(framed(() => this.draw())).observe(this.frame);
  }

  /** @param {Answer} answer */
  set(answer) {
    this.answer = answer;
    const none = !answer.arrays.steps.length;
    this.none.hidden = !none;
    this.frame.hidden = this.legend.hidden = none;
    this.draw();
  }

  /** @param {number | null} step */
  setStep(step) {
    this.step = step;
    this.draw();
  }

  /** Rows from the largest positive, over zero, to the largest negative: [bucket or -1, sign]. */
  levels() {
    const { arrays, header } = /** @type {Answer} */ (this.answer);
    const { buckets } = header;
    const used = new Set();
    arrays.counts.forEach((/** @type {number} */ count, /** @type {number} */ i) => count && used.add((i % (2 * buckets)) % buckets));
    const [low, high] = [Math.min(...used), Math.max(...used)];
    const range = used.size ? Array.from({ length: high - low + 1 }, (_, i) => low + i) : [];
    return [...range.toReversed().map((bucket) => buckets + bucket), -1, ...range];
  }

  draw() {
    const width = this.frame.clientWidth;
    if (!width || !this.answer || !this.answer.arrays.steps.length) return;
    const height = 260;
    const context = sized(this.canvas, width, height);
    context.clearRect(0, 0, width, height);
    const { arrays, header } = this.answer;
    const { steps, counts, zero } = arrays;
    const levels = this.levels();
    const [left, top, bottom] = [64, 6, 22];
    const tall = (height - top - bottom) / levels.length;
    const colours = ramp("sequential");
    const edges = this.edges(left, width - 8);
    const total = Array.from(steps, (_, i) => zero[i] + sum(counts.slice(i * 2 * header.buckets, (i + 1) * 2 * header.buckets)));
    levels.forEach((bucket, l) => {
      for (let i = 0; i < steps.length; i++) {
        const count = bucket < 0 ? zero[i] : counts[i * 2 * header.buckets + bucket];
        if (!count) continue;
        context.fillStyle = pick(colours, Math.sqrt(count / total[i]));
        context.fillRect(edges[i], top + l * tall, Math.max(edges[i + 1] - edges[i], 1) + 0.3, Math.max(tall, 1) + 0.3);
      }
    });
    context.fillStyle = css("--ink-2");
    context.font = css("--font-small");
    context.textAlign = "right";
    context.textBaseline = "middle";
    levels.forEach((bucket, l) => {
      const every = Math.max(1, Math.ceil(14 / tall));
      if (bucket >= 0 && (l - (levels.length >> 1)) % every) return;
      context.fillText(this.level(bucket), left - 6, top + (l + 0.5) * tall);
    });
    context.textBaseline = "top";
    context.textAlign = "left";
    context.fillText(`step ${whole(steps[0])}`, left, height - 16);
    context.textAlign = "right";
    context.fillText(whole(steps[steps.length - 1]), width - 8, height - 16);
    if (this.step !== null) {
      const span = steps[steps.length - 1] - steps[0] || 1;
      const x = left + ((this.step - steps[0]) / span) * (width - 8 - left);
      context.fillStyle = css("--accent");
      context.fillRect(x, top, 1.5, height - top - bottom);
    }
    fill(this.legend, h("span", {}, "0 %"), h("span", { class: "ramp", style: { background: gradient(colours) } }), h("span", {}, "100 % of the weights (square root)"));
    this.canvas.setAttribute("aria-label", `histogram of the partials at ${steps.length} steps from ${steps[0]} to ${steps[steps.length - 1]}`);
  }

  /** Where each step's column begins, and where the last ends. @param {number} left @param {number} right */
  edges(left, right) {
    const { steps } = /** @type {Answer} */ (this.answer).arrays;
    const [first, last] = [steps[0], steps[steps.length - 1]];
    const x = (/** @type {number} */ step) => left + ((step - first) / (last - first || 1)) * (right - left);
    const edges = [left];
    for (let i = 1; i < steps.length; i++) edges.push(x((steps[i - 1] + steps[i]) / 2));
    return [...edges, right];
  }

  /** @param {number} bucket */
  level(bucket) {
    const { header } = /** @type {Answer} */ (this.answer);
    if (bucket < 0) return "0";
    const size = 2 ** (header.exponent_min + (bucket % header.buckets));
    return number(bucket < header.buckets ? -size : size);
  }

  /** @param {MouseEvent} event */
  place(event) {
    if (!this.answer) return null;
    const { steps } = this.answer.arrays;
    const edges = this.edges(64, this.frame.clientWidth - 8);
    const i = edges.findIndex((edge, e) => event.offsetX >= edge && event.offsetX < (edges[e + 1] ?? -1));
    const levels = this.levels();
    const l = Math.floor(((event.offsetY - 6) / (260 - 28)) * levels.length);
    return i < 0 || i >= steps.length || l < 0 || l >= levels.length ? null : { i, bucket: levels[l] };
  }

  /** @param {MouseEvent} event */
  hover(event) {
    const at = this.place(event);
    if (!at || !this.answer) return say(this.told, "");
    const { arrays, header } = this.answer;
    const count = at.bucket < 0 ? arrays.zero[at.i] : arrays.counts[at.i * 2 * header.buckets + at.bucket];
    const size = at.bucket < 0 ? "exactly 0" : `${this.level(at.bucket)} to ${number((at.bucket < header.buckets ? -1 : 1) * 2 ** (header.exponent_min + (at.bucket % header.buckets) + 1))}`;
    say(this.told, `step ${whole(arrays.steps[at.i])}: ${whole(count)} weights with a partial of ${size}`);
  }

  /** @param {MouseEvent} event */
  click(event) {
    const at = this.place(event);
    if (at && this.answer) go({ step: String(this.answer.arrays.steps[at.i]) });
  }

  toCsv() {
    if (!this.answer) return;
    const { arrays, header } = this.answer;
    /** @type {(string | number)[][]} */
    const rows = [];
    arrays.steps.forEach((/** @type {number} */ step, /** @type {number} */ i) => {
      for (const bucket of this.levels()) {
        const count = bucket < 0 ? arrays.zero[i] : arrays.counts[i * 2 * header.buckets + bucket];
        if (count) rows.push([step, bucket < 0 ? "0" : (bucket < header.buckets ? "negative" : "positive"), bucket < 0 ? 0 : 2 ** (header.exponent_min + (bucket % header.buckets)), count]);
      }
    });
    saveCsv(`${now().parameter}-histogram.csv`, ["step", "sign", "size_from", "count"], rows);
  }
}

/** @param {ArrayLike<number>} values */
function sum(values) {
  let result = 0;
  for (let i = 0; i < values.length; i++) result += values[i];
  return result;
}
