"""`gradlens top`: the parameters of a run that is being written, those first that move most.

Each second the newest steps are read again, as any reader would; the training knows nothing of it. On a terminal keys sort
and filter; elsewhere one table is printed.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from gradlens.cli.runs import RUN, opened

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gradlens.store.run import Run

STEPS = 24  #: of the newest that a line has seen
NUMBERS, LEAST = 54, 30  #: characters of all columns but name and course, and of a name beside a course
BARS, PLAIN = " ▁▂▃▄▅▆▇█", " _.-=+*%#"

EPILOG = """
\b
Keys:
  m what moves   r size   u update ratio   n name   s status
  / filter, Enter ends it, Esc clears it     j k or arrows scroll     space pauses     q quits
\b
Examples:
  gradlens top runs/digits
  gradlens top runs/digits --once | head
"""


@dataclass(frozen=True)
class Line:
    """One parameter as it was lately."""

    place: int  #: in the model
    name: str
    status: str
    rms: float
    trend: float  #: log10 of the rms by its median over the steps seen
    update_ratio: float
    balance: float  #: share to increase less share to decrease
    course: tuple[float, ...]  #: the rms of the steps seen


@dataclass(frozen=True)
class Seen:
    """The newest steps of a run."""

    lines: tuple[Line, ...]
    step: int | None
    loss: float
    findings: int
    age: float  #: seconds since the last record


ORDERS: dict[str, tuple[str, Callable[[Line], tuple[float, float]]]] = {
    "m": ("what moves", lambda line: (-_or_least(abs(line.trend)), -_or_least(line.update_ratio))),
    "r": ("size", lambda line: (-_or_least(line.rms), line.place)),
    "u": ("update ratio", lambda line: (-_or_least(line.update_ratio), line.place)),
    "n": ("name", lambda line: (line.place, 0)),
    "s": ("status", lambda line: (line.status == "ok", line.place)),
}


def _or_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value


@click.command("top", short_help="The parameters of a run that is being written.", epilog=EPILOG)
@click.argument("run", type=RUN)
@click.option("--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds between two looks.")
@click.option("--sort", type=click.Choice(["moves", "rms", "update", "name", "status"]), default="moves", show_default=True)
@click.option("--filter", "wanted", default="", help="Parameters whose name contains this.")
@click.option("--once", is_flag=True, help="Print one table and end, as it does where there is no terminal.")
def command(run: str, interval: float, sort: str, wanted: str, once: bool) -> None:
    """The parameters of RUN while it is being written, those first that move most."""
    found = opened(run)
    screen = Screen(str(found.path), key=sort[0], wanted=wanted)
    if once or not (sys.stdout.isatty() and sys.stdin.isatty()) or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        screen.seen = look(found)
        screen.print()
        return
    with contextlib.suppress(KeyboardInterrupt):
        _live(found, screen, interval)


def look(run: Run) -> Seen:
    """What the newest steps say."""
    import numpy as np

    steps = run.steps()
    if not steps:
        return Seen((), None, math.nan, 0, math.nan)
    size = max(2, min(STEPS, 60_000 // max(4 * len(run.names()), 1)))
    snapshots = run.snapshots(steps=steps[-size:])
    stages = [str(each.stage) for each in snapshots]
    stage = "used" if "used" in stages else stages[-1]
    courses: dict[str, dict[int, tuple[Any, int]]] = {}
    for snapshot in (each for each in snapshots if each.stage == stage):
        for row, name in enumerate(snapshot.names):
            courses.setdefault(name, {})[snapshot.step] = (snapshot, row)
    columns = {
        id(s): {c: s.column(c) for c in ("rms", "update_ratio", "increase_share", "decrease_share")} for s in snapshots
    }
    lines = []
    for place, (name, course) in enumerate(courses.items()):
        snapshot, row = course[max(course)]
        now = {column: float(values[row]) for column, values in columns[id(snapshot)].items()}
        sizes = [float(columns[id(s)]["rms"][r]) for s, r in course.values()]
        known = [value for value in sizes if value > 0]
        trend = math.log10(now["rms"] / float(np.median(known))) if known and now["rms"] > 0 else math.nan
        balance = now["increase_share"] - now["decrease_share"]
        status = str(snapshot.status[row])
        lines.append(Line(place, name, status, now["rms"], trend, now["update_ratio"], balance, tuple(sizes)))
    losses = [each.loss for each in snapshots if not math.isnan(each.loss)]
    age = max(time.time() - snapshots[-1].time, 0.0)
    return Seen(tuple(lines), snapshots[-1].step, losses[-1] if losses else math.nan, len(run.findings()), age)


class Screen:
    """What is shown: the lines, in an order, from a place on, those that are wanted."""

    def __init__(self, title: str, *, key: str, wanted: str) -> None:
        self.title, self.key, self.wanted = title, key, wanted
        self.seen = Seen((), None, math.nan, 0, math.nan)
        self.first, self.typing, self.paused = 0, False, False

    def lines(self) -> list[Line]:
        """In order."""
        wanted = self.wanted.lower()
        return sorted((line for line in self.seen.lines if wanted in line.name.lower()), key=ORDERS[self.key][1])

    def press(self, key: str) -> bool:
        """Take a key; False ends."""
        if self.typing:
            self._type(key)
        elif key == "q":
            return False
        elif key in ORDERS:
            self.key, self.first = key, 0
        elif key == "/":
            self.typing = True
        elif key == " ":
            self.paused = not self.paused
        elif key == "escape":
            self.wanted = ""
        elif key in ("j", "down", "k", "up"):
            by = 1 if key in ("j", "down") else -1
            self.first = min(max(self.first + by, 0), max(len(self.lines()) - 1, 0))
        return True

    def _type(self, key: str) -> None:
        if key in ("\r", "\n"):
            self.typing = False
        elif key == "escape":
            self.typing, self.wanted = False, ""
        elif key in ("\x7f", "\b"):
            self.wanted = self.wanted[:-1]
        elif len(key) == 1 and key.isprintable():
            self.wanted += key
        self.first = 0

    def header(self) -> str:
        """One line on the run."""
        seen = self.seen
        if seen.step is None:
            return f"{self.title}: no step was recorded yet"
        loss = "" if math.isnan(seen.loss) else f"  loss {seen.loss:.4g}"
        found = f"  {seen.findings} finding{'s' * (seen.findings != 1)}" if seen.findings else ""
        age = f"  {seen.age:.0f} s ago" if seen.age > 3 else ""
        return f"{self.title}  step {seen.step:,}{loss}{found}{age}{'  PAUSED' * self.paused}"

    def footer(self) -> str:
        """What can be done."""
        if self.typing:
            return f"filter: {self.wanted}_   (Enter ends, Esc clears)"
        filtered = f"  filter '{self.wanted}'" if self.wanted else ""
        keys = "m moves  r size  u update  n name  s status  / filter  space pause  q quit"
        return f"by {ORDERS[self.key][0]}{filtered}   {keys}"

    def render(self, width: int, height: int | None = None) -> RenderableType:
        """For rich. Numbers are never cut: on a narrow terminal the course has fewer steps, or is left out."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        longest = max((len(line.name) for line in self.seen.lines), default=0)
        steps = min(STEPS, width - NUMBERS - min(LEAST, longest))
        steps = steps if steps >= 8 else 0
        room = min(max(width - NUMBERS - steps, 12), 44)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), expand=False, pad_edge=False, show_edge=False)
        table.add_column("parameter", no_wrap=True, max_width=room)
        for name, wide in (("rms", 8), ("trend", 7), ("|dw|/|w|", 8), ("up - down", 9)):
            table.add_column(name, justify="right", no_wrap=True, min_width=wide)
        if steps:
            table.add_column(f"last {steps} steps"[: max(steps, 8)], no_wrap=True, min_width=steps)
        table.add_column("status", no_wrap=True, min_width=9)
        lines = self.lines()[self.first :]
        for line in lines if height is None else lines[: max(height - 7, 1)]:
            color = "red" if line.status not in ("ok", "frozen") else "yellow" if abs(_or_zero(line.trend)) > 0.5 else ""
            table.add_row(
                Text(_tail(line.name, room)),
                _short(line.rms),
                "-" if math.isnan(line.trend) else f"x{10**line.trend:.2g}",
                _short(line.update_ratio),
                "-" if math.isnan(line.balance) else f"{line.balance:+.2f}",
                *([spark(line.course[-steps:])] if steps else []),
                line.status,
                style=color,
            )
        return Group(Text(self.header(), style="bold", no_wrap=True), table, Text(self.footer(), style="dim"))

    def print(self) -> None:
        """One table, for a pipe too."""
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
        console.print(self.render(console.width))


def _tail(name: str, room: int) -> str:
    """The end of a name says more than its begin."""
    dots = "…" if can_print("…") else ".."
    return name if len(name) <= room else dots + name[len(dots) - room :]


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def spark(values: tuple[float, ...]) -> str:
    """A course as bars, on a logarithmic scale; a gap where there is no number."""
    logs = [math.log10(value) if value > 0 and math.isfinite(value) else math.nan for value in values]
    known = [value for value in logs if not math.isnan(value)]
    if not known:
        return ""
    low, high = min(known), max(known)
    high = max(high, low + 0.05)
    bars = BARS if can_print(BARS) else PLAIN
    return "".join(" " if math.isnan(v) else bars[1 + min(int((v - low) / (high - low) * 8), 7)] for v in logs)


def can_print(text: str) -> bool:
    """Whether standard output knows these characters: a bare machine, seen over ssh, may have the C locale."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


# --- the terminal ---------------------------------------------------------------------------------------------------


def _live(run: Run, screen: Screen, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with _keys() as read, Live(console=console, screen=True, auto_refresh=False) as live:
        due = 0.0
        while True:
            if time.monotonic() >= due and not screen.paused:
                screen.seen, due = look(run), time.monotonic() + interval
            live.update(screen.render(console.size.width, console.size.height), refresh=True)
            for key in read(0.1 if screen.paused else min(max(due - time.monotonic(), 0.02), 0.25)):
                if not screen.press(key):
                    return


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], list[str]]]:
    """Keys as they are pressed, without Enter; the terminal is as it was afterwards."""
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield lambda seconds: _read(descriptor, seconds)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _read(descriptor: int, seconds: float) -> list[str]:
    ready, _, _ = select.select([descriptor], [], [], seconds)
    if not ready:
        return []
    text = os.read(descriptor, 64).decode(errors="replace")
    if not text:
        return ["q"]  # the terminal is gone
    for sequence, name in (("\x1b[A", "up"), ("\x1b[B", "down"), ("\x1bOA", "up"), ("\x1bOB", "down"), ("\x1b", "escape")):
        if text == sequence:
            return [name]
    return [] if text.startswith("\x1b") else list(text)
