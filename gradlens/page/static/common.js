"use strict";
// What the pages share: elements, numbers in words, charts by uPlot. Texts are written as text, never as HTML.
const gradlens = (() => {
  const $ = (id) => document.getElementById(id);
  function make(tag, text, className) {
    const node = document.createElement(tag);
    if (text !== undefined && text !== null) node.textContent = text;
    if (className) node.className = className;
    return node;
  }

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  function num(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "-";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
    return String(Number(value.toPrecision(3)));
  }
  const signed = (value) => (value > 0 ? "+" : "") + num(value);
  const percent = (share) => (share === null || share === undefined ? "-" : share > 0 && share < 0.005 ? "<1 %" : `${Math.round(100 * share)} %`);
  const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

  const charts = new Map();
  function chart(id, steps, series, options = {}) {
    const box = $(id);
    const old = charts.get(id);
    if (old) { old.destroy(); charts.delete(id); }
    box.classList.remove("empty");
    box.textContent = "";
    const known = series.some((each) => each.values.some((value) => value !== null));
    if (!known) { box.classList.add("empty"); box.textContent = options.nothing || "Nothing was recorded."; return; }
    const all = series.flatMap((each) => each.values).filter((value) => value !== null);
    const positive = all.filter((value) => value > 0);
    const log = options.log && positive.length > 0 && (options.log === "always" || Math.max(...positive) / Math.min(...positive) > 30);
    const values = series.map((each) => (log ? each.values.map((value) => (value !== null && value <= 0 ? null : value)) : each.values));
    const axis = { stroke: color("soft"), grid: { stroke: color("line"), width: 1 }, ticks: { stroke: color("line"), width: 1 }, font: "11px system-ui, sans-serif" };
    const width = Math.max(box.clientWidth, 220);
    const plot = new uPlot({
      width, height: 210, padding: [10, 10, 0, 0],
      cursor: { drag: { x: true, y: false } },
      legend: { live: true },
      scales: { x: { time: false }, y: log ? { distr: 3 } : options.range ? { range: options.range } : all.every((value) => value === 0) ? { range: [-1, 1] } : {} },
      axes: [{ ...axis, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick.toLocaleString("en") : "")) },
        { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : num(tick))) }],
      series: [{ label: "step" }, ...series.map((each) => ({
        label: each.label, stroke: color(each.color), width: each.width ?? 1.6, dash: each.dash,
        points: { show: steps.length < 40, size: 4 }, value: (_, value) => num(value), spanGaps: true,
      }))],
      bands: (options.bands || []).map((pair) => ({ series: pair, fill: color("accent") + "30" })),
    }, [steps, ...values], box);
    charts.set(id, plot);
  }

  function head(table, names) {
    const row = make("tr");
    names.forEach(([name, left]) => row.append(make("th", name, left ? "left" : "")));
    const node = make("thead");
    node.append(row);
    table.replaceChildren(node);
    return table.appendChild(make("tbody"));
  }

  // Draw again when the window or the scheme changes. Paper is white.
  function onChange(draw) {
    let waiting = 0;
    window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 120); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    window.addEventListener("beforeprint", () => { document.documentElement.classList.add("print"); draw(); });
    window.addEventListener("afterprint", () => { document.documentElement.classList.remove("print"); draw(); });
  }

  return { $, make, color, num, signed, percent, count, chart, head, onChange };
})();
