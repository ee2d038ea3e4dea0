"""The page of text with colours: they repeat what its words say, so that nothing is lost without them (NO_COLOR)."""

from __future__ import annotations

import re

from rich.console import Console
from rich.text import Text

#: What is coloured: a pattern on the page, and a style.
STYLES = (
    (r"^(gradlens: \S.*)$", "bold"),
    (r"^([A-Z][A-Z ]+[A-Z])(?=$|[:, (])", "bold cyan"),
    (r"^ +(ERROR)\b", "bold red"),
    (r"^ +(WARNING)\b", "bold yellow"),
    (r"^ +(INFO)\b", "bold blue"),
    (r" (\++)(?=[.\- ])", "green"),
    (r"(?<=[+. ])(-{2,}|-(?= ))", "magenta"),
    (r"  (increase)$", "green"),
    (r"  (decrease)$", "magenta"),
    (r"^ +(do:)", "bold"),
    (r"^ +(likely:)", "bold"),
)
_COMPILED = [(re.compile(pattern, re.MULTILINE), style) for pattern, style in STYLES]


def styled(page: str) -> Text:
    """The page with its styles."""
    text = Text(page)
    for pattern, style in _COMPILED:
        for match in pattern.finditer(page):
            text.stylize(style, *match.span(1))
    return text


def coloured(page: str) -> None:
    """Print it."""
    Console(highlight=False, soft_wrap=True).print(styled(page), soft_wrap=True)
