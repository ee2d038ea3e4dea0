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
    from gradlens.page.summary import Summary

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def render(summary: Summary) -> str:
    """The file."""
    content = collect(summary)
    static, vendor = files("gradlens") / "page" / "static", files("gradlens") / "dashboard" / "static" / "vendor" / "uplot"
    parts = {
        "POLICY": POLICY,
        "TITLE": html.escape(f"{content['name']} - gradlens"),
        "STYLE": vendor.joinpath("uPlot.min.css").read_text() + "\n" + static.joinpath("page.css").read_text(),
        "LICENCE": html.escape(vendor.joinpath("LICENSE").read_text()),
        "TEXT": html.escape(summary.text()),
        "DATA": embedded(content),
        "LIBRARY": vendor.joinpath("uPlot.iife.min.js").read_text(),
        "SCRIPT": static.joinpath("page.js").read_text(),
    }
    page = static.joinpath("page.html").read_text()
    pieces = page.split("%%")  # what is filled in is not looked at again
    return "".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def embedded(content: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"), default=str)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
