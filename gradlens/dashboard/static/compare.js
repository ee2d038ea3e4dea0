// Two runs beside each other: their losses, one parameter's numbers, and where the parameters differ most.

import { ask, numbers } from "./api.js";
import { Chart } from "./chart.js";
import { empty, fill, h, hint, say } from "./dom.js";
import { number, whole } from "./format.js";
import { CHARTS } from "./parameter.js";
import { saveCsv } from "./save.js";
import { go, now } from "./state.js";

/** @typedef {import("./state.js").State} State */
/** @typedef {import("./index.js").Info} Info */
/** @typedef {import("./api.js").Answer} Answer */

const SHOWN = ["size", "update_ratio", "cosine", "shares"];
const MOST = 300;

export class Compare {
  constructor() {
    this.other = h("select", { "aria-label": "the run to compare with", onchange: () => go({ other: this.other.value }) });
    this.pick = h("select", { "aria-label": "parameter", class: "wide", onchange: () => go({ parameter: this.pick.value }) });
    const onStep = (/** @type {number} */ step) => go({ step: String(step) });
    const onZoom = (/** @type {number | null} */ from, /** @type {number | null} */ to) => go({ from: from === null ? "" : String(Math.max(from, 0)), to: to === null ? "" : String(to) });
    /** @param {string} title @param {string} line @param {any} more */
    const pair = (title, line, more) => new Chart({ title, ...more, lines: [{ name: `${line}_this`, label: "this run", colour: "blue" }, { name: `${line}_other`, label: "the other", colour: "orange", dash: [5, 3] }], onStep, onZoom });
    this.loss = pair("loss", "loss", { height: 190 });
    /** @type {Record<string, Chart>} */
    this.charts = {};
    for (const name of SHOWN) {
      const { title, log, unit, bounds, lines } = CHARTS[name];
      this.charts[name] = pair(lines.length > 1 ? `${title}: ${lines[0].label}` : title, lines[0].name, { log, unit, bounds });
    }
    this.body = h("tbody");
    this.tableTitle = h("h2", {}, "Parameters, the most different first");
    this.problem = h("div", { role: "alert" });
    this.verdicts = h("dl", { class: "verdicts" });
    this.content = h(
      "div",
      {},
      h("section", { class: "card", "aria-label": "diagnoses and losses" }, this.verdicts, this.loss.element),
      h("section", { class: "card", "aria-label": "one parameter in both runs" }, h("div", { class: "toolbar" }, h("h2", {}, "One parameter"), this.pick), h("div", { class: "charts" }, SHOWN.map((name) => this.charts[name].element))),
      h(
        "section",
        { class: "card", "aria-label": "differences of parameters" },
        h("div", { class: "toolbar" }, this.tableTitle, hint("By the ratio of their rms at the last step of each run. Click a row to see both runs' lines of it."), h("span", { class: "push" }), h("button", { type: "button", onclick: () => this.export() }, "CSV")),
        h("div", { class: "wide-table" }, h("table", { class: "plain" }, h("thead", {}, h("tr", {}, ["parameter", "rms, this run", "rms, the other", "ratio", "update ratio, this", "update ratio, the other", "status, this", "status, the other"].map((name) => h("th", { scope: "col" }, name)))), this.body)),
      ),
    );
    this.none = h("div");
    this.element = h("div", { class: "compare" }, h("section", { class: "card", "aria-label": "what is compared" }, h("div", { class: "toolbar" }, h("h2", {}, "Compare"), this.title_(), h("span", {}, "with"), this.other)), this.problem, this.none, this.content);
    this.asking = 0;
    /** @type {(string | number)[][]} */
    this.rows = [];
  }

  title_() {
    this.mine = h("b");
    return this.mine;
  }

  /** @param {State} state @param {Info} info @param {string} stage @param {{name: string}[]} runs */
  async show(state, info, stage, runs) {
    say(/** @type {Element} */ (this.mine), state.run);
    const names = runs.map((run) => run.name).filter((name) => name !== state.run);
    fill(this.other, h("option", { value: "" }, names.length ? "choose a run" : "there is no other run"), ...names.map((name) => h("option", { value: name }, name)));
    this.other.value = names.includes(state.other) ? state.other : "";
    const ready = this.other.value !== "";
    this.content.hidden = !ready;
    fill(this.none, ready ? null : names.length ? empty("Choose a run to compare with", "Both losses, each parameter's lines in both, and where the parameters differ most.") : empty("There is only one run here", "Record another one beside it: gradlens.watch(model, optimizer, run=\"runs/another\"), under the same --logdir."));
    if (!ready) return;
    const asking = ++this.asking;
    const other = /** @type {Info} */ (await ask("run", { run: state.other }));
    if (asking !== this.asking) return;
    fill(this.verdicts, h("dt", {}, state.run), h("dd", {}, info.diagnosis.verdict), h("dt", {}, state.other), h("dd", {}, other.diagnosis.verdict));
    const shared = info.names.filter((name) => new Set(other.names).has(name));
    if (this.pick.dataset.of !== `${state.run}|${state.other}`) {
      fill(this.pick, h("option", { value: "" }, "choose a parameter"), ...shared.slice(0, 5000).map((name) => h("option", { value: name }, name)));
      this.pick.dataset.of = `${state.run}|${state.other}`;
    }
    const parameter = shared.includes(state.parameter) ? state.parameter : (shared[0] ?? "");
    this.pick.value = parameter;
    const otherStage = other.stages.includes(stage) ? stage : (other.stages[other.stages.length - 1] ?? stage);
    say(this.problem, shared.length ? "" : "The two runs have no parameter of the same name.");
    await Promise.all([this.losses(state, asking), this.lines(state, parameter, stage, otherStage, asking), this.differences(state, info, other, stage, otherStage, asking)]);
  }

  /** @param {State} state @param {number} asking */
  async losses(state, asking) {
    const both = await Promise.all([state.run, state.other].map((run) => numbers("scalars", { run, from: state.from, to: state.to, points: 1000 })));
    if (asking !== this.asking) return;
    const lines = both.map((answer) => {
      const place = answer.header.names.indexOf("loss");
      return place < 0 ? { step: [], value: [] } : { step: answer.arrays[`${place}.step`], value: answer.arrays[`${place}.value`] };
    });
    this.together(this.loss, lines, state);
  }

  /** @param {State} state @param {string} parameter @param {string} stage @param {string} otherStage @param {number} asking */
  async lines(state, parameter, stage, otherStage, asking) {
    if (!parameter) return;
    const query = { parameter, charts: SHOWN.join(","), from: state.from, to: state.to, points: 500 };
    const both = await Promise.all([numbers("timelines", { ...query, run: state.run, stage }), numbers("timelines", { ...query, run: state.other, stage: otherStage })]);
    if (asking !== this.asking) return;
    for (const name of SHOWN) {
      const line = CHARTS[name].lines[0].name;
      this.together(this.charts[name], both.map(({ arrays }) => ({ step: arrays[`${name}.step`], value: arrays[`${name}.${line}`] })), state);
    }
  }

  /** Two lines over their steps together. @param {Chart} chart @param {{step: any, value: any}[]} lines @param {State} state */
  together(chart, lines, state) {
    const steps = Float64Array.from(new Set([...lines[0].step, ...lines[1].step])).sort();
    const values = lines.map(({ step, value }) => filled(steps, step, value));
    if (state.from !== "" && state.to !== "") chart.setZoom(Number(state.from), Number(state.to));
    else chart.setZoom(null, null);
    chart.setStep(state.step === "" ? null : Number(state.step));
    chart.set([steps, ...values]);
  }

  /** @param {State} state @param {Info} info @param {Info} other @param {string} stage @param {string} otherStage @param {number} asking */
  async differences(state, info, other, stage, otherStage, asking) {
    const [a, b] = await Promise.all([numbers("table", { run: state.run, stage }), numbers("table", { run: state.other, stage: otherStage })]);
    if (asking !== this.asking) return;
    const rowsOf = (/** @type {Answer} */ table, /** @type {string[]} */ names) => new Map(Array.from(table.arrays.row, (place, i) => [names[place], i]));
    const [mine, theirs] = [rowsOf(a, info.names), rowsOf(b, other.names)];
    this.rows = [];
    for (const [name, i] of mine) {
      const j = theirs.get(name);
      if (j === undefined) continue;
      const [rms, otherRms] = [a.arrays.rms[i], b.arrays.rms[j]];
      this.rows.push([name, rms, otherRms, rms / otherRms, a.arrays.update_ratio[i], b.arrays.update_ratio[j], a.header.statuses[a.arrays.status[i]], b.header.statuses[b.arrays.status[j]]]);
    }
    this.rows.sort((x, y) => far(y) - far(x));
    say(this.tableTitle, `Parameters, the most different first (steps ${whole(a.header.step)} and ${whole(b.header.step)})`);
    const shown = this.rows.slice(0, MOST).map((row) =>
      h("tr", { class: row[0] === now().parameter ? "current" : "" }, h("th", { scope: "row" }, h("button", { class: "link", type: "button", onclick: () => go({ parameter: String(row[0]) }) }, row[0])), row.slice(1, 6).map((value, i) => h("td", { class: "number" }, i === 2 ? `× ${number(Number(value))}` : number(Number(value)))), row.slice(6).map((word) => h("td", {}, h("span", { class: `status ${word}` }, word)))),
    );
    fill(this.body, ...shown, this.rows.length > MOST ? h("tr", {}, h("td", { colSpan: 8, class: "faint" }, `and ${whole(this.rows.length - MOST)} more: in the CSV`)) : null);
  }

  export() {
    saveCsv(`${now().run}-against-${now().other}.csv`, ["parameter", "rms", "rms_other", "ratio", "update_ratio", "update_ratio_other", "status", "status_other"], this.rows);
  }

  retheme() {
    for (const chart of [this.loss, ...Object.values(this.charts)]) chart.draw();
  }
}

/** @param {(string | number)[]} row */
function far(row) {
  const distance = Math.abs(Math.log(Number(row[3])));
  return Number.isNaN(distance) ? -1 : distance;
}

/**
 * A line's values at all of these steps: where it has none, and is between two of its own, a value between theirs.
 * @param {Float64Array} steps @param {ArrayLike<number>} own @param {ArrayLike<number>} values
 */
function filled(steps, own, values) {
  const result = new Float64Array(steps.length).fill(NaN);
  let j = 0;
  for (let i = 0; i < steps.length; i++) {
    while (j < own.length && own[j] < steps[i]) j++;
    if (j >= own.length) break;
    if (own[j] === steps[i]) result[i] = values[j];
    else if (j > 0) result[i] = values[j - 1] + ((values[j] - values[j - 1]) * (steps[i] - own[j - 1])) / (own[j] - own[j - 1]);
  }
  return result;
}
