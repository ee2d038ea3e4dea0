"""A grid as a picture: layers by steps, one colour a cell, words large enough to be read in a dashboard's card.

    | names | cells, steps to the right | what is now | what was found |
    |       | legend                    |

Rows follow the model from its inputs to its outputs. Neighbours of one module form a section; sections have one height. Not
each has room for its name: those with a finding come first, then the first and the last, then others evenly. Where the
sections beside each other have the same finding, a bar spans them.

A card of TensorBoard shows a picture some 370 by 215 pixels large and leaves pixels out to get there: hence the shape, and
letters whose strokes are three pixels wide. The palettes (viridis; blue to orange) can be told apart by people who do not
see red and green alike. Pillow draws, with the font that it brings, which has ASCII only.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gradlens.writers import grid as cells
from gradlens.writers.grid import Grid

Image.preinit()  # Pillow's modules for files, 35 ms: not when the first picture is drawn, while records wait behind it

WIDTH, LEFT, RIGHT = 1000, 206, 264  #: pixels: the picture, the names, what stands to the right
ABOVE, HEIGHT, BELOW = 48, 400, 132  #: the title, the cells, the steps and the legend
MIDDLE, WORDS = WIDTH - LEFT - RIGHT, 100  #: the cells, and how far from them the findings stand
TEXT, LINE, BOLD = 26, 29, 1

INK, FAINT, ALARM = (33, 33, 33), (110, 110, 110), (200, 0, 60)
WHITE, ZERO, NONFINITE = (255, 255, 255), (170, 170, 170), (255, 0, 170)
VIRIDIS = ("440154", "46327e", "365c8d", "277f8e", "1fa187", "4ac16d", "a0da39", "fde725")
BLUE_ORANGE = ("08519c", "3182bd", "9ecae1", "f2f2f2", "fdae6b", "e6550d", "a63603")

SHADES, GREYS = 128, 40  #: of a scale, and of each colour of text: with the two plain colours one byte a pixel


@dataclass(frozen=True)
class Scale:
    """Numbers to shades, from `low` to `high`; what lies beyond has the last shade of its side."""

    low: float
    high: float
    palette: tuple[str, ...]
    ticks: Sequence[tuple[float, str]]  #: values that the legend names
    ends: tuple[str, str]  #: what the two ends mean

    def shades(self, values: np.ndarray) -> np.ndarray:
        """uint8, from 0 to `SHADES` - 1; NaN like `low`."""
        share = np.clip((values - self.low) / (self.high - self.low), 0, 1)
        return np.rint(np.nan_to_num(share) * (SHADES - 1)).astype(np.uint8)

    def colours(self) -> np.ndarray:
        """Of each shade, `[SHADES, 3]`."""
        stops = np.array([[int(stop[i : i + 2], 16) for i in (0, 2, 4)] for stop in self.palette], np.float64)
        at = np.linspace(0, len(stops) - 1, SHADES)
        return np.stack([np.interp(at, np.arange(len(stops)), stops[:, channel]) for channel in range(3)], axis=1)


@dataclass(frozen=True)
class Chart:
    """What to show of a grid: a statistic of sums `[5, ...]`, NaN where all partials are 0."""

    title: str
    statistic: Callable[[np.ndarray], np.ndarray]
    scale: Callable[[np.ndarray], Scale]  #: fit to the statistic's values
    number: Callable[[float], str]


def _magnitude(sums: np.ndarray) -> np.ndarray:
    rms = cells.rms(sums)
    return np.log10(rms, out=np.full(rms.shape, np.nan), where=rms > 0)


def _decades(values: np.ndarray) -> Scale:
    """Whole decades, at least six, between 1e-12 and 1e4: what lies beyond is ill in any case."""
    finite = values[np.isfinite(values)]
    high = int(np.clip(math.ceil(finite.max(initial=-12)), -6, 4))
    low = int(np.clip(math.floor(finite.min(initial=high - 6)), -12, high - 6))
    ticks = [(float(at), f"1e{at}") for at in range(high, low - 1, -math.ceil((high - low) / 6))]
    return Scale(low, high, VIRIDIS, ticks, ("small", "large"))


def _power(value: float) -> str:
    digit, exponent = f"{10**value:.0e}".split("e")
    return f"{digit}e{int(exponent)}"


def _shares(values: np.ndarray) -> Scale:
    """Around one half, as wide as most cells ask for."""
    away = np.abs(values[np.isfinite(values)] - 0.5)
    most = np.quantile(away, 0.98) if len(away) else 0.0
    half = next(half for half in (0.1, 0.2, 0.3, 0.5) if most <= half or half == 0.5)
    ticks = [(at, f"{at:.0%}") for at in np.linspace(0.5 - half, 0.5 + half, 5)]
    return Scale(0.5 - half, 0.5 + half, BLUE_ORANGE, ticks, ("decrease", "increase"))


MAGNITUDE = Chart("Size of the gradient (rms), layer by step", _magnitude, _decades, _power)
DIRECTION = Chart("Share of weights that should increase, layer by step", cells.increase, _shares, lambda v: f"{v:.0%}")


def draw(chart: Chart, grid: Grid, marks: Mapping[str, str] | None = None) -> tuple[bytes, tuple[int, int]]:
    """The chart as PNG, and its `(width, height)`.

    Args:
        marks: For parameters that something was found on, a word. Their section shows it, in red.
    """
    sections = _sections(chart, grid, marks or {})
    values = chart.statistic(grid.sums)
    scale = chart.scale(values)
    canvas = _Canvas(ABOVE + HEIGHT + BELOW, scale)
    canvas.text(8, ABOVE // 2, chart.title, anchor="lm")
    if sections:
        rows = [np.linspace(s.start, s.stop, s.bottom - s.top, endpoint=False).astype(int) for s in sections]
        canvas.paste(LEFT, ABOVE, _cells(grid, values, scale)[np.concatenate(rows)])
    for section in _with_room(sections):
        canvas.text(LEFT - 8, section.y, _fit(section.name, LEFT - 12), ALARM if section.found else INK, anchor="rm")
        canvas.text(LEFT + MIDDLE + 8, section.y, section.now, anchor="lm")
    _findings(canvas, sections)
    _steps(canvas, grid, ABOVE + HEIGHT)
    _legend(canvas, scale, ABOVE + HEIGHT + 54)
    return canvas.png(), (WIDTH, ABOVE + HEIGHT + BELOW)


@dataclass(frozen=True)
class _Section:
    """A stretch of rows, and where it is drawn."""

    name: str
    start: int
    stop: int
    top: int
    bottom: int
    now: str
    found: str

    @property
    def y(self) -> int:
        return (self.top + self.bottom) // 2


def _sections(chart: Chart, grid: Grid, marks: Mapping[str, str]) -> list[_Section]:
    there = cells.sections(grid.labels)
    words = [[marks[name] for name in members if name in marks] for members in grid.members()]
    edges = ABOVE + np.arange(len(there) + 1) * HEIGHT // max(len(there), 1)
    return [
        _Section(
            name,
            start,
            stop,
            int(top),
            int(bottom),
            _now(chart, grid.sums[:, start:stop].sum(axis=1)),
            ", ".join(dict.fromkeys(word for row in words[start:stop] for word in row)),
        )
        for name, (_, start, stop), top, bottom in zip(
            _short([name for name, _, _ in there]), there, edges, edges[1:], strict=False
        )
    ]


def _with_room(sections: Sequence[_Section]) -> list[_Section]:
    """Those whose names can be written without touching each other."""
    begins = [s for before, s in zip([None, *sections], sections, strict=False) if before is None or s.found != before.found]
    found = [s for s in begins if s.found] + [s for s in sections if s.found]
    evenly = sections[:: max(1, math.ceil(len(sections) * LINE / HEIGHT))]
    kept: list[_Section] = []
    for section in [*found, *sections[:1], *sections[-1:], *evenly, *sections]:
        if all(abs(section.y - other.y) >= LINE for other in kept):
            kept.append(section)
    return kept


def _findings(canvas: _Canvas, sections: Sequence[_Section]) -> None:
    """A bar along neighbours with the same finding, and the word beside it."""
    x, free = LEFT + MIDDLE + WORDS, ABOVE - LINE
    for word, run in groupby(sections, key=lambda section: section.found):
        if word:
            stretch = list(run)
            top, bottom = stretch[0].top + 1, stretch[-1].bottom - 1
            free = max((top + bottom) // 2, free + LINE)
            canvas.block(x, top, x + 5, bottom, ALARM)
            canvas.text(x + 14, free, _fit(word, WIDTH - x - 16, head=True), ALARM, anchor="lm")


def _cells(grid: Grid, values: np.ndarray, scale: Scale) -> np.ndarray:
    """`[rows, MIDDLE]` colours. A span in which nothing was observed looks like the one before it."""
    known = cells.known(grid.sums)
    colours = scale.shades(values)
    colours[known & np.isnan(values)] = _Canvas.ZERO
    colours[cells.nonfinite(grid.sums) > 0] = _Canvas.NONFINITE
    colours[~known] = _Canvas.WHITE
    spans = np.arange(grid.spans)
    last = np.maximum.accumulate(np.where(known.any(axis=0), spans, 0))
    return colours[:, last[np.arange(MIDDLE) * grid.spans // MIDDLE]]


def _now(chart: Chart, sums: np.ndarray) -> str:
    """What a section is in its last span that says something, if that is among the last quarter; `[5, spans]`."""
    known = np.flatnonzero(cells.known(sums))
    if not len(known) or known[-1] < sums.shape[1] * 3 // 4 - 1:
        return "none"
    last = sums[:, known[-1:]]
    value = float(chart.statistic(last)[0])
    return "NaN" if cells.nonfinite(last)[0] else "zero" if math.isnan(value) else chart.number(value)


def _steps(canvas: _Canvas, grid: Grid, y: int) -> None:
    """The axis: the first step, and some round ones."""
    steps = max(grid.spans * grid.span, 1)
    unit = _round_up(steps / 5)
    canvas.text(LEFT - 36, y + 10, "step", FAINT, anchor="ra")
    for step in sorted({grid.first, *range(-(-grid.first // unit) * unit, grid.first + steps, unit)}):
        x = LEFT + (step - grid.first) * MIDDLE // steps
        if x == LEFT or LEFT + 90 < x < LEFT + MIDDLE - 20:
            canvas.block(x, y, x + 3, y + 8, INK)
            canvas.text(x, y + 10, _thousands(step), anchor="ma")


def _thousands(step: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if step >= 10 * size or (step >= size and step % size == 0):
            return f"{step / size:.4g}{letter}"
    return str(step)


def _round_up(steps: float) -> int:
    """The next of 1, 2, 5, 10, 20, ..."""
    power = 10 ** math.floor(math.log10(max(steps, 1)))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= steps)


def _legend(canvas: _Canvas, scale: Scale, y: int) -> None:
    canvas.paste(LEFT, y, np.tile(scale.shades(np.linspace(scale.low, scale.high, MIDDLE)), (26, 1)))
    canvas.text(LEFT - 8, y + 13, scale.ends[0], anchor="rm")
    canvas.text(LEFT + MIDDLE + 8, y + 13, scale.ends[1], anchor="lm")
    for value, text in scale.ticks:
        x = LEFT + round((value - scale.low) / (scale.high - scale.low) * (MIDDLE - 3))
        canvas.block(x, y + 26, x + 3, y + 34, INK)
        canvas.text(x, y + 36, text, anchor="ma")
    for x, text, colour in ((LEFT + MIDDLE + 50, "zero", _Canvas.ZERO), (LEFT + MIDDLE + 160, "NaN", _Canvas.NONFINITE)):
        canvas.paste(x, y + 40, np.full((26, 26), colour, np.uint8))
        canvas.text(x + 34, y + 53, text, anchor="lm")


# --- pixels ---------------------------------------------------------------------------------------------------------


class _Canvas:
    """A picture with a palette of its own, so that a pixel is a byte: shades, plain colours, and text on white."""

    ZERO, NONFINITE, WHITE = SHADES, SHADES + 1, 255

    def __init__(self, height: int, scale: Scale) -> None:
        self._pixels = np.full((height, WIDTH), self.WHITE, np.uint8)
        self._masks = {ink: Image.new("L", (WIDTH, height)) for ink in (INK, FAINT, ALARM)}
        self._scale = scale

    def paste(self, x: int, y: int, pixels: np.ndarray) -> None:
        self._pixels[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels

    def block(self, x: int, y: int, to_x: int, to_y: int, colour: tuple[int, int, int]) -> None:
        """A bar or a tick, of a colour of text."""
        ImageDraw.Draw(self._masks[colour]).rectangle([(x, y), (to_x - 1, to_y - 1)], 255)

    def text(self, x: int, y: int, text: str, colour: tuple[int, int, int] = INK, *, anchor: str) -> None:
        """Half bold, and a minus as thick as it must be not to get lost in a small picture."""
        pen, font = ImageDraw.Draw(self._masks[colour]), _font()
        for bold in range(BOLD + 1):
            pen.text((x + bold, y), text, 255, font, anchor=anchor)
        begin = x - {"l": 0.0, "m": 0.5, "r": 1.0}[anchor[0]] * font.getlength(text)
        for i in (i for i, character in enumerate(text) if character == "-"):
            for thick in (-1, 1):
                pen.text((begin + font.getlength(text[:i]), y + thick), "-", 255, font, anchor="l" + anchor[1])

    def png(self) -> bytes:
        palette = [self._scale.colours(), np.array([ZERO, NONFINITE])]
        for i, (ink, mask) in enumerate(self._masks.items()):
            strength = np.asarray(mask).astype(np.uint16) * GREYS // 255
            self._pixels = np.where(strength > 0, SHADES + 1 + i * GREYS + strength, self._pixels).astype(np.uint8)
            share = np.arange(1, GREYS + 1)[:, None] / GREYS
            palette.append(255 + share * (np.array(ink) - 255))
        colours = np.rint(np.concatenate(palette)).astype(np.uint8)
        image = Image.fromarray(self._pixels, "P")
        image.putpalette([*colours.ravel().tolist(), *([255] * 3 * (256 - len(colours)))])
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()


# --- text -----------------------------------------------------------------------------------------------------------


@lru_cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(TEXT)  # type: ignore[return-value]


def _length(text: str) -> float:
    return _font().getlength(text) + BOLD


def _short(names: Sequence[str]) -> list[str]:
    """Without the leading modules that all of them share."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(parts) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [".".join(part[shared:]) for part in parts]


def _fit(text: str, width: int, *, head: bool = False) -> str:
    """The text in ASCII, cut to a width in pixels: in its middle, as both ends say most of a name, or to its `head`."""
    text = "".join(c if c.isprintable() else "?" for c in text.encode("ascii", "backslashreplace").decode())
    if len(text) <= WIDTH and _length(text) <= width:
        return text
    for kept in range(min(len(text), WIDTH) - 1, 0, -1):
        first = kept if head else kept // 2
        cut = text[:first] + ".." + text[len(text) - kept + first :]
        if _length(cut) <= width:
            return cut
    return ""
