// All parameters at one step: searched, sorted, and only the rows in view are in the page, so that 10,000 scroll smoothly.

import { numbers } from "./api.js";
import { LINES, theme } from "./colour.js";
import { fill, framed, h, say, settled, sized } from "./dom.js";
import { number, percent, shape, whole } from "./format.js";
import { spark } from "./map.js";
import { saveCsv } from "./save.js";
import { go, now } from "./state.js";

/** @typedef {import("./state.js").State} State */
/** @typedef {import("./index.js").Info} Info */
/** @typedef {{name: string, label: string, help: string, wide: number, tell?: (value: number) => string}} Column */

const HEIGHT = 28;

/** @type {Column[]} */
const COLUMNS = [
  { name: "parameter", label: "parameter", help: "in model order", wide: 260 },
  { name: "status", label: "status", help: "why it has no or zero partials, else ok", wide: 84 },
  { name: "numel", label: "weights", help: "entries", wide: 84, tell: whole },
  { name: "shares", label: "increase · hold · decrease", help: "which way its weights should move to lower the loss; sorted by increase minus decrease", wide: 190 },
  { name: "spark", label: "rms over steps", help: "on a logarithmic scale, each row for itself; sorted by the change", wide: 130 },
  { name: "rms", label: "rms", help: "root mean square of its partials", wide: 84, tell: number },
  { name: "abs_max", label: "largest", help: "largest |partial|", wide: 84, tell: number },
  { name: "update_ratio", label: "|dw|/|w|", help: "how far the step moved it, against its size", wide: 84, tell: number },
  { name: "cosine", label: "cosine", help: "with the last observed gradient", wide: 74, tell: number },
  { name: "flip_share", label: "flips", help: "share of partials whose sign changed", wide: 70, tell: percent },
  { name: "against_share", label: "against", help: "share of weights that moved against their own gradient", wide: 74, tell: percent },
  { name: "loss_change", label: "loss change", help: "first-order change of the loss by its update", wide: 96, tell: number },
  { name: "weight_l2", label: "|w|", help: "Euclidean norm of the weights", wide: 78, tell: number },
  { name: "ill", label: "not finite", help: "partials that are NaN or infinite", wide: 84, tell: whole },
];

const SPARK = COLUMNS.findIndex((column) => column.name === "spark");

export class ParameterTable {
  constructor() {
    const changed = settled(() => go({ search: this.search.value, regex: this.regex.checked ? "1" : "" }, true), 120);
    this.search = h("input", { type: "search", id: "search", placeholder: "search parameters", "aria-label": "search parameters", spellcheck: false, oninput: changed });
    this.regex = h("input", { type: "checkbox", onchange: changed });
    this.found = h("span", { class: "faint", role: "status" });
    this.wrong = h("span", { class: "wrong", role: "alert" });
    this.stepBox = h("input", { type: "number", min: "0", "aria-label": "step", placeholder: "last", onchange: () => go({ step: this.stepBox.value }) });
    this.at = h("span", { class: "faint" });
    this.heads = COLUMNS.map((column) =>
      h("th", { scope: "col", "aria-sort": "none", class: column.tell ? "number" : "" }, h("button", { type: "button", title: column.help, onclick: () => this.sortBy(column.name) }, column.label, h("span", { class: "arrow", "aria-hidden": "true" }))),
    );
    this.before = h("tr", { class: "spacer", "aria-hidden": "true" }, h("td", { colSpan: COLUMNS.length }));
    this.after = h("tr", { class: "spacer", "aria-hidden": "true" }, h("td", { colSpan: COLUMNS.length }));
    this.body = h("tbody", { onclick: (/** @type {MouseEvent} */ event) => this.click(event) });
    this.table = h("table", { class: "parameters", "aria-label": "parameters" }, h("colgroup", {}, COLUMNS.map((column) => h("col", { style: { width: `${column.wide}px` } }))), h("thead", {}, h("tr", {}, this.heads)), this.body);
    this.scroller = h("div", { class: "table-scroll", tabIndex: 0, role: "region", "aria-label": "parameters, arrow keys move, Enter opens", onscroll: framed(() => this.draw()), onkeydown: (/** @type {KeyboardEvent} */ event) => this.key(event) }, this.table);
    this.element = h(
      "section",
      { class: "card table-page", "aria-label": "parameter table" },
      h(
        "div",
        { class: "toolbar" }, this.search, h("label", {}, this.regex, "regex"), this.found, this.wrong, h("span", { class: "push" }),
        h("label", {}, "step ", this.stepBox), this.at, h("button", { type: "button", onclick: () => this.export() }, "CSV"),
      ),
      this.scroller,
    );
    new ResizeObserver(framed(() => this.draw())).observe(this.scroller);
    /** @type {number[]} places of parameters, as they are shown */
    this.order = [];
    this.cursor = 0;
    this.drawn = "";
    /** @type {Map<number, HTMLTableRowElement>} rows in the page, by place */
    this.made = new Map();
    /** @type {Set<HTMLTableRowElement>} rows whose sparkline is to be drawn */
    this.lines = new Set();
    this.drawLines = framed(() => this.someLines());
    this.drawLinesSoon = settled(() => this.someLines(), 80); // whoever scrolls by whole pages looks at none of them
    /** @type {Map<number, number>} */
    this.rowOf = new Map();
    this.asking = 0;
  }

  /** @param {State} state @param {Info} info @param {string} stage */
  async show(state, info, stage) {
    this.info = info;
    if (document.activeElement !== this.search) this.search.value = state.search;
    this.regex.checked = state.regex === "1";
    if (document.activeElement !== this.stepBox) this.stepBox.value = state.step;
    const asking = ++this.asking;
    if (this.table_ && this.key_ === `${state.run} ${state.step} ${stage} ${info.version}`) return this.arrange(state);
    this.key_ = `${state.run} ${state.step} ${stage} ${info.version}`;
    const answer = await numbers("table", { run: state.run, step: state.step, stage });
    if (asking !== this.asking) return;
    this.table_ = answer;
    this.rowOf = new Map(Array.from(answer.arrays.row, (place, i) => [place, i]));
    this.at.textContent = `showing step ${whole(answer.header.step)}, stage ${answer.header.stage}`;
    this.arrange(state);
    const map = await numbers("map", { run: state.run, quantity: "rms", stage });
    if (asking !== this.asking) return;
    this.sparks = map.header.rows === info.names.length ? map : null;
    this.draw(true);
    if (!map.header.complete) setTimeout(() => asking === this.asking && (this.key_ = "") === "" && this.show(now(), info, stage), 300);
  }

  /** A number of a row that a column sorts by. @param {string} column @param {number} place */
  value(column, place) {
    const arrays = /** @type {import("./api.js").Answer} */ (this.table_).arrays;
    const row = this.rowOf.get(place);
    if (row === undefined) return NaN;
    if (column === "shares") return arrays.increase_share[row] - arrays.decrease_share[row];
    if (column === "ill") return arrays.nan[row] + arrays.inf[row];
    if (column === "status") return arrays.status[row];
    if (column === "spark") {
      const line = this.sparks ? spark(this.sparks, place, 60).filter((each) => each !== null) : [];
      return line.length ? Number(line[line.length - 1]) - Number(line[0]) : NaN;
    }
    return arrays[column]?.[row] ?? place;
  }

  /** @param {State} state */
  arrange(state) {
    const names = /** @type {Info} */ (this.info).names;
    const fits = matcher(state.search, state.regex === "1", (error) => say(this.wrong, error));
    const places = names.map((_, i) => i).filter((i) => fits(names[i]));
    const falling = state.sort.startsWith("-");
    const column = state.sort.replace(/^-/, "");
    if (column === "parameter") places.sort((a, b) => (names[a] < names[b] ? -1 : 1) * (falling ? -1 : 1));
    else if (column && this.table_) {
      const of = new Map(places.map((place) => [place, this.value(column, place)]));
      places.sort((a, b) => compared(of.get(a) ?? NaN, of.get(b) ?? NaN, falling) || a - b);
    }
    this.order = places;
    this.heads.forEach((head, i) => {
      const sorted = COLUMNS[i].name === column;
      head.setAttribute("aria-sort", sorted ? (falling ? "descending" : "ascending") : "none");
      say(/** @type {Element} */ (head.querySelector(".arrow")), sorted ? (falling ? " ↓" : " ↑") : "");
    });
    say(this.found, `${whole(places.length)} of ${whole(names.length)}`);
    this.table.setAttribute("aria-rowcount", String(places.length + 1));
    const chosen = places.indexOf(names.indexOf(state.parameter));
    if (chosen >= 0) this.cursor = chosen;
    this.cursor = Math.min(this.cursor, Math.max(places.length - 1, 0));
    this.draw(true);
  }

  /** @param {string} name */
  sortBy(name) {
    const { sort } = now();
    const first = name === "parameter" ? name : `-${name}`;
    const second = name === "parameter" ? `-${name}` : name;
    go({ sort: sort === first ? second : sort === second ? "" : first }, true);
  }

  /** Rows that stay in view stay; those that left are written again for what came. @param {boolean} [all] write all rows again */
  draw(all = false) {
    if (!this.table_) return;
    const height = this.scroller.clientHeight || 600;
    const first = Math.max(Math.floor(this.scroller.scrollTop / HEIGHT) - 8, 0);
    const last = Math.min(first + Math.ceil(height / HEIGHT) + 16, this.order.length);
    const key = `${first} ${last}`;
    if (!all && key === this.drawn) return;
    this.drawn = key;
    const shown = this.order.slice(first, last);
    const wanted = new Set(shown);
    const free = [...this.made].filter(([place]) => !wanted.has(place)).map(([, row]) => row);
    const staying = free.length < this.made.size;
    if (staying) for (const row of free) row.remove(); // else they are written where they stand
    if (this.before.parentNode !== this.body) fill(this.body, this.before, ...this.made.values(), this.after);
    /** @type {Map<number, HTMLTableRowElement>} */
    const made = new Map();
    let at = this.before.nextSibling;
    shown.forEach((place, i) => {
      const old = this.made.get(place);
      const row = old ?? free.shift() ?? blank();
      if (!old || all) this.write(row, place, first + i);
      if (row === at) at = at.nextSibling;
      else this.body.insertBefore(row, at);
      made.set(place, row);
    });
    for (const row of free) row.remove();
    this.made = made;
    if (staying || all) this.drawLines();
    else this.drawLinesSoon();
    this.before.style.height = `${first * HEIGHT}px`;
    this.after.style.height = `${(this.order.length - last) * HEIGHT}px`;
    if (!this.order.length) fill(this.body, h("tr", {}, h("td", { colSpan: COLUMNS.length, class: "none" }, "No parameter fits. Clear the search, or switch regex off.")));
  }

  /** @param {HTMLTableRowElement} row @param {number} place @param {number} i */
  write(row, place, i) {
    const info = /** @type {Info} */ (this.info);
    const name = info.names[place];
    const { arrays, header } = /** @type {import("./api.js").Answer} */ (this.table_);
    const from = this.rowOf.get(place);
    row.setAttribute("aria-rowindex", String(i + 2));
    row.dataset.place = String(place);
    row.className = i === this.cursor ? "current" : "";
    COLUMNS.forEach((column, c) => {
      const cell = /** @type {HTMLTableCellElement} */ (row.children[c]);
      const inside = /** @type {HTMLElement} */ (cell.firstElementChild);
      if (column.name === "parameter") {
        cell.title = `${name}, ${shape(info.shapes[name] ?? [])}`;
        inside.dataset.name = name;
        say(inside, name);
      } else if (column.name === "status") {
        const word = from === undefined ? "–" : header.statuses[arrays.status[from]];
        inside.className = `status ${word}`;
        say(inside, word);
      } else if (column.name === "shares") {
        if (from === undefined) split(inside, NaN, NaN, NaN);
        else split(inside, arrays.increase_share[from], arrays.hold_share[from], arrays.decrease_share[from]);
      } else if (column.name === "spark") {
        inside.style.visibility = "hidden"; // until its line is drawn
        this.lines.add(row);
      }
      else say(cell, from === undefined ? "–" : /** @type {any} */ (column.tell)(this.value(column.name, place)));
    });
  }

  /** Some sparklines in each frame, so that scrolling does not wait for them. */
  someLines() {
    let left = 12;
    for (const row of this.lines) {
      if (!left--) return this.drawLines();
      this.lines.delete(row);
      const place = Number(row.dataset.place);
      if (this.made.get(place) !== row) continue;
      const canvas = /** @type {HTMLCanvasElement} */ (row.children[SPARK].firstElementChild);
      canvas.style.visibility = "";
      sparkline(canvas, this.sparks && this.rowOf.has(place) ? spark(this.sparks, place, 60) : []);
    }
  }

  /** @param {MouseEvent} event */
  click(event) {
    const row = /** @type {Element} */ (event.target).closest("tr[data-place]");
    if (!row) return;
    event.preventDefault();
    this.open(Number(/** @type {HTMLElement} */ (row).dataset.place));
  }

  /** @param {number} place */
  open(place) {
    go({ view: "parameter", parameter: /** @type {Info} */ (this.info).names[place] });
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    const page = Math.max(Math.floor(this.scroller.clientHeight / HEIGHT) - 2, 1);
    /** @type {Record<string, number>} */
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 };
    if (event.key === "Enter" && this.order.length && event.target === this.scroller) return this.open(this.order[this.cursor]);
    if (!(event.key in moves) || event.target !== this.scroller) return;
    event.preventDefault();
    this.cursor = Math.min(Math.max(this.cursor + moves[event.key], 0), this.order.length - 1);
    const [y, top] = [this.cursor * HEIGHT, this.scroller.scrollTop];
    const view = this.scroller.clientHeight - 2 * HEIGHT;
    if (y < top) this.scroller.scrollTop = y;
    else if (y > top + view) this.scroller.scrollTop = y - view;
    this.draw(true);
  }

  export() {
    if (!this.table_) return;
    const { header, arrays } = this.table_;
    const info = /** @type {Info} */ (this.info);
    const columns = ["step", "stage", "parameter", "shape", "status", ...header.columns];
    const rows = this.order.filter((place) => this.rowOf.has(place)).map((place) => {
      const row = /** @type {number} */ (this.rowOf.get(place));
      const name = info.names[place];
      return [header.step, header.stage, name, (info.shapes[name] ?? []).join("x"), header.statuses[arrays.status[row]], ...header.columns.map((/** @type {string} */ column) => arrays[column][row])];
    });
    saveCsv(`${now().run}-step-${header.step}.csv`, columns, rows);
  }

  retheme() {
    this.draw(true);
  }
}

/** Numbers before what is none. @param {number} a @param {number} b @param {boolean} falling */
function compared(a, b, falling) {
  if (Number.isNaN(a) || Number.isNaN(b)) return Number(Number.isNaN(a)) - Number(Number.isNaN(b));
  return falling ? b - a : a - b;
}

/**
 * @param {string} search @param {boolean} regex @param {(error: string) => void} wrong
 * @returns {(name: string) => boolean}
 */
export function matcher(search, regex, wrong) {
  wrong("");
  if (!search) return () => true;
  if (regex) {
    try {
      const pattern = new RegExp(search, "i");
      return (name) => pattern.test(name);
    } catch (error) {
      wrong(`not a regular expression: ${/** @type {Error} */ (error).message}`);
      return () => true;
    }
  }
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  return (name) => words.every((word) => name.toLowerCase().includes(word));
}

/** A row without content. */
function blank() {
  const cells = COLUMNS.map((column) => {
    if (column.name === "parameter") return h("th", { scope: "row" }, h("a", { href: "#", tabIndex: -1 }));
    if (column.name === "status") return h("td", {}, h("span", {}));
    if (column.name === "shares") return h("td", {}, bar(NaN, NaN, NaN));
    if (column.name === "spark") return h("td", {}, h("canvas", { class: "spark", "aria-hidden": "true" }));
    return h("td", { class: "number" });
  });
  return h("tr", {}, cells);
}

/** @param {number} increase @param {number} hold @param {number} decrease */
function bar(increase, hold, decrease) {
  const element = h("span", { class: "split", role: "img" }, h("span", { class: "increase" }), h("span", { class: "hold" }), h("span", { class: "decrease" }));
  split(element, increase, hold, decrease);
  return element;
}

/** @param {HTMLElement} element a bar @param {number} increase @param {number} hold @param {number} decrease */
function split(element, increase, hold, decrease) {
  const none = !Number.isFinite(increase);
  const label = none ? "no gradient" : `${percent(increase)} increase, ${percent(hold)} hold, ${percent(decrease)} decrease`;
  element.setAttribute("aria-label", label);
  element.title = label;
  [increase, hold, decrease].forEach((share, i) => {
    const part = /** @type {HTMLElement} */ (element.children[i]);
    part.style.flexGrow = none ? "0" : String(share);
  });
}

/** @param {HTMLCanvasElement} canvas @param {(number | null)[]} line */
function sparkline(canvas, line) {
  const context = sized(canvas, 116, 20);
  context.clearRect(0, 0, 116, 20);
  const there = /** @type {number[]} */ (line.filter((each) => each !== null));
  if (!there.length) return;
  const [low, high] = [Math.min(...there), Math.max(...there)];
  const span = Math.max(high - low, 50);
  context.strokeStyle = LINES[theme()].blue;
  context.lineWidth = 1.2;
  context.beginPath();
  let open = false;
  line.forEach((value, i) => {
    if (value === null) {
      open = false;
      return;
    }
    const x = 2 + (112 * i) / Math.max(line.length - 1, 1);
    const y = 18 - (16 * (value - (low + high - span) / 2)) / span;
    if (open) context.lineTo(x, y);
    else context.moveTo(x, y);
    open = true;
  });
  context.stroke();
}
