"use strict";
// Draws two runs side by side from the JSON in #data.
(() => {
  const { $, make, num, signed, count, chart, head, onChange } = gradlens;
  const data = JSON.parse($("data").textContent);
  const labels = [`A ${data.names[0]}`, `B ${data.names[1]}`], inks = ["accent", "down"];

  function fillWords() {
    $("name").textContent = `${data.names[0]} and ${data.names[1]}`;
    $("facts").textContent = `A: ${data.a} · B: ${data.b} · ${count(data.steps.length, "step")} compared, ${count(data.count, "parameter")} in both`;
    $("verdict").textContent = data.verdict;
    const lines = [...data.findings];
    for (const [letter, names] of [["A", data.only_in_a], ["B", data.only_in_b]]) {
      if (names.length) lines.push(`Only in ${letter}: ${names.slice(0, 8).join(", ")}${names.length > 8 ? ` and ${names.length - 8} more` : ""}`);
    }
    for (const line of lines) $("said").append(make("p", line));
    if (!data.settings.length) { $("settings").replaceWith(make("p", "None differs.", "note")); return; }
    const body = head($("settings"), [["", true], ["A", true], ["B", true]]);
    for (const each of data.settings) {
      const row = make("tr");
      for (const text of [each.name, each.a, each.b]) { const td = make("td", text.length > 60 ? `${text.slice(0, 59)}…` : text, "left"); td.title = text; row.append(td); }
      body.append(row);
    }
  }

  function fillParameters() {
    $("parameters-note").textContent = `Over the last quarter of the steps: how many times as large B's gradient is, that difference in units of how much the runs scatter from step to step, ` +
      `the same of the update ratio, and how much larger B's share of weights that should increase is. Gradients of the stage '${data.stage}'.`;
    const parting = new Map(data.partings.map((each) => [each.parameter, each.step]));
    const body = head($("parameter-table"), [["", true], ["rms B / A"], ["scatters"], ["|dw|/|w| B / A"], ["direction"], ["parts at step"]]);
    for (const each of data.parameters) {
      const row = make("tr");
      row.dataset.name = each.parameter;
      row.append(make("td", each.parameter), make("td", num(each.rms)), make("td", num(each.times)), make("td", num(each.update_ratio)),
        make("td", each.balance === null ? "-" : signed(each.balance)), make("td", parting.has(each.parameter) ? String(parting.get(each.parameter)) : "-"));
      row.firstChild.title = each.parameter;
      body.append(row);
    }
  }

  function drawLoss() {
    const steps = [...new Set(data.losses.flatMap((each) => each.steps))].sort((a, b) => a - b);
    const series = data.losses.map((each, i) => {
      const known = new Map(each.steps.map((step, at) => [step, each.values[at]]));
      return { label: labels[i], values: steps.map((step) => known.get(step) ?? null), color: inks[i] };
    });
    chart("loss-chart", steps, series, { log: true, nothing: "The loss of neither was recorded." });
  }

  function drawCurve() {
    const pair = data.curves[$("parameter").value] || [[], []];
    chart("curve", data.steps, pair.map((values, i) => ({ label: labels[i], values, color: inks[i] })), { log: true });
  }

  for (const name of Object.keys(data.curves)) { const option = make("option", name); option.value = name; $("parameter").append(option); }
  $("parameter").addEventListener("change", drawCurve);
  $("parameter-table").addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-name]");
    if (!row || !(row.dataset.name in data.curves)) return;
    $("parameter").value = row.dataset.name;
    drawCurve();
    $("timeline").scrollIntoView({ behavior: "smooth", block: "nearest" });
  });
  function draw() { drawLoss(); drawCurve(); }
  fillWords();
  fillParameters();
  draw();
  onChange(draw);
  document.documentElement.dataset.drawn = "yes";
})();
