// The list of runs, however many.

import { fill, h, settled } from "./dom.js";
import { moment, whole } from "./format.js";
import { go, now } from "./state.js";

/**
 * @typedef {object} RunLine
 * @property {string} name
 * @property {string | null} version
 * @property {[number, number] | null} [steps]
 * @property {number} [parameters]
 * @property {Record<string, number>} [findings]
 * @property {boolean} [live]
 * @property {number | null} [created]
 * @property {string} [error]
 */

export class RunList {
  constructor() {
    this.filter = h("input", { type: "search", placeholder: "filter runs", "aria-label": "filter runs", spellcheck: false, oninput: settled(() => this.draw(), 80) });
    this.list = h("ul", { class: "runs" });
    this.note = h("p", { class: "faint" });
    this.element = h("nav", { class: "sidebar", "aria-label": "runs" }, h("h2", {}, "Runs"), this.filter, this.list, this.note);
    /** @type {RunLine[]} */
    this.runs = [];
    this.drawn = "";
  }

  /** @param {RunLine[]} runs @param {boolean} all whether the search saw everything */
  set(runs, all) {
    this.runs = runs;
    this.note.textContent = all ? "" : "There is more under the log directory than the search looks through: start TensorBoard nearer to the runs.";
    this.draw();
  }

  draw() {
    const word = this.filter.value.toLowerCase();
    const shown = this.runs.filter((run) => run.name.toLowerCase().includes(word));
    const key = JSON.stringify([shown, now().run]);
    if (key === this.drawn) return;
    this.drawn = key;
    const focused = /** @type {HTMLElement | null} */ (document.activeElement)?.dataset?.run;
    fill(this.list, ...shown.map((run) => this.line(run)));
    this.element.hidden = this.runs.length === 0;
    this.filter.hidden = this.runs.length < 6;
    if (focused !== undefined) /** @type {HTMLElement | null} */ (this.list.querySelector(`[data-run="${CSS.escape(focused)}"]`))?.focus();
  }

  /** @param {RunLine} run */
  line(run) {
    const { error = 0, warning = 0 } = run.findings ?? {};
    const current = run.name === now().run;
    const count = run.steps ? run.steps[1] - run.steps[0] + 1 : 0;
    const steps = run.steps === undefined ? "…" : count ? `${whole(count)} step${count === 1 ? "" : "s"}` : "no step yet";
    const facts = run.error ? "does not read" : steps;
    return h(
      "li",
      {},
      h(
        "button",
        {
          type: "button", class: "run", "data-run": run.name, "aria-current": current ? "page" : null, title: [run.name, run.error ?? "", moment(run.created ?? null)].filter(Boolean).join("\n"),
          onclick: () => go({ run: run.name, step: "", from: "", to: "", parameter: now().view === "parameter" || now().view === "compare" ? now().parameter : "" }),
        },
        h("span", { class: "run-name" }, run.name === "." ? "(the log directory)" : run.name),
        h("span", { class: "faint" }, facts),
        run.live ? h("span", { class: "live", title: "being written now" }, "live") : null,
        run.error ? h("span", { class: "badge error" }, "!") : null,
        error ? h("span", { class: "badge error", title: `${error} errors` }, error) : null,
        warning ? h("span", { class: "badge warning", title: `${warning} warnings` }, warning) : null,
      ),
    );
  }
}
