// The first page: what is wrong in words, the loss, the map, the findings. A click moves everything.

import { ask, numbers } from "./api.js";
import { Chart } from "./chart.js";
import { empty, fill, h, hint } from "./dom.js";
import { whole } from "./format.js";
import { LayerMap } from "./map.js";
import { go, now } from "./state.js";

/** @typedef {import("./state.js").State} State */
/** @typedef {import("./index.js").Info} Info */

const QUANTITIES = {
  rms: "size (rms)",
  balance: "increase − decrease",
  update_ratio: "update ratio |dw|/|w|",
  cosine: "cosine with the last",
  agreement: "moved as asked",
};

export class Overview {
  constructor() {
    const gutter = () => (window.innerWidth < 760 ? 110 : 210);
    this.loss = new Chart({
      title: "loss", lines: [{ name: "loss", label: "loss", colour: "blue" }], height: 150, gutter,
      onStep: (step) => go({ step: String(step) }),
      onZoom: (from, to) => go({ from: from === null ? "" : String(Math.max(from, 0)), to: to === null ? "" : String(to) }),
    });
    this.map = new LayerMap({
      gutter,
      onPick: (parameter, from, to) => this.pick(parameter, from, to),
      onOpen: (parameter) => go({ view: "parameter", parameter }),
      onFold: (folds) => go({ fold: [...folds].map(([path, open]) => `${open ? "+" : "-"}${path}`).join("|") }, true),
      onHover: (step) => this.point(step),
    });
    this.verdict = h("p", { class: "verdict" });
    this.facts = h("p", { class: "facts" });
    this.quantity = h("select", { id: "quantity", onchange: () => go({ quantity: this.quantity.value }) }, Object.entries(QUANTITIES).map(([name, label]) => h("option", { value: name }, label)));
    this.chosen = h("div", { class: "chosen", "aria-live": "polite" });
    this.findings = h("ol", { class: "findings", "aria-label": "findings, the worst first" });
    this.count = h("h2", {}, "Findings");
    this.mapError = h("div", {});
    this.element = h(
      "div",
      { class: "overview" },
      h("section", { class: "card diagnosis", "aria-label": "diagnosis" }, h("h2", { class: "sr-only" }, "Diagnosis"), this.verdict, this.facts),
      h(
        "div",
        { class: "columns" },
        h(
          "section",
          { class: "card", "aria-label": "loss and map" },
          this.loss.element,
          h("div", { class: "toolbar" }, h("h2", {}, "Layer by step"), h("label", { for: "quantity" }, "colour"), this.quantity, hint("Rows are parameters in model order, columns are steps. Click a cell to look at that parameter and step everywhere; double-click to open the parameter. Triangles are findings."), this.chosen),
          this.mapError,
          this.map.element,
        ),
        h("section", { class: "card", "aria-label": "findings" }, this.count, this.findings),
      ),
    );
    this.noLoss = h("p", { class: "note" }, "No loss was recorded: add lens.observe(loss=loss) to the loop to see it here.");
    /** @type {string} */
    this.drawnFindings = "";
    this.asking = 0;
  }

  /** @param {number | null} step */
  point(step) {
    const plot = this.loss.plot;
    if (!plot) return;
    plot.setCursor(step === null ? { left: -10, top: -10 } : { left: plot.valToPos(step, "x"), top: 0 });
  }

  /** @param {string} parameter @param {number} from @param {number} to */
  async pick(parameter, from, to) {
    go({ parameter, step: String(from) }, true);
    if (to - from < 2) return;
    const { run, quantity, stage } = now();
    try {
      const { step } = await ask("extreme", { run, parameter, quantity, stage: stage || this.stage, from, to });
      if (now().run === run && now().parameter === parameter) go({ step: String(step) }, true);
    } catch {
      // the column's first step stands
    }
  }

  /** @param {State} state @param {Info} info @param {string} stage */
  async show(state, info, stage) {
    this.stage = stage;
    this.quantity.value = state.quantity in QUANTITIES ? state.quantity : "rms";
    this.words(info);
    this.list(state, info);
    this.map.setNames(info.names, folds(state.fold));
    this.map.setFindings(info.listed);
    this.mark(state, info);
    if (info.steps === null) {
      fill(this.mapError, empty("Nothing was recorded yet", "The map begins with the first step that the lens observes. This page looks again by itself."));
      return;
    }
    const asking = ++this.asking;
    await Promise.all([this.drawLoss(state, asking), this.drawMap(state, stage, asking)]);
  }

  /** @param {State} state @param {Info} info */
  mark(state, info) {
    const step = state.step === "" ? null : Number(state.step);
    const range = state.from === "" || state.to === "" ? null : /** @type {[number, number]} */ ([Number(state.from), Number(state.to)]);
    this.map.select(state.parameter, step, range);
    this.loss.setStep(step, info.listed.map((finding) => ({ step: finding.step, label: finding.rule, severity: finding.severity })));
    fill(
      this.chosen,
      state.parameter ? h("button", { class: "link", type: "button", onclick: () => go({ view: "parameter" }) }, `open ${state.parameter}`) : null,
      step === null ? null : h("span", { class: "faint" }, ` step ${whole(step)}`),
      state.parameter || step !== null ? h("button", { class: "small", type: "button", onclick: () => go({ parameter: "", step: "" }) }, "clear") : null,
      range ? h("button", { class: "small", type: "button", onclick: () => go({ from: "", to: "" }) }, "whole run") : null,
    );
  }

  /** @param {State} state @param {number} asking */
  async drawLoss(state, asking) {
    const answer = await numbers("scalars", { run: state.run, from: state.from, to: state.to, points: 1200 });
    if (asking !== this.asking) return;
    const place = answer.header.names.indexOf("loss");
    const none = place < 0;
    this.loss.element.hidden = none;
    if (none) {
      this.loss.element.before(this.noLoss);
      return;
    }
    this.noLoss.remove();
    const extent = this.extent(state);
    this.loss.setZoom(extent[0], extent[1]);
    this.loss.set([/** @type {any} */ (answer.arrays[`${place}.step`]), /** @type {any} */ (answer.arrays[`${place}.value`])]);
  }

  /** The steps that loss and map both show. @param {State} state @returns {[number, number] | [null, null]} */
  extent(state) {
    if (state.from !== "" && state.to !== "") return [Number(state.from), Number(state.to)];
    const header = this.map.answer?.header;
    if (!header || !header.columns) return [null, null];
    return [header.first_step - 0.5, header.first_step + header.columns * header.width - 0.5];
  }

  /** @param {State} state @param {string} stage @param {number} asking */
  async drawMap(state, stage, asking) {
    for (let again = 0; ; again = 1) {
      const answer = await numbers("map", { run: state.run, quantity: state.quantity in QUANTITIES ? state.quantity : "rms", stage, again: again || null });
      if (asking !== this.asking) return;
      fill(this.mapError);
      this.map.setAnswer(answer);
      const extent = this.extent(state);
      this.loss.setZoom(extent[0], extent[1]);
      if (answer.header.complete) return;
    }
  }

  /** @param {Info} info */
  words(info) {
    const { diagnosis } = info;
    if (this.verdict.textContent !== diagnosis.verdict) this.verdict.textContent = diagnosis.verdict;
    const worst = info.findings.error ? "error" : info.findings.warning || diagnosis.ill ? "warning" : "fine";
    this.verdict.dataset.severity = worst;
    const share = typeof diagnosis.confidence === "number" ? diagnosis.confidence : NaN;
    const sure = share > 0.99 ? "over 99" : String(Math.round(100 * share)); // no cause is called certain
    const facts = [
      diagnosis.origin && !Number.isNaN(share) ? `this cause is ${sure} % sure` : "",
      info.steps === null ? "no step yet" : `steps ${whole(info.steps[0])} to ${whole(info.steps[1])}`,
      `${whole(info.parameters)} parameters`,
      info.ranks.length > 1 ? `${info.ranks.length} ranks, pooled` : "",
      info.live ? "being written now" : "",
      ...info.notes,
    ];
    this.facts.textContent = facts.filter(Boolean).join(" · ");
  }

  /** @param {State} state @param {Info} info */
  list(state, info) {
    const key = JSON.stringify([info.listed, info.diagnosis, state.parameter, state.step]);
    if (key === this.drawnFindings) return;
    this.drawnFindings = key;
    const { error, warning } = info.findings;
    this.count.textContent = `Findings: ${error} error${error === 1 ? "" : "s"}, ${warning} warning${warning === 1 ? "" : "s"}, ${info.findings.info} info`;
    const follows = info.diagnosis.follows ?? 0;
    const items = info.listed.slice(0, 200).map((finding, i) => {
      const kind = info.diagnosis.origin && i === 0 ? "origin" : info.diagnosis.origin && i <= follows ? "follows from it" : "";
      return item(finding, kind, state);
    });
    const hidden = info.listed.length - items.length + info.unlisted;
    fill(this.findings, ...items, hidden ? h("li", { class: "faint" }, `and ${hidden} more`) : null, items.length ? null : h("li", { class: "faint" }, "Nothing was found. Rules speak once they have seen enough steps."));
  }

  retheme() {
    this.loss.draw();
    this.map.retheme();
  }
}

/** @param {any} finding @param {string} kind @param {State} state */
function item(finding, kind, state) {
  const where = finding.parameter ?? (finding.parameters.length ? `${finding.parameters.length} parameters` : "the whole model");
  const first = finding.parameter ?? finding.parameters[0] ?? "";
  const open = () => go({ step: String(finding.step), parameter: first }); // none of one about the whole model: no row is marked
  const current = state.step === String(finding.step) && state.parameter === first;
  return h(
    "li",
    { class: `finding ${finding.severity}`, "data-current": current ? "yes" : null },
    h(
      "button",
      { type: "button", class: "finding-head", onclick: open, "aria-current": current ? "true" : null },
      h("span", { class: `badge ${finding.severity}` }, finding.severity), h("b", {}, finding.rule), kind ? h("span", { class: "kind" }, kind) : null,
      h("span", { class: "where" }, where), h("span", { class: "faint" }, `step ${whole(finding.step)}`),
    ),
    h("p", {}, finding.seen),
    finding.remedy || finding.causes.length
      ? h("details", { open: kind === "origin" }, h("summary", {}, "causes, and what to do"), finding.causes.length ? h("ul", {}, finding.causes.map((/** @type {string} */ cause) => h("li", {}, cause))) : null, finding.remedy ? h("p", {}, h("b", {}, "Do: "), finding.remedy) : null)
      : null,
  );
}

/** @param {string} text @returns {Map<string, boolean>} */
export function folds(text) {
  return new Map(text.split("|").filter(Boolean).map((each) => [each.slice(1), each[0] === "+"]));
}
