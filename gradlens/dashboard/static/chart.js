// Lines over steps, by uPlot: linked cursors, linked zoom, a mark at the step that is looked at, and files of what is seen.

import uPlot from "./vendor/uplot/uPlot.esm.js";
import { LINES, theme } from "./colour.js";
import { css, fill, h } from "./dom.js";
import { number, percent, whole } from "./format.js";
import { saveCsv, savePng, saveSvg, svg } from "./save.js";

/** @typedef {{name: string, label: string, colour: keyof typeof LINES["light"], dash?: number[], help?: string}} Line */
/** @typedef {{step: number, label: string, severity: string}} Mark */
/**
 * @typedef {object} Options
 * @property {string} title
 * @property {string} [help]
 * @property {Line[]} lines
 * @property {boolean} [log]
 * @property {"share" | "number"} [unit]
 * @property {[number, number]} [bounds]
 * @property {number} [height]
 * @property {() => number} [gutter] pixels left of the plot
 * @property {(step: number) => void} [onStep]
 * @property {(from: number | null, to: number | null) => void} [onZoom]
 */

export class Chart {
  /** @param {Options} options */
  constructor(options) {
    this.options = options;
    /** @type {uPlot | null} */
    this.plot = null;
    /** @type {(Float64Array | number[])[]} */
    this.data = [[], ...options.lines.map(() => [])];
    /** @type {[number, number] | null} */
    this.zoom = null;
    /** @type {number | null} */
    this.step = null;
    /** @type {Mark[]} */
    this.marks = [];
    this.drawn = "";
    this.summary = h("span", { class: "sr-only" });
    this.frame = h("div", { class: "plot" });
    this.element = h(
      "figure",
      { class: "chart", "aria-label": options.title, role: "group" },
      h("figcaption", {}, h("span", { class: "title", title: options.help ?? "" }, options.title), menu(options.title, this.exports())),
      this.frame,
      this.summary,
    );
    new ResizeObserver(() => this.resize()).observe(this.frame);
  }

  exports() {
    const name = () => this.options.title;
    return {
      PNG: () => this.toPng(name()),
      SVG: () => saveSvg(`${name()}.svg`, this.toSvg()),
      CSV: () => saveCsv(`${name()}.csv`, ["step", ...this.options.lines.map((line) => line.name)], transposed(this.data)),
    };
  }

  /**
   * New numbers; what is zoomed to and pointed at stays.
   * @param {(Float64Array | number[])[]} data steps, then a line each
   */
  set(data) {
    this.data = data;
    this.draw();
    this.summary.textContent = this.options.lines.map((line, i) => summarised(line.label, data[0], data[i + 1])).join(" ");
  }

  /** @param {number | null} from @param {number | null} to */
  setZoom(from, to) {
    this.zoom = from === null || to === null || !(to > from) ? null : [from, to];
    if (this.plot) this.plot.setData(/** @type {any} */ (shown(this.data, this.options.log)), true);
  }

  /** @param {number | null} step @param {Mark[]} [marks] */
  setStep(step, marks = this.marks) {
    this.step = step;
    this.marks = marks;
    this.plot?.redraw(false);
  }

  draw() {
    const width = this.frame.clientWidth;
    if (!width) return;
    const form = `${theme()} ${this.options.gutter?.() ?? 0}`;
    if (this.plot && form === this.drawn) {
      this.plot.setData(/** @type {any} */ (shown(this.data, this.options.log)), true);
      return;
    }
    this.plot?.destroy();
    this.drawn = form;
    this.plot = new uPlot(this.form(width), /** @type {any} */ (shown(this.data, this.options.log)), this.frame);
    const over = this.plot.over;
    over.addEventListener("click", (event) => {
      if (this.dragged || !this.plot) return;
      const step = this.plot.posToVal(event.offsetX, "x");
      const there = this.plot.valToIdx(step);
      const steps = this.data[0];
      if (steps.length) this.options.onStep?.(steps[there]);
    });
    over.addEventListener("dblclick", () => this.options.onZoom?.(null, null));
  }

  resize() {
    const width = this.frame.clientWidth;
    if (!width) return;
    if (!this.plot) this.draw();
    else if (Math.abs(this.plot.width - width) > 0.5) this.plot.setSize({ width, height: this.options.height ?? 170 });
  }

  /** @param {number} width @returns {uPlot.Options} */
  form(width) {
    const { options } = this;
    const colours = LINES[theme()];
    const ink = css("--ink-2");
    const grid = { stroke: css("--grid"), width: 1 };
    const told = options.unit === "share" ? percent : number;
    const gutter = options.gutter?.();
    return {
      width,
      height: options.height ?? 170,
      padding: [8, 8, 0, 0],
      legend: { live: true, markers: { width: 2 } },
      scales: {
        x: { time: false, range: (_, low, high) => this.zoom ?? wide(low, high) },
        y: options.log ? { distr: 3 } : options.bounds ? { range: () => /** @type {[number, number]} */ (options.bounds) } : {},
      },
      axes: [
        { stroke: ink, grid, ticks: grid, size: 26, font: css("--font-small"), values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? whole(tick) : "")) },
        { stroke: ink, grid, ticks: grid, size: gutter ?? 62, font: css("--font-small"), ...(options.log ? { splits: decades, filter: (/** @type {uPlot} */ _, /** @type {number[]} */ splits) => splits } : {}), values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : told(tick))) },
      ],
      series: [
        { label: "step", value: (_, value) => (value === null ? "–" : whole(value)) },
        ...options.lines.map((line) => ({
          label: line.label,
          stroke: colours[line.colour],
          width: 1.5,
          dash: line.dash,
          spanGaps: false,
          points: { show: (/** @type {uPlot} */ u, /** @type {number} */ i) => u.data[i].length < 3, size: 5 },
          value: (/** @type {uPlot} */ _, /** @type {number | null} */ value) => told(value),
        })),
      ],
      cursor: {
        sync: { key: "gradlens", setSeries: false, scales: ["x", null] },
        drag: { x: true, y: false, setScale: false },
        focus: { prox: 16 },
        bind: { dblclick: () => null },
      },
      hooks: {
        setSelect: [(u) => this.selected(u)],
        draw: [(u) => this.mark(u)],
      },
    };
  }

  /** @param {uPlot} plot */
  selected(plot) {
    const { left, width } = plot.select;
    this.dragged = width > 4;
    setTimeout(() => (this.dragged = false), 0);
    if (width <= 4) return;
    const [from, to] = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.options.onZoom?.(Math.floor(from), Math.ceil(to));
  }

  /** @param {uPlot} plot */
  mark(plot) {
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio || 1;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top - 8, bbox.width, bbox.height + 16);
    ctx.clip();
    for (const mark of this.marks) {
      const x = plot.valToPos(mark.step, "x", true);
      triangle(ctx, x, bbox.top + bbox.height, 5 * ratio, css(`--${mark.severity}`));
    }
    if (this.step !== null) {
      const x = plot.valToPos(this.step, "x", true);
      ctx.setLineDash([]);
      ctx.strokeStyle = css("--accent");
      ctx.lineWidth = 1.5 * ratio;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  /** @param {string} name */
  toPng(name) {
    if (!this.plot) return;
    const from = this.plot.ctx.canvas;
    const ratio = devicePixelRatio || 1;
    const top = 28 * ratio;
    const canvas = h("canvas", { width: from.width, height: from.height + top });
    const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    context.fillStyle = css("--surface");
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.fillStyle = css("--ink");
    context.font = `${13 * ratio}px sans-serif`;
    context.fillText(`${name}: ${this.options.lines.map((line) => line.label).join(", ")}`, 8 * ratio, 18 * ratio);
    context.drawImage(from, 0, top);
    savePng(`${name}.png`, canvas);
  }

  toSvg() {
    const [width, height, left, top, bottom] = [720, 320, 70, 34, 40];
    const data = shown(this.data, this.options.log);
    const steps = data[0];
    const [x0, x1] = this.zoom ?? wide(steps[0] ?? 0, steps[steps.length - 1] ?? 1);
    const all = data.slice(1).flatMap((line) => Array.from(line)).filter((value) => value !== null && Number.isFinite(value)).map(Number);
    const scale = (/** @type {number} */ value) => (this.options.log ? Math.log10(value) : value);
    let [low, high] = all.reduce(([a, b], value) => [Math.min(a, scale(value)), Math.max(b, scale(value))], [Infinity, -Infinity]);
    if (!(high > low)) [low, high] = [low - 1, low + 1];
    const x = (/** @type {number} */ step) => left + ((step - x0) / (x1 - x0 || 1)) * (width - left - 12);
    const y = (/** @type {number} */ value) => height - bottom - ((scale(value) - low) / (high - low)) * (height - top - bottom);
    const picture = svg("svg", { xmlns: "http://www.w3.org/2000/svg", width, height, viewBox: `0 0 ${width} ${height}`, "font-family": "sans-serif", "font-size": 12 });
    picture.append(svg("rect", { width, height, fill: "#ffffff" }), svg("text", { x: 8, y: 18, "font-size": 14 }, this.options.title));
    for (let i = 0; i <= 4; i++) {
      const value = low + ((high - low) * i) / 4;
      const at = height - bottom - ((height - top - bottom) * i) / 4;
      picture.append(svg("line", { x1: left, x2: width - 12, y1: at, y2: at, stroke: "#dddddd" }), svg("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, number(this.options.log ? 10 ** value : value)));
      const step = x0 + ((x1 - x0) * i) / 4;
      picture.append(svg("text", { x: x(step), y: height - bottom + 18, "text-anchor": "middle" }, whole(step)));
    }
    this.options.lines.forEach((line, i) => {
      const colour = LINES.light[line.colour];
      picture.append(svg("path", { d: path(steps, data[i + 1], x, y), fill: "none", stroke: colour, "stroke-width": 1.5, "stroke-dasharray": (line.dash ?? []).join(" ") }));
      picture.append(svg("text", { x: left + 140 * i, y: height - 6, fill: colour }, line.label));
    });
    return /** @type {SVGElement} */ (picture);
  }
}

/**
 * A finding's mark.
 * @param {CanvasRenderingContext2D} ctx @param {number} x @param {number} y @param {number} size @param {string} colour
 */
export function triangle(ctx, x, y, size, colour) {
  ctx.beginPath();
  ctx.moveTo(x, y - 2 * size);
  ctx.lineTo(x - size, y);
  ctx.lineTo(x + size, y);
  ctx.closePath();
  ctx.fillStyle = colour;
  ctx.fill();
  ctx.strokeStyle = css("--surface");
  ctx.lineWidth = 1;
  ctx.stroke();
}

/**
 * The lines of a logarithmic axis: powers of ten, as many as can be told apart; between few of them, 2 and 5 too.
 * @param {uPlot} _ @param {number} __ @param {number} low @param {number} high
 */
function decades(_, __, low, high) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const between = last - first < 2 ? [1, 2, 3, 5, 7] : last - first < 4 ? [1, 3] : [1];
  const found = [];
  for (let power = first; power <= last; power += Math.max(1, Math.ceil((last - first) / 6))) {
    for (const times of between) found.push(times * 10 ** power);
  }
  return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

/** @param {number} low @param {number} high @returns {[number, number]} */
function wide(low, high) {
  return low === high || low === null ? [(low ?? 0) - 1, (high ?? 0) + 1] : [low, high];
}

/**
 * What is not a number, or not above 0 on a logarithmic scale, is a gap.
 * @param {(Float64Array | number[])[]} data
 * @param {boolean | undefined} log
 * @returns {any[]}
 */
function shown(data, log) {
  return [data[0], ...data.slice(1).map((line) => Array.from(line, (value) => (Number.isFinite(value) && (!log || value > 0) ? value : null)))];
}

/**
 * @param {ArrayLike<number>} steps @param {ArrayLike<number | null>} line
 * @param {(step: number) => number} x @param {(value: number) => number} y
 */
function path(steps, line, x, y) {
  let [d, open] = ["", false];
  for (let i = 0; i < steps.length; i++) {
    const value = line[i];
    if (value !== null) d += `${open ? "L" : "M"}${x(steps[i]).toFixed(1)} ${y(value).toFixed(1)}`;
    open = value !== null;
  }
  return d;
}

/** @param {(Float64Array | number[])[]} data */
function transposed(data) {
  return Array.from(data[0], (_, i) => data.map((column) => column[i]));
}

/** @param {string} label @param {ArrayLike<number>} steps @param {ArrayLike<number>} line */
function summarised(label, steps, line) {
  const there = Array.from(line).filter(Number.isFinite);
  if (!there.length) return `${label}: nothing yet.`;
  return `${label}: ${number(there[there.length - 1])} at step ${whole(steps[steps.length - 1])}, from ${number(there.reduce((a, b) => Math.min(a, b)))} to ${number(there.reduce((a, b) => Math.max(a, b)))}.`;
}

/**
 * Buttons that save what is seen.
 * @param {string} title
 * @param {Record<string, () => void>} choices
 */
export function menu(title, choices) {
  const buttons = Object.entries(choices).map(([name, call]) => h("button", { class: "small", type: "button", "aria-label": `save ${title} as ${name}`, title: `save as ${name}`, onclick: call }, name));
  return h("span", { class: "exports" }, buttons);
}

/** @param {Element} place @param {Chart[]} charts */
export function place(place, charts) {
  fill(place, ...charts.map((chart) => chart.element));
}
