"""What modules make of a batch: units that are never on, and outputs at the ends of their range (feature `activations`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np

from gradlens.activations import SUMS, Activations
from gradlens.analysis.history import History
from gradlens.analysis.rules.base import check_number, check_steps, format_number
from gradlens.analysis.rules.occasional import Occasional, loss_trend, newest_step
from gradlens.facts import Features
from gradlens.records import Finding, Severity

#: Modules whose output is 0 where they are off.
RECTIFIERS = frozenset({"ReLU", "ReLU6", "Threshold", "Hardswish"})
#: Examples of a batch, below which a unit that is 0 for all of them says little.
EXAMPLES = 8


class Made(NamedTuple):
    """One output of a module over the last looked-at passes, oldest first, `[k]` each."""

    name: str
    type: str
    columns: dict[str, np.ndarray]

    def always(self, column: str, holds: Callable[[np.ndarray], np.ndarray]) -> bool:
        """Whether it holds in each of the passes."""
        return bool(holds(self.columns[column]).all())


def made_lately(history: History, steps: int) -> list[Made]:
    """The outputs that were there in every pass of the last steps, in the order of the calls; nothing before so many."""
    passes = [each for each in history.activations if each.step > newest_step(history) - steps]
    if not passes or newest_step(history) < steps:
        return []
    tables = [dict(zip(zip(each.modules, each.types, strict=True), _rows(each), strict=True)) for each in passes]
    kinds = [key for key in tables[-1] if sum(key in table for table in tables) * 2 > len(tables)]
    return [
        Made(name, kind, _joined([table[name, kind] for table in tables if (name, kind) in table])) for name, kind in kinds
    ]


def _rows(each: Activations) -> list[dict[str, float]]:
    columns = each.columns()
    columns["units"] = each.sums[:, SUMS.index("units")]
    return [{name: float(values[i]) for name, values in columns.items()} for i in range(len(each.modules))]


def _joined(rows: Sequence[dict[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@dataclass(frozen=True)
class DeadUnits(Occasional):
    """Units of a rectifier that are 0 for every example, in nearly all of the layer. Needs the feature `activations`.

    Asked of batches of at least 8 examples, and of each pass of the last `steps` steps. A warning where the loss does not
    fall, else an info: a wide layer may do with a tenth of its units.
    """

    share: float = 0.9
    steps: int = 20

    name: ClassVar[str] = "dead_units"

    def __post_init__(self) -> None:
        check_number(self, "share", most=1.0)
        check_steps(self)

    def look(self, history: History) -> Iterator[Finding]:
        """Of the first such module."""
        dead = [
            made
            for made in made_lately(history, self.steps)
            if made.type in RECTIFIERS
            and made.always("dead", lambda values: values >= self.share)
            and bool((made.columns["entries"] >= EXAMPLES * made.columns["units"]).all())
        ]
        if dead:
            yield replace(
                _found(self, history, dead, "dead", "is 0 for every example"),
                causes=(
                    f"units of {dead[0].name!r} died (ReLUs that are shut), after steps that were too large or with biases "
                    "that started far below 0",
                ),
                remedy="a smaller learning rate or a warm-up; LeakyReLU or GELU; biases that start at 0",
            )


@dataclass(frozen=True)
class Saturated(Occasional):
    """Sigmoids, tanhs and their like whose outputs lie at the ends of their range: no gradient passes there (Glorot and
    Bengio 2010). Needs the feature `activations`.

    `share`: of the entries within 1 % of an end, in each pass of the last `steps` steps. Not the model's last module, whose
    answers may be sure. A warning where the loss does not fall, else an info.
    """

    share: float = 0.8
    steps: int = 20

    name: ClassVar[str] = "saturated"

    def __post_init__(self) -> None:
        check_number(self, "share", most=1.0)
        check_steps(self)

    def look(self, history: History) -> Iterator[Finding]:
        """Of the first such module."""
        made = made_lately(history, self.steps)
        stuck = [each for each in made[:-1] if each.always("saturated", lambda values: values >= self.share)]
        if stuck:
            yield replace(
                _found(self, history, stuck, "saturated", "lies at an end of its range"),
                causes=(
                    f"what {stuck[0].name!r} gets is far too large: weights that start too large, or inputs that are not "
                    "normalised",
                    "steps that were too large",
                ),
                remedy="xavier_uniform_, inputs of mean 0 and size 1, a normalisation before it; a smaller learning rate",
            )


def _found(rule: DeadUnits | Saturated, history: History, made: Sequence[Made], column: str, what: str) -> Finding:
    """What was seen of the first of these modules: a warning where the loss does not fall."""
    first, more = made[0], len(made) - 1
    share = float(first.columns[column][-1])
    others = f", and so in {more} more module{'s' * (more > 1)}" if more else ""
    return Finding(
        rule=rule.name,
        step=newest_step(history),
        severity=Severity.WARNING if loss_trend(history).ill else Severity.INFO,
        seen=f"{share:.0%} of what {first.name!r} ({first.type}) makes {what}, in each pass of the last {rule.steps} "
        f"steps{others}",
        value=share,
    )


def as_features(history: History) -> dict[str, list[Features]]:
    """What the last module got and made in each first pass of a step, where its graph did not tell."""
    found: dict[str, list[Features]] = {}
    for each in history.activations:
        if each.backward or len(each.modules) < 2:
            continue
        columns = each.columns()
        spread, rms, dead = (columns[name].tolist() for name in ("spread", "rms", "dead"))
        name, made = each.modules[-1], spread[-1] * rms[-1]
        found.setdefault(name, []).append(Features(each.step, 0, name, spread[-2], rms[-2], dead[-2], made))
    return found


def said_of(history: History, name: str) -> str:
    """How much what a module makes differs from example to example; nothing where that is not known."""
    for made in made_lately(history, 1):
        if made.name == name and not math.isnan(made.columns["spread"][-1]):
            return f"; what {name!r} makes differs by {format_number(made.columns['spread'][-1])} of its size"
    return ""


def where_lost(history: History, spread: float) -> str:
    """Where, on the way through the model, examples become the same; nothing where that is not known."""
    made = [each for each in made_lately(history, 1) if not math.isnan(each.columns["spread"][-1])]
    for before, after in pairwise(made):
        was, now = before.columns["spread"][-1], after.columns["spread"][-1]
        if now < spread <= was:
            return (
                f"; what {before.name!r} ({before.type}) makes differs by {format_number(was)} of its size, and what "
                f"{after.name!r} ({after.type}) makes of it by {format_number(now)}"
            )
    return ""
