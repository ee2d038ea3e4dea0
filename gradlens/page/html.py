"""One HTML file of a run that opens offline: its data, its style, its script and the chart library are inside.

Names and sentences come from the run, so whoever made it has a say in them. They are data here: JSON in which no `<` is
left, which the script writes as text. The page's own policy forbids it to fetch anything from anywhere.
"""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from gradlens.page.data import collect

if TYPE_CHECKING:
    from gradlens.page.comparison import Comparison
    from gradlens.page.summary import Summary

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def render(summary: Summary) -> str:
    """The page of a run."""
    content = collect(summary)
    return _filled("page", f"{content['name']} - gradlens", content, summary.text())


def render_comparison(comparison: Comparison) -> str:
    """The page of two runs."""
    names = [summary.run.path.resolve().name for summary in (comparison.a, comparison.b)]
    return _filled("compare", f"{names[0]} and {names[1]} - gradlens", comparison.page(), comparison.text())


def _filled(name: str, title: str, content: Any, text: str) -> str:
    static, vendor = files("gradlens") / "page" / "static", files("gradlens") / "dashboard" / "static" / "vendor" / "uplot"
    parts = {
        "POLICY": POLICY,
        "TITLE": html.escape(title),
        "STYLE": vendor.joinpath("uPlot.min.css").read_text() + "\n" + static.joinpath("page.css").read_text(),
        "LICENCE": html.escape(vendor.joinpath("LICENSE").read_text()),
        "TEXT": html.escape(text),
        "DATA": embedded(content),
        "LIBRARY": vendor.joinpath("uPlot.iife.min.js").read_text(),
        "SCRIPT": static.joinpath("common.js").read_text() + static.joinpath(f"{name}.js").read_text(),
    }
    pieces = static.joinpath(f"{name}.html").read_text().split("%%")  # what is filled in is not looked at again
    return "".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def embedded(content: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"), default=str)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
