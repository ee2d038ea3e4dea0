// What is looked at, kept in the URL: a link restores the view, and the browser's back button works.

/**
 * @typedef {object} State
 * @property {string} view overview, table, parameter or compare
 * @property {string} run
 * @property {string} other the run to compare with
 * @property {string} parameter
 * @property {string} step a number, or empty for the last
 * @property {string} stage empty: the last that there is
 * @property {string} quantity of the map
 * @property {string} from of the steps zoomed to
 * @property {string} to
 * @property {string} search
 * @property {string} regex 1 or empty
 * @property {string} sort a column, with a minus before it for falling
 * @property {string} fold paths of modules that were opened or closed by hand
 */

/** @type {State} */
const DEFAULTS = { view: "overview", run: "", other: "", parameter: "", step: "", stage: "", quantity: "rms", from: "", to: "", search: "", regex: "", sort: "", fold: "" };
const PREFIX = "p.gradlens.";
const NAMES = /** @type {(keyof State)[]} */ (Object.keys(DEFAULTS));

/** @type {State} */
let state = { ...DEFAULTS };
/** @type {((state: State, before: State) => void)[]} */
const listeners = [];

/** The window whose address people see: TensorBoard's, around our frame; or ours, when that is another site's. */
const outer = (() => {
  try {
    void window.parent.location.hash;
    return window.parent;
  } catch {
    return window;
  }
})();

/** @returns {State} */
export function now() {
  return state;
}

/** @param {(state: State, before: State) => void} call */
export function onChange(call) {
  listeners.push(call);
}

/**
 * Looks at something else. A new view is a new entry of the browser's history; `quiet` replaces the last one.
 * @param {Partial<State>} change
 * @param {boolean} [quiet]
 */
export function go(change, quiet = false) {
  const next = { ...state, ...change };
  if (NAMES.every((name) => next[name] === state[name])) return;
  const moved = next.view !== state.view || next.run !== state.run || next.parameter !== state.parameter || next.other !== state.other;
  adopt(next);
  write(moved && !quiet);
}

/** @param {State} next */
function adopt(next) {
  const before = state;
  state = next;
  for (const call of listeners) call(state, before);
}

/** @returns {string[]} what else is in the address */
function others() {
  return outer.location.hash.replace(/^#/, "").split("&").filter((part) => part && !part.startsWith(PREFIX));
}

/** @param {boolean} push */
function write(push) {
  const own = NAMES.filter((name) => state[name] !== DEFAULTS[name]).map((name) => `${PREFIX}${name}=${encodeURIComponent(state[name])}`);
  const rest = others();
  const hash = `#${[...(rest.length || outer === window ? rest : ["gradlens"]), ...own].join("&")}`;
  if (hash === outer.location.hash) return;
  const address = outer.location.pathname + outer.location.search + hash;
  if (push) outer.history.pushState(outer.history.state, "", address);
  else outer.history.replaceState(outer.history.state, "", address);
}

/** @returns {State | null} what the address says; null of an address that says nothing of us */
function read() {
  /** @type {Record<string, string>} */
  const found = {};
  for (const part of outer.location.hash.replace(/^#/, "").split("&")) {
    const [name, value = ""] = part.split("=");
    if (!name.startsWith(PREFIX)) continue;
    try {
      found[name.slice(PREFIX.length)] = decodeURIComponent(value);
    } catch {
      // what is not text is left out
    }
  }
  if (!Object.keys(found).length) return null;
  const next = { ...DEFAULTS };
  for (const name of NAMES) if (found[name] !== undefined) next[name] = found[name];
  return next;
}

/** Begins to follow the address. */
export function start() {
  state = read() ?? state;
  const follow = () => {
    const parts = others();
    if (outer !== window && parts.length && parts[0] !== "gradlens") return; // another tab of TensorBoard
    const next = read();
    if (next === null) write(false); // the tab was left and entered again
    else if (NAMES.some((name) => next[name] !== state[name])) adopt(next);
  };
  outer.addEventListener("popstate", follow);
  outer.addEventListener("hashchange", follow);
}

/** Follows TensorBoard's light and dark. @param {() => void} changed */
export function followTheme(changed) {
  const root = document.documentElement;
  const body = outer === window ? null : outer.document.body;
  const prefers = window.matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const dark = body ? body.classList.contains("dark-mode") : prefers.matches;
    const theme = dark ? "dark" : "light";
    if (root.dataset.theme === theme) return;
    root.dataset.theme = theme;
    changed();
  };
  if (body) new MutationObserver(apply).observe(body, { attributes: true, attributeFilter: ["class"] });
  else prefers.addEventListener("change", apply);
  apply();
}
