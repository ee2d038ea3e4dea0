"use strict";
// Draws a run from the JSON in #data. What comes from the run is written as text, never as HTML.
(() => {
  const { $, make, color, num, signed, percent, count, chart, head, onChange } = gradlens;
  const data = JSON.parse($("data").textContent);
  const LOW = -46, HIGH = 40; // decades, as in data.py

  // --- matrices: one code a cell -----------------------------------------------------------------------------------

  function bytes(text) {
    const raw = atob(text), out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  }
  const columns = data.steps.length;
  const matrices = {};
  for (const [name, text] of Object.entries(data.matrices)) {
    const raw = bytes(text);
    const wide = name === "rms" || name === "update_ratio";
    const codes = wide ? new Uint16Array(raw.buffer) : raw;
    matrices[name] = { wide, codes };
  }
  // The number of a cell; null without one. Of sizes the decimal logarithm on request, -Infinity for zero.
  function cell(name, row, column, log = false) {
    const { wide, codes } = matrices[name];
    const code = codes[row * columns + column];
    if (code === 0) return null;
    if (!wide) return ((code - 1) / 254) * 2 - 1;
    if (code === 1) return log ? -Infinity : 0;
    const exponent = LOW + ((code - 2) / 65533) * (HIGH - LOW);
    return log ? exponent : 10 ** exponent;
  }

  // --- the whole model ------------------------------------------------------------------------------------------------------

  function drawCharts() {
    chart("loss-chart", data.loss.steps, [{ label: "loss", values: data.loss.values, color: "accent" }],
      { log: true, nothing: "The loss was not recorded: lens.observe(loss=loss) puts it beside the gradients." });
    const whole = data.whole;
    chart("ratio-chart", data.steps, ["high", "middle", "low"].map((name, i) => ({
      label: ["90 % below", "median", "10 % below"][i], values: whole[name] || [], color: "accent", width: i === 1 ? 2 : 0.8 })),
      { log: "always", bands: [[1, 3]], nothing: "No update was recorded: watch() was given no optimizer, or not the feature 'updates'." });
    chart("deed-chart", data.steps, [
      { label: "cosine with downhill", values: whole.alignment || [], color: "up" },
      { label: "share against", values: whole.against_share || [], color: "down", dash: [5, 4] }],
      { range: (_, low, high) => [Math.min(-0.05, low), Math.max(1, high)], nothing: "No update was recorded: watch() was given no optimizer, or not the feature 'updates'." });
    drawTimeline();
  }

  // --- one parameter over time --------------------------------------------------------------------------------------

  let chosen = 0;
  function drawTimeline() {
    if (!columns) { $("timeline").hidden = true; return; }
    const line = (name) => data.steps.map((_, column) => cell(name, chosen, column));
    for (const [name, options, ink] of [["rms", { log: true }, "accent"], ["update_ratio", { log: true }, "accent"],
      ["balance", { range: [-1.05, 1.05] }, "up"], ["cosine", { range: [-1.05, 1.05] }, "accent"]]) {
      const nothing = name === "update_ratio" ? "No update of it was recorded." : name === "cosine" ? "Not recorded (feature 'flips')." : undefined;
      chart(`t-${name}`, data.steps, [{ label: name === "balance" ? "increase - decrease" : name, values: line(name), color: ink }], { ...options, nothing });
    }
  }
  function choose(row) {
    chosen = row;
    $("parameter").value = String(row);
    drawTimeline();
    drawMap();
  }

  // --- the map -------------------------------------------------------------------------------------------------------

  // Points of viridis, dark to bright, and of a scale from "decrease" over nothing to "increase".
  const VIRIDIS = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37]];
  const DIVERGING = [[146, 21, 116], [197, 92, 166], [226, 170, 209], [244, 243, 245], [160, 214, 190], [74, 168, 128], [9, 104, 71]];
  function ramp(points, share) {
    const place = Math.min(Math.max(share, 0), 1) * (points.length - 1);
    const at = Math.min(Math.floor(place), points.length - 2), part = place - at;
    return points[at].map((from, i) => Math.round(from + (points[at + 1][i] - from) * part));
  }
  let shown = "rms", visible = data.names.map((_, row) => row), bounds = [0, 1], layout = null;

  function limits() {
    if (shown === "balance") return [-1, 1];
    let low = Infinity, high = -Infinity;
    const logs = [];
    for (const row of visible) for (let c = 0; c < columns; c++) {
      const value = cell(shown, row, c, true);
      if (value !== null && value !== -Infinity) logs.push(value);
    }
    if (!logs.length) return [0, 1];
    logs.sort((a, b) => a - b);
    low = logs[Math.floor(logs.length * 0.005)];
    high = logs[Math.ceil(logs.length * 0.995) - 1];
    return high - low < 0.5 ? [low - 0.25, high + 0.25] : [low, high];
  }

  function shade(name, row, column) {
    const value = cell(name, row, column, true);
    if (value === null) return null;
    if (name === "balance") return ramp(DIVERGING, (value + 1) / 2);
    if (value === -Infinity) return [0, 0, 0];
    return ramp(VIRIDIS, (value - bounds[0]) / (bounds[1] - bounds[0]));
  }

  function hex(name) {
    const text = color(name).replace("#", "");
    const full = text.length === 3 ? [...text].map((c) => c + c).join("") : text;
    return [0, 2, 4].map((i) => parseInt(full.slice(i, i + 2), 16));
  }

  function drawMap() {
    if (!columns) { $("map").hidden = true; return; }
    bounds = limits();
    const canvas = $("map-canvas"), box = $("map-box"), rows = visible.length;
    const width = Math.max(box.clientWidth, 240), narrow = width < 560;
    const high = rows <= 14 ? 22 : rows <= 40 ? 15 : rows <= 400 ? 3 : 1.5;
    // Rows that are too low for a name of their own: every so many rows, the name of that row.
    const every = Math.max(1, Math.ceil(14 / high));
    const left = Math.min(narrow ? 110 : 220, 12 + 6.4 * Math.max(...visible.map((row) => data.names[row].length), 4));
    const top = 4, bottom = 22, height = Math.ceil(rows * high) + top + bottom;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
    const ink = canvas.getContext("2d");
    ink.scale(ratio, ratio);
    ink.clearRect(0, 0, width, height);
    const image = new ImageData(Math.max(columns, 1), Math.max(rows, 1)), none = hex("none");
    visible.forEach((row, y) => {
      for (let x = 0; x < columns; x++) {
        const [r, g, b] = shade(shown, row, x) || none, at = 4 * (y * columns + x);
        image.data[at] = r; image.data[at + 1] = g; image.data[at + 2] = b; image.data[at + 3] = 255;
      }
    });
    const small = document.createElement("canvas");
    small.width = image.width; small.height = image.height;
    small.getContext("2d").putImageData(image, 0, 0);
    ink.imageSmoothingEnabled = false;
    ink.drawImage(small, left, top, width - left, rows * high);
    layout = { left, top, high, width: width - left, rows };
    ink.fillStyle = color("soft");
    ink.font = "11px ui-monospace, Menlo, Consolas, monospace";
    ink.textBaseline = "middle";
    ink.textAlign = "right";
    visible.forEach((row, y) => {
      if (y % every) return;
      ink.fillStyle = color(row === chosen ? "ink" : "soft");
      ink.fillText(cut(data.names[row], Math.floor((left - 10) / 6.4)), left - 6, top + (y + 0.5) * high + (every > 1 ? 4 : 0));
    });
    const place = visible.indexOf(chosen);
    if (place >= 0) {
      ink.strokeStyle = color("ink");
      ink.lineWidth = 1;
      ink.strokeRect(left + 0.5, top + place * high + 0.5, width - left - 1, Math.max(high - 1, 1));
    }
    ink.fillStyle = color("soft");
    ink.font = "11px system-ui, sans-serif";
    const ticks = Math.min(narrow ? 3 : 6, columns);
    for (let i = 0; i < ticks; i++) {
      const at = ticks === 1 ? 0 : Math.round((i * (columns - 1)) / (ticks - 1));
      ink.textAlign = i === 0 ? "left" : i === ticks - 1 ? "right" : "center";
      const x = i === 0 ? left : i === ticks - 1 ? width : left + ((at + 0.5) / columns) * (width - left);
      ink.fillText(i === 0 ? `step ${data.steps[at].toLocaleString("en")}` : data.steps[at].toLocaleString("en"), x, height - 9);
    }
    drawLegend();
  }

  function cut(name, room) {
    if (name.length <= room) return name;
    const last = Math.floor(((room - 1) * 2) / 3);
    return `${name.slice(0, Math.max(room - 1 - last, 0))}…${name.slice(-last)}`;
  }

  function drawLegend() {
    const legend = $("map-legend"), strip = document.createElement("canvas");
    strip.width = 180; strip.height = 1;
    const ink = strip.getContext("2d");
    for (let x = 0; x < 180; x++) {
      const [r, g, b] = ramp(shown === "balance" ? DIVERGING : VIRIDIS, x / 179);
      ink.fillStyle = `rgb(${r},${g},${b})`;
      ink.fillRect(x, 0, 1, 1);
    }
    const ends = shown === "balance" ? ["all should decrease", "all should increase"] : bounds.map((end) => num(10 ** end));
    legend.replaceChildren(make("span", ends[0]), strip, make("span", ends[1]), make("span", shown === "balance" ? "grey: not read" : "black: exactly 0, grey: not read"));
    const notes = {
      rms: "The root mean square of each parameter's partials, from the first layer at the top to the last, over the steps. A column that darkens upwards is a gradient that vanishes on its way back.",
      balance: "The share of a parameter's weights that should increase to lower the loss, less the share that should decrease.",
      update_ratio: "|dw|/|w|: how far each step moved a parameter, for its size.",
    };
    const left = data.left_out ? ` ${count(data.left_out, "parameter")} of the model are left out here.` : "";
    $("map-note").textContent = `${notes[shown]} Gradients of the stage '${data.stage}'. Click on a row to see it over time.${left}`;
  }

  function under(event) {
    if (!layout) return null;
    const box = $("map-canvas").getBoundingClientRect();
    const x = event.clientX - box.left - layout.left, y = event.clientY - box.top - layout.top;
    const place = Math.floor(y / layout.high), column = Math.floor((x / layout.width) * columns);
    if (place < 0 || place >= layout.rows || column >= columns) return null;
    return { row: visible[place], column: Math.max(column, 0) };
  }

  function wireMap() {
    const canvas = $("map-canvas"), tip = $("tip");
    canvas.addEventListener("mousemove", (event) => {
      const at = under(event);
      tip.hidden = !at;
      if (!at) return;
      const value = cell(shown, at.row, at.column);
      const said = value === null ? "not read" : shown === "balance" ? `increase - decrease: ${signed(value)}` : num(value);
      tip.textContent = `${data.names[at.row]}, step ${data.steps[at.column]}: ${said}`;
      tip.style.left = `${Math.min(event.clientX + 12, window.innerWidth - 330)}px`;
      tip.style.top = `${event.clientY + 14}px`;
    });
    canvas.addEventListener("mouseleave", () => { tip.hidden = true; });
    canvas.addEventListener("click", (event) => { const at = under(event); if (at) choose(at.row); });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step || !visible.length) return;
      event.preventDefault();
      choose(visible[Math.min(Math.max(visible.indexOf(chosen) + step, 0), visible.length - 1)]);
    });
    for (const button of document.querySelectorAll("[data-map]")) button.addEventListener("click", () => {
      shown = button.dataset.map;
      for (const each of document.querySelectorAll("[data-map]")) each.setAttribute("aria-pressed", String(each === button));
      drawMap();
    });
    $("filter").addEventListener("input", () => {
      const wanted = $("filter").value.trim().toLowerCase();
      visible = data.names.map((_, row) => row).filter((row) => data.names[row].toLowerCase().includes(wanted));
      drawMap();
      fillParameters();
    });
  }

  // --- words ---------------------------------------------------------------------------------------------------------

  function fillWords() {
    $("name").textContent = data.name;
    const weights = data.table.reduce((sum, row) => sum + row.weights, 0);
    const facts = [data.path];
    if (data.count) facts.push(`${count(data.count, "step")}, ${data.first} to ${data.last}`, count(data.table.length, "parameter"), count(weights, "weight"));
    if (data.created) facts.push(`begun ${new Date(1000 * data.created).toISOString().slice(0, 16).replace("T", " ")} UTC`);
    $("facts").textContent = facts.join(" · ");
    const verdict = $("verdict"), worst = data.health.worst, counts = data.health.counts;
    const plural = (n, word) => `${n} ${word}${n === 1 || word === "info" ? "" : "s"}`;
    const counted = ["error", "warning", "info"].filter((word) => counts[word]).map((word) => plural(counts[word], word)).join(", ");
    verdict.textContent = data.diagnosis ? data.diagnosis.verdict : counted || "Nothing looks ill: no rule found anything.";
    verdict.className = worst || (data.diagnosis && data.diagnosis.ill ? "warning" : "");
    const list = $("findings");
    for (const finding of data.findings) list.append(item(finding));
    $("overhead").textContent = data.overhead || "Not recorded: the run was not closed, or is still being written.";
    for (const [name, value] of Object.entries(data.settings)) $("settings").append(make("dt", name), make("dd", value));
  }

  function item(finding) {
    const node = make("li");
    if (finding.follows) node.className = "follows";
    const where = finding.where.slice(0, 4).join(", ") + (finding.where.length > 4 ? ` and ${finding.where.length - 4} more` : "");
    const since = finding.step === finding.last ? `at step ${finding.step}` : `from step ${finding.step}`;
    const head = make("p");
    head.append(make("span", finding.severity, `badge ${finding.severity}`), make("b", finding.rule), make("span", `, ${since}${where ? `: ${where}` : ""}`));
    if (finding.origin || finding.follows) head.append(make("span", finding.origin ? "origin" : "follows from it", "kind"));
    node.append(head, make("p", finding.seen));
    if (finding.causes.length) { const p = make("p"); p.append(make("span", "Likely: ", "label"), finding.causes.join("; ")); node.append(p); }
    if (finding.remedy) { const p = make("p"); p.append(make("span", "Do: ", "label"), finding.remedy); node.append(p); }
    return node;
  }

  const ARROWS = { increase: "↑ increase", decrease: "↓ decrease", hold: "hold", undefined: "undefined" };
  function fillWeights() {
    if (!data.weights.length) { $("top").hidden = true; return; }
    const first = data.weights[0];
    $("top-note").textContent = `The loss answers most to these, by the ${first.stage} gradient of step ${first.step}. ${data.verdicts}`;
    const body = head($("top-table"), [["weight", true], ["value"], ["partial"], ["to lower the loss", true], ["verdict", true]]);
    for (const each of data.weights) {
      const row = make("tr");
      row.dataset.name = each.parameter;
      row.append(make("td", each.weight), make("td", num(each.value)), make("td", signed(each.partial)),
        make("td", ARROWS[each.direction], `left ${each.direction}`), make("td", `${each.verdict}: ${each.agreement}`, "left"));
      row.firstChild.title = each.weight;
      body.append(row);
    }
  }

  const FEW = 40;
  let everything = false;
  function fillParameters() {
    const wanted = $("filter").value.trim().toLowerCase();
    const matching = data.table.filter((row) => row.parameter.toLowerCase().includes(wanted));
    const rows = everything ? matching : telling(matching);
    const body = head($("parameter-table"), [["", true], ["weights"], ["shape"], ["should increase | hold | decrease"], ["increase"], ["decrease"], ["rms"], ["|dw|/|w|"], ["status", true]]);
    for (const each of rows) {
      const row = make("tr");
      row.dataset.name = each.parameter;
      const shares = make("span", null, "shares");
      for (const word of ["increase", "hold", "decrease"]) {
        const part = make("i", null, word);
        part.style.width = `${100 * (each[`${word}_share`] || 0)}%`;
        shares.append(part);
      }
      const picture = make("td");
      picture.append(shares);
      row.append(make("td", each.parameter), make("td", each.weights.toLocaleString("en")), make("td", each.shape.join(" × ") || "scalar"), picture,
        make("td", percent(each.increase_share)), make("td", percent(each.decrease_share)), make("td", num(each.rms)), make("td", num(each.update_ratio)), make("td", each.status, "left"));
      row.firstChild.title = each.parameter;
      body.append(row);
    }
    const step = data.table.length ? data.table[0].step : 0;
    $("parameters-note").textContent = `Which share of a parameter's weights should move where to lower the loss, at step ${step}.` +
      (rows.length < matching.length ? ` The ${rows.length} most telling of ${matching.length}.` : "");
    const button = $("all");
    button.hidden = matching.length <= FEW;
    button.textContent = everything ? "show the most telling" : `show all ${matching.length}`;
  }

  // What is not as it should be, then where the weights agree most on a direction, in standard errors of chance.
  function telling(rows) {
    if (rows.length <= FEW) return rows;
    const score = (row) => (row.status !== "ok" && row.status !== "frozen" ? 1e9 : 0) +
      Math.abs((row.increase_share || 0) - (row.decrease_share || 0)) * Math.sqrt(row.weights);
    const best = new Set([...rows].sort((a, b) => score(b) - score(a)).slice(0, FEW));
    return rows.filter((row) => best.has(row));
  }

  function wire() {
    const select = $("parameter");
    data.names.forEach((name, row) => { const option = make("option", name); option.value = String(row); select.append(option); });
    select.addEventListener("change", () => choose(Number(select.value)));
    $("all").addEventListener("click", () => { everything = !everything; fillParameters(); });
    for (const table of [$("top-table"), $("parameter-table")]) table.addEventListener("click", (event) => {
      const row = event.target.closest("tr[data-name]");
      const at = row ? data.names.indexOf(row.dataset.name) : -1;
      if (at >= 0) { choose(at); $("timeline").scrollIntoView({ behavior: "smooth", block: "nearest" }); }
    });
  }

  function draw() { drawCharts(); drawMap(); }
  wire();
  wireMap();
  fillWords();
  fillWeights();
  fillParameters();
  draw();
  onChange(draw);
  document.documentElement.dataset.drawn = "yes";
})();
