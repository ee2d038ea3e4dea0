"""Two runs side by side: which settings differ, where the runs part, and which parameters differ most.

Two quantities of a parameter are compared at the steps that both runs have: the rms of its gradient, and its update ratio.
With x the decimal logarithm of one of them, and `d = x of B - x of A`, a run scatters from step to step by

    s = 1.4826 median |x[t+1] - x[t]| / sqrt(2),     of A or of B, whichever is larger

The runs *part* at a parameter at the first step from which the median of `WINDOW` values of |d| exceeds both `TIMES` s and
`LEAST`: one odd batch parts nothing, and another order of the same data need not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gradlens.errors import ArgumentError
from gradlens.page import data
from gradlens.page.summary import Summary
from gradlens.records import Stage

WINDOW = 5  #: steps whose median has to differ
TIMES = 5.0  #: the runs' own scatter
LEAST = 0.1  #: decades, 26 %: less is no difference to speak of
STEPS = 300  #: compared, evenly taken
SHOWN = 15  #: parameters in the text
CURVES, TABLE = 60, 300  #: parameters on the HTML page with their curves, and with a row
SAME = 1e-9  #: relative: what differs by less is rounding in the records
WIDTH = 100
QUANTITIES = {"rms": "gradient", "update_ratio": "update ratio"}

Matrices = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Parting:
    """The first step at which a parameter differs by more than the runs scatter."""

    step: int
    parameter: str
    what: str  #: `rms` or `update_ratio`
    times: float  #: the difference, in units of the scatter
    ratio: float  #: B's by A's


@dataclass(frozen=True, eq=False)
class Comparison:
    """What differs between two runs."""

    a: Summary
    b: Summary
    stage: str
    steps: Sequence[int]  #: those compared
    names: Sequence[str]  #: parameters of both, with the same shape
    left: Matrices  #: of A: `rms`, `balance`, `update_ratio`, [parameters, steps]
    right: Matrices

    @classmethod
    def of(cls, a: Summary, b: Summary) -> Comparison:
        """Read both.

        Raises:
            ArgumentError: They have no step or no parameter in common.
        """
        stage = next((s.value for s in reversed(Stage) if a.run.steps(s.value) and b.run.steps(s.value)), None)
        common = [] if stage is None else sorted(set(a.run.steps(stage)) & set(b.run.steps(stage)))
        if stage is None or not common:
            raise ArgumentError(
                f"{a.run.path} and {b.run.path} have no step of the same stage in common: nothing to compare"
            )
        shapes = [_shapes(summary) for summary in (a, b)]
        names = [name for name, shape in shapes[0].items() if shapes[1].get(name) == shape]
        if not names:
            raise ArgumentError(f"{a.run.path} and {b.run.path} have no parameter of the same name and shape in common")
        steps = [common[i] for i in data.evenly(len(common), STEPS)]
        columns = ("rms", "balance", "update_ratio")
        left, right = (data.cells(each, names, steps, stage, columns) for each in (a, b))
        return cls(a, b, stage, steps, names, left, right)

    # --- settings and parameters --------------------------------------------------------------------------------------

    @cached_property
    def settings(self) -> list[tuple[str, str, str]]:
        """Name, value of A, value of B of the settings that differ."""
        mine, theirs = (_flat(summary.run.settings) for summary in (self.a, self.b))
        names = dict.fromkeys([*mine, *theirs])
        pairs = [(name, mine.get(name, "-"), theirs.get(name, "-")) for name in names]
        return [each for each in pairs if each[1] != each[2]]

    @cached_property
    def unshared(self) -> tuple[list[str], list[str]]:
        """Parameters that only A has, and only B; one whose shape differs is in both."""
        mine, theirs = _shapes(self.a), _shapes(self.b)
        return (
            [name for name, shape in mine.items() if theirs.get(name) != shape],
            [name for name, shape in theirs.items() if mine.get(name) != shape],
        )

    # --- where they part ----------------------------------------------------------------------------------------------

    @cached_property
    def differences(self) -> dict[str, np.ndarray]:
        """By quantity: log10 of B's by A's, [parameters, steps]; NaN where either is none or 0."""
        return {name: _logs(self.right[name]) - _logs(self.left[name]) for name in QUANTITIES}

    @cached_property
    def scatters(self) -> dict[str, np.ndarray]:
        """By quantity: [parameters] how much either run's logarithm scatters from step to step, 0 where unknown."""
        return {
            name: np.nan_to_num(np.fmax(*(_scatter(_logs(each[name])) for each in (self.left, self.right))))
            for name in QUANTITIES
        }

    @cached_property
    def first_difference(self) -> int | None:
        """The first compared step at which any number differs; None: they are the same throughout."""
        differs = np.zeros(len(self.steps), bool)
        for name in ("rms", "balance", "update_ratio"):
            mine, theirs = self.left[name], self.right[name]
            with np.errstate(invalid="ignore"):
                far = np.abs(mine - theirs) > SAME * np.fmax(np.abs(mine), np.abs(theirs))
            differs |= (far | (np.isnan(mine) != np.isnan(theirs))).any(axis=0)
        return self.steps[int(np.argmax(differs))] if differs.any() else None

    @cached_property
    def partings(self) -> list[Parting]:
        """Where each parameter parts, the earliest first; those that never do are left out."""
        found = [each for row in range(len(self.names)) if (each := self._parting(row)) is not None]
        return sorted(found, key=lambda parting: (parting.step, -parting.times))

    def _parting(self, row: int) -> Parting | None:
        """The earliest of the parameter's quantities."""
        found = []
        for what in QUANTITIES:
            d, scatter = self.differences[what][row], self.scatters[what][row]
            size, limit = _lasting(np.abs(d)), max(TIMES * scatter, LEAST)
            beyond = np.flatnonzero(size > limit)
            if len(beyond):
                at = int(beyond[0])
                ratio = 10 ** _median(d[at : at + WINDOW])
                found.append(Parting(self.steps[at], self.names[row], what, float(size[at]) * TIMES / limit, ratio))
        return min(found, key=lambda parting: (parting.step, -parting.times), default=None)

    @cached_property
    def ranking(self) -> list[dict[str, Any]]:
        """Each parameter, by how much it differs over the last quarter of the steps, in units of the scatter."""
        last = slice(-max(len(self.steps) // 4, 1), None)
        rows = []
        for row, name in enumerate(self.names):
            middles = {what: _median(self.differences[what][row, last]) for what in QUANTITIES}
            times = [abs(m) / max(float(self.scatters[what][row]), LEAST / TIMES) for what, m in middles.items()]
            balance = _median(self.right["balance"][row, last]) - _median(self.left["balance"][row, last])
            entry = {"parameter": name, "times": float(np.fmax(times[0], times[1])), "balance": balance}
            rows.append(entry | {what: 10**middle for what, middle in middles.items()})
        return sorted(rows, key=lambda each: -each["times"] if not math.isnan(each["times"]) else 0.0)

    # --- words --------------------------------------------------------------------------------------------------------

    def verdict(self) -> str:
        """One sentence."""
        if self.first_difference is None:
            return f"the runs are the same at all {len(self.steps)} compared steps"
        if not self.partings:
            return (
                f"the runs differ from step {self.first_difference} on, and nowhere by more than they scatter from step to "
                "step by themselves"
            )
        first = self.partings[0]
        more = sum(parting.step == first.step for parting in self.partings) - 1
        others = f" (with {more} more)" if more else ""
        return (
            f"the runs part at step {first.step} in {first.parameter}{others}: its {QUANTITIES[first.what]} is "
            f"{first.ratio:.3g} times as large in B, {first.times:.0f} times the scatter; they first differ at all at step "
            f"{self.first_difference}"
        )

    def text(self) -> str:
        """A page for the terminal."""
        lines = [f"A: {self.a.run.path}", f"B: {self.b.run.path}", "", *_wrapped(f"VERDICT: {self.verdict()}"), ""]
        lines += ["SETTINGS that differ"] if self.settings else ["SETTINGS: none differs"]
        lines += [f"  {name}: {_short(mine)} | {_short(theirs)}" for name, mine, theirs in self.settings]
        lines += ["", f"LOSS  A {_losses(self.a)}", f"      B {_losses(self.b)}", "", *self._findings()]
        for letter, names in zip("AB", self.unshared, strict=True):
            if names:
                lines.append(f"ONLY IN {letter}: {', '.join(names[:6])}{f' and {len(names) - 6} more' * (len(names) > 6)}")
        lines += ["", f"PARAMETERS that differ most, over the last quarter of {len(self.steps)} steps (stage {self.stage})"]
        lines.append(f"  {'':<34}{'rms B/A':>10}{'scatters':>10}{'|dw|/|w| B/A':>14}{'direction':>11}")
        for each in self.ranking[:SHOWN]:
            name = each["parameter"] if len(each["parameter"]) <= 33 else f"..{each['parameter'][-31:]}"
            numbers = f"{_number(each['rms']):>10}{_number(each['times']):>10}{_number(each['update_ratio']):>14}"
            lines.append(f"  {name:<34}{numbers}{_number(each['balance'], signed=True):>11}")
        return "\n".join(lines)

    def _findings(self) -> list[str]:
        mine, theirs = ({finding.rule for finding in each.findings} for each in (self.a, self.b))
        said = [
            f"FOUND ONLY IN {letter}: {', '.join(sorted(own - other))}"
            for letter, own, other in (("A", mine, theirs), ("B", theirs, mine))
            if own - other
        ]
        return said or ["FINDINGS: the same rules found something in both" if mine else "FINDINGS: none in either"]

    def as_json(self) -> dict[str, Any]:
        """For programs; numbers that are none are null."""
        return {
            "a": str(self.a.run.path),
            "b": str(self.b.run.path),
            "verdict": self.verdict(),
            "first_difference": self.first_difference,
            "partings": [vars(parting) for parting in self.partings],
            "settings": [{"name": name, "a": mine, "b": theirs} for name, mine, theirs in self.settings],
            "only_in_a": self.unshared[0],
            "only_in_b": self.unshared[1],
            "parameters": [
                {name: data.finite(value) if isinstance(value, float) else value for name, value in each.items()}
                for each in self.ranking
            ],
        }

    def page(self) -> dict[str, Any]:
        """The numbers of the HTML page."""
        shown = [each["parameter"] for each in self.ranking[:CURVES]]
        place = {name: row for row, name in enumerate(self.names)}

        def curve(values: np.ndarray) -> list[float | None]:
            return [data.finite(float(value)) for value in values]

        return self.as_json() | {
            "names": [summary.run.path.resolve().name for summary in (self.a, self.b)],
            "losses": [data.thinned(summary.losses) for summary in (self.a, self.b)],
            "stage": self.stage,
            "steps": list(self.steps),
            "findings": self._findings(),
            "partings": [vars(parting) for parting in self.partings[:CURVES]],
            "parameters": self.as_json()["parameters"][:TABLE],
            "count": len(self.names),
            "curves": {name: [curve(each["rms"][place[name]]) for each in (self.left, self.right)] for name in shown},
        }


def _shapes(summary: Summary) -> dict[str, tuple[int, ...]]:
    return summary.run.shapes()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names; what differs in any two runs, such as what they cost, is left out."""
    result: dict[str, str] = {}
    for name, value in settings.items():
        if prefix or name not in ("overhead", "rank", "diagnosis"):
            nested = dict(enumerate(value)) if isinstance(value, list) and value and isinstance(value[0], dict) else value
            if isinstance(nested, dict):
                result |= _flat(nested, f"{prefix}{name}.")
            else:
                result[f"{prefix}{name}"] = str(value)
    return result


def _scatter(logs: np.ndarray) -> np.ndarray:
    """1.4826 median |difference| / sqrt(2) of each row; NaN where there is none."""
    jumps = np.abs(np.diff(logs, axis=1))
    result = np.full(len(logs), np.nan)
    for row, each in enumerate(jumps):
        known = each[np.isfinite(each)]
        if len(known):
            result[row] = 1.4826 * float(np.median(known)) / math.sqrt(2)
    return result


def _lasting(values: np.ndarray) -> np.ndarray:
    """At each place the median of it and the next ones, `WINDOW` together; NaN where less than half are known."""
    window = min(WINDOW, len(values))
    result = np.full(len(values), np.nan)
    for at in range(len(values) - window + 1):
        part = values[at : at + window]
        known = part[np.isfinite(part)]
        if 2 * len(known) >= window:
            result[at] = np.median(known)
    return result


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan


def _logs(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log10(np.where(np.isfinite(values) & (values > 0), values, np.nan))


def _losses(summary: Summary) -> str:
    losses = summary.losses
    if not losses:
        return "not recorded"
    first, last = min(losses), max(losses)
    lowest = min(losses, key=losses.__getitem__)
    return f"{losses[first]:.4g} at step {first}, {losses[last]:.4g} at {last}, lowest {losses[lowest]:.4g} at {lowest}"


def _number(value: float, *, signed: bool = False) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}" if signed else f"{value:.3g}"


def _short(text: str, room: int = 44) -> str:
    return text if len(text) <= room else f"{text[: room - 2]}.."


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
