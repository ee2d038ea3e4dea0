"""Values as HTML, for notebooks: what is shown of a finding, a table of parameters, the answer of a probe.

A notebook shows these in its own page, light or dark, so they have no colours of the ground and no script. Every text that
is put in is escaped: names and sentences come from models and from files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

ROWS = 20  #: of a table
COLOURS = {"error": "#d32f2f", "warning": "#b26a00", "info": "#3b7ddd", "increase": "#0f9d6a", "decrease": "#c04aa3"}
_CELL = "padding:2px 8px;border:0;white-space:nowrap;"


def element(tag: str, *inside: str, style: str = "") -> str:
    """An element around markup."""
    return f"<{tag}{f' style={chr(34)}{style}{chr(34)}' if style else ''}>{''.join(inside)}</{tag}>"


def words(text: object) -> str:
    """A text as markup."""
    return escape(str(text))


def block(*inside: str) -> str:
    """What one value is shown as."""
    return element("div", *inside, style="font-family:system-ui,sans-serif;font-size:13px;line-height:1.45;max-width:110ch")


def preformatted(text: str) -> str:
    """Text whose lines and columns matter."""
    style = "margin:0;padding:0;border:0;background:transparent;color:inherit;font-size:12px;white-space:pre-wrap"
    return element("pre", words(text), style=style)


def number(value: object) -> str:
    """Three digits; a dash where there is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if math.isnan(value) else f"{value:.3g}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, more: int = 0) -> str:
    """Cells are texts and numbers, or markup that `Markup` says is some. The first column is to the left."""
    sides = ["left"] + ["right"] * (len(header) - 1)

    def line(tag: str, cells: Sequence[object]) -> str:
        shown = [cell if isinstance(cell, Markup) else words(number(cell)) for cell in cells]
        return element("tr", *(element(tag, c, style=f"{_CELL}text-align:{s}") for c, s in zip(shown, sides, strict=True)))

    body = "".join(line("td", row) for row in rows)
    rest = element("p", words(f"and {more:,} more"), style="opacity:.7;margin:2px 8px") if more > 0 else ""
    style = "border-collapse:collapse;font-variant-numeric:tabular-nums"
    return element("table", element("thead", line("th", header)), element("tbody", body), style=style) + rest


class Markup(str):
    """A text that is markup already."""

    __slots__ = ()


def shares(increase: float, hold: float, decrease: float) -> Markup:
    """Which share of the weights should move where, as a bar."""
    parts = ((increase, COLOURS["increase"]), (hold, "#9aa3af"), (decrease, COLOURS["decrease"]))
    bars = [
        element("span", style=f"display:inline-block;height:9px;width:{90 * part:.0f}px;background:{colour}")
        for part, colour in parts
        if part > 0
    ]
    return Markup(element("span", *bars, style="display:inline-block;width:92px;text-align:left;line-height:9px"))


def curve(values: Sequence[float], *, width: int = 260, height: int = 44) -> Markup:
    """A course as a line, logarithmic where it spans more than a decade and a half."""
    known = [(place, value) for place, value in enumerate(values) if math.isfinite(value)]
    if len(known) < 2:
        return Markup("")
    if min(value for _, value in known) > 0 and max(v for _, v in known) > 30 * min(v for _, v in known):
        known = [(place, math.log10(value)) for place, value in known]
    low, high = min(value for _, value in known), max(value for _, value in known)
    unit = (high - low) or 1.0
    last = max(len(values) - 1, 1)
    points = " ".join(
        f"{2 + (width - 4) * place / last:.1f},{2 + (height - 4) * (high - value) / unit:.1f}" for place, value in known
    )
    return Markup(
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="course">'
        f'<polyline points="{points}" fill="none" stroke="{COLOURS["info"]}" stroke-width="1.5"/></svg>'
    )


# --- values of gradlens ---------------------------------------------------------------------------------------------


def finding(value: Any) -> str:
    """A finding: what was seen, what it likely comes from, what to do."""
    where = value.parameter or (f"{len(value.parameters)} parameters" if value.parameters else "")
    colour = COLOURS[str(value.severity)]
    head = (
        element("b", words(str(value.severity).upper()), style=f"color:{colour}")
        + f" {element('b', words(value.rule))} {words(where)}, step {value.step}"
    )
    lines = [head, words(value.seen)]
    if value.causes:
        lines.append(f"<i>likely:</i> {words('; '.join(value.causes))}")
    if value.remedy:
        lines.append(f"<i>do:</i> {words(value.remedy)}")
    style = f"border-left:3px solid {colour};padding:1px 0 1px 10px;margin:4px 0"
    return element("div", *(element("div", line) for line in lines), style=style)


def findings(values: Sequence[Any], *, most: int = 5) -> str:
    """The worst ones, then the earliest."""
    chosen = sorted(values, key=lambda each: (-each.severity.rank, each.step))
    rest = len(chosen) - most
    said = element("p", words(f"and {rest} more: findings() has all")) if rest > 0 else ""
    return "".join(finding(each) for each in chosen[:most]) + said


def diagnosis(value: Any) -> str:
    """The sentence, how sure it is, the origin, and the rules that follow from it or stand beside it."""
    sure = f" ({value.sure} sure)" if value.origin is not None else ""
    rest = [
        element("div", element("i", f"{said}:"), " ", words(", ".join(dict.fromkeys(each.rule for each in found))))
        for said, found in value.groups()
        if found
    ]
    head = element("div", element("b", words(value.verdict)), sure)
    return block(head, "" if value.origin is None else finding(value.origin), *rest)


def parameters(snapshot: Any, used: Any = None) -> str:
    """A row a parameter: which share of its weights should move where, its size, and how far it was moved."""
    ratios = {} if used is None else dict(zip(used.names, used.column("update_ratio").tolist(), strict=True))
    columns = {name: snapshot.column(f"{name}_share").tolist() for name in ("increase", "hold", "decrease")}
    sizes, numel = snapshot.column("rms").tolist(), snapshot.columns["numel"].tolist()
    rows = []
    for row, name in enumerate(snapshot.names[:ROWS]):
        parts = [columns[word][row] for word in ("increase", "hold", "decrease")]
        status = str(snapshot.status[row])
        bar = shares(*parts) if not any(math.isnan(part) for part in parts) and status == "ok" else status
        rows.append((name, int(numel[row]), bar, sizes[row], ratios.get(name, math.nan)))
    header = ("", "weights", "increase | hold | decrease", "rms", "|dw|/|w|")
    return table(header, rows, more=len(snapshot.names) - ROWS)


def frame(values: Any, *, rows: int = 8) -> str:
    """The first rows of a DataFrame."""
    header = [str(name) for name in values.columns]
    shown = [list(row) for row in values.head(rows).itertuples(index=False)]
    return element("div", table(header, shown, more=len(values) - rows), style="overflow-x:auto")


class Shown:
    """What is shown of a probe's result: its text, and the first rows of its table by parameter, if it has one."""

    __slots__ = ()

    def __repr__(self) -> str:
        first = str(self).splitlines()[0] if str(self) else ""
        return f"<{type(self).__name__}: {first}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For IPython on a terminal."""
        printer.text("..." if cycle else str(self))

    def _repr_html_(self) -> str:
        rows = getattr(self, "table", None)
        return block(preformatted(str(self)), "" if rows is None or callable(rows) else frame(rows))


# --- lenses and runs ------------------------------------------------------------------------------------------------


def lens(title: str, history: Any, found: Sequence[Any], *, verdict: str = "") -> str:
    """What a lens has seen: its steps, its loss as a line, what was found, and a row a parameter."""
    if not len(history):
        return block(element("b", words(title)), element("div", "Nothing was captured yet."))
    now, latest = history.at(), history.latest("used")
    used = None if latest is None else history.at(latest.step, "used")
    losses = {snapshot.step: snapshot.loss for snapshot in history if not math.isnan(snapshot.loss)}
    steps = history.steps()
    size = f"step {steps[-1]:,}: {len(now.names):,} parameters, {int(now.columns['numel'].sum()):,} weights"
    return block(
        element("div", element("b", words(title)), " ", words(size)),
        _losses(list(losses.values())),
        element("div", words(verdict), style="font-weight:600;margin:4px 0") if verdict else "",
        findings(found) if found else element("div", "No rule found anything."),
        parameters(now, used),
    )


def run(
    title: str, steps: Sequence[int], names: Sequence[str], losses: Sequence[float], found: Sequence[Any], *, verdict: str
) -> str:
    """What a run directory holds."""
    size = f"{len(steps):,} steps, {steps[0]:,} to {steps[-1]:,}" if steps else "no step yet"
    return block(
        element("div", element("b", words(title)), " ", words(f"{size}; {len(names):,} parameters")),
        _losses(losses),
        element("div", words(verdict), style="font-weight:600;margin:4px 0") if steps else "",
        findings(found) if found else element("div", "No rule found anything."),
    )


def _losses(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    if len(known) < 2:
        return ""
    said = words(f" loss {known[0]:.4g} to {known[-1]:.4g}")
    return element("div", curve(_thinned(values)), said, style="display:flex;align-items:center;gap:8px")


def _thinned(values: Sequence[float], most: int = 400) -> list[float]:
    step = max(1, math.ceil(len(values) / most))
    return [*values[:-1][::step], values[-1]]
