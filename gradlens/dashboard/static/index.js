// The tab: what is looked at (state.js) decides what is drawn; what a run has grown by is drawn without building anything again.

import { Refusal, ask } from "./api.js";
import { Compare } from "./compare.js";
import { empty, fill, h, say } from "./dom.js";
import { whole } from "./format.js";
import { Overview } from "./overview.js";
import { ParameterPage } from "./parameter.js";
import { RunList } from "./runs.js";
import { followTheme, go, now, onChange, start } from "./state.js";
import { ParameterTable } from "./table.js";

/**
 * @typedef {object} Info what is known of a run
 * @property {string} version
 * @property {string[]} names
 * @property {[number, number] | null} steps
 * @property {number} parameters
 * @property {Record<string, number>} findings
 * @property {any[]} listed
 * @property {number} unlisted
 * @property {{verdict: string, confidence?: number | string, origin?: boolean, follows?: number, ill?: boolean}} diagnosis
 * @property {string[]} stages
 * @property {Record<string, number[]>} shapes
 * @property {Record<string, string>} dtypes
 * @property {number[]} ranks
 * @property {boolean} live
 * @property {string[]} notes
 * @property {Record<string, number[]>} [kept] steps of whole partials, by parameter
 */

const VIEWS = { overview: "Overview", table: "Parameters", parameter: "Parameter", compare: "Compare" };
const POLL = 2500; // milliseconds between questions whether a run has grown
const RUNS = 10_000; // between questions which runs there are

/** What TensorBoard calls. */
export function render() {
  document.documentElement.lang = "en";
  document.title = "GradLens";
  document.head.append(...["vendor/uplot/uPlot.min.css", "style.css"].map((file) => h("link", { rel: "stylesheet", href: new URL(file, import.meta.url).href })));
  const app = new App();
  document.body.append(app.element);
  app.begin();
}

class App {
  constructor() {
    /** @type {Record<string, any>} */
    this.views = { overview: new Overview(), table: new ParameterTable(), parameter: new ParameterPage(), compare: new Compare() };
    this.list = new RunList();
    this.tabs = Object.entries(VIEWS).map(([name, label], i) => h("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "view", "data-view": name, title: `${label}: ${i + 1}`, onclick: () => go({ view: name }) }, label));
    this.stage = h("select", { id: "stage", title: "which gradient was read", onchange: () => go({ stage: this.stage.value }) });
    this.status = h("span", { class: "status-line", role: "status" });
    this.problem = h("div", { class: "problem", role: "alert", hidden: true });
    this.main = h("main", { id: "view", role: "tabpanel", tabIndex: -1 });
    this.help = this.helpDialog();
    this.element = h(
      "div",
      { class: "app" },
      this.list.element,
      h(
        "div",
        { class: "page" },
        h("header", { class: "bar" }, h("h1", { class: "run-title" }), h("div", { role: "tablist", "aria-label": "views", class: "tabs", onkeydown: (/** @type {KeyboardEvent} */ event) => this.tabKey(event) }, this.tabs), h("span", { class: "push" }), this.status, h("label", { for: "stage" }, "stage"), this.stage, h("button", { type: "button", title: "keys: ?", "aria-label": "keyboard help", onclick: () => this.help.showModal() }, "?")),
        this.problem,
        this.main,
      ),
      this.help,
    );
    /** @type {Info | null} */
    this.info = null;
    this.infoRun = "";
    this.asking = 0;
    this.took = 0;
  }

  begin() {
    followTheme(() => {
      for (const view of Object.values(this.views)) if (view.element.isConnected) view.retheme();
    });
    if (window.parent !== window && document.hasFocus() === false) window.focus(); // keys are ours once the tab is opened
    start();
    onChange((state, before) => this.changed(state, before));
    document.addEventListener("keydown", (event) => this.key(event));
    document.addEventListener("visibilitychange", () => document.hidden || this.poll());
    this.loadRuns().then(() => this.draw());
    this.later(() => this.poll(), POLL);
    setInterval(() => document.hidden || this.loadRuns(), RUNS);
  }

  /** @param {() => Promise<void>} call @param {number} milliseconds */
  later(call, milliseconds) {
    setTimeout(async () => {
      await call();
      this.later(call, Math.max(POLL, 20 * this.took));
    }, milliseconds);
  }

  async loadRuns() {
    try {
      const answer = await ask("runs");
      this.runs = answer.runs;
      this.list.set(answer.runs, answer.all);
      if (!answer.runs.length) return this.noRuns(answer.logdir);
      const { run } = now();
      if (!run) go({ run: newest(answer.runs) }, true);
      if (!answer.complete) setTimeout(() => this.loadRuns(), 300);
    } catch (error) {
      this.fail(error);
    }
  }

  /** @param {string} logdir */
  noRuns(logdir) {
    this.info = null;
    fill(
      this.main,
      empty(
        "There is no run here yet",
        `TensorBoard looks in ${logdir}. Record a training into it:`,
        h("code", { class: "block" }, 'lens = gradlens.watch(model, optimizer, run="' + (logdir.replace(/\/$/, "") || "runs") + '/first")'),
        "This page looks again by itself.",
      ),
    );
  }

  /** @param {import("./state.js").State} state @param {import("./state.js").State} before */
  changed(state, before) {
    if (state.run !== before.run) this.list.draw();
    this.draw();
    if (state.view !== before.view) this.main.scrollIntoView({ block: "start" });
  }

  /** Draws what the state says; what was asked for an older state is dropped. */
  async draw() {
    const state = now();
    const asking = ++this.asking;
    this.tabs.forEach((tab) => {
      const current = tab.dataset.view === state.view;
      tab.setAttribute("aria-selected", String(current));
      tab.tabIndex = current ? 0 : -1;
    });
    say(/** @type {Element} */ (this.element.querySelector(".run-title")), state.run === "." ? "(the log directory)" : state.run || "GradLens");
    this.main.setAttribute("aria-labelledby", `tab-${state.view in VIEWS ? state.view : "overview"}`);
    if (!state.run || !this.runs?.length) return;
    const begin = performance.now();
    try {
      if (this.infoRun !== state.run || !this.info) {
        this.info = null;
        this.main.setAttribute("aria-busy", "true");
        const info = await ask("run", { run: state.run });
        if (asking !== this.asking) return;
        this.info = info;
        this.infoRun = state.run;
      }
      const info = /** @type {Info} */ (this.info);
      this.stages(state, info);
      const view = this.views[state.view] ?? this.views.overview;
      if (view.element.parentElement !== this.main) fill(this.main, view.element);
      await view.show(state, info, this.stageOf(state, info), this.runs ?? []);
      if (asking !== this.asking) return;
      this.problem.hidden = true;
      say(this.status, info.live ? `live, step ${whole(info.steps?.[1])}` : "");
      this.status.classList.toggle("live", info.live);
    } catch (error) {
      if (asking === this.asking) this.fail(error);
    } finally {
      if (asking === this.asking) this.main.removeAttribute("aria-busy");
      this.took = performance.now() - begin;
    }
  }

  /** @param {unknown} error */
  fail(error) {
    const text = error instanceof Refusal ? error.message : `The page failed: ${error}`;
    if (!(error instanceof Refusal)) console.error(error);
    fill(this.problem, h("b", {}, "This cannot be shown. "), text, " ", h("button", { class: "small", type: "button", onclick: () => this.retry() }, "try again"));
    this.problem.hidden = false;
    if (!this.info) fill(this.main);
  }

  retry() {
    this.infoRun = "";
    this.draw();
  }

  /** @param {import("./state.js").State} state @param {Info} info */
  stageOf(state, info) {
    return info.stages.includes(state.stage) ? state.stage : (info.stages[info.stages.length - 1] ?? "used");
  }

  /** @param {import("./state.js").State} state @param {Info} info */
  stages(state, info) {
    const key = info.stages.join(" ");
    if (this.stage.dataset.of !== key) fill(this.stage, ...info.stages.map((stage) => h("option", { value: stage }, stage)));
    this.stage.dataset.of = key;
    this.stage.value = this.stageOf(state, info);
    this.stage.disabled = info.stages.length < 2;
  }

  /** Whether the run has grown; then its new numbers are drawn in place. */
  async poll() {
    const { run } = now();
    if (document.hidden || !run || !this.element.offsetWidth) return;
    try {
      const { version } = await ask("version", { run });
      if (run !== now().run || (this.info && version === this.info.version)) return;
      const info = await ask("run", { run });
      if (run !== now().run) return;
      this.info = info;
      this.infoRun = run;
      await this.draw();
    } catch (error) {
      this.fail(error);
    }
  }

  /** @param {KeyboardEvent} event */
  tabKey(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const names = Object.keys(VIEWS);
    const next = names[(names.indexOf(now().view) + by + names.length) % names.length];
    go({ view: next });
    this.tabs.find((tab) => tab.dataset.view === next)?.focus();
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    const target = /** @type {HTMLElement} */ (event.target);
    if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT", "TEXTAREA"].includes(target.tagName)) return;
    /** @type {Record<string, () => void>} */
    const keys = {
      1: () => go({ view: "overview" }), 2: () => go({ view: "table" }), 3: () => go({ view: "parameter" }), 4: () => go({ view: "compare" }),
      "/": () => {
        go({ view: "table" });
        setTimeout(() => this.views.table.search.focus(), 0);
      },
      "[": () => this.views.parameter.move(-1), "]": () => this.views.parameter.move(1),
      "?": () => this.help.showModal(),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }

  helpDialog() {
    const keys = [["1 2 3 4", "the views"], ["/", "search parameters"], ["[ ]", "previous and next parameter"], ["arrows, Enter", "move and choose, in the map and the table"], ["space", "fold a module of the map"], ["o", "open the parameter under the map's cursor"], ["?", "this list"]];
    return h("dialog", { class: "help", "aria-label": "keys" }, h("h2", {}, "Keys"), h("dl", {}, keys.flatMap(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)])), h("form", { method: "dialog" }, h("button", {}, "close")));
  }
}

/** @param {import("./runs.js").RunLine[]} runs */
function newest(runs) {
  return runs.reduce((a, b) => ((b.created ?? 0) > (a.created ?? 0) ? b : a)).name;
}
