"""Rules about the whole run: what they look at changes slowly, so they are asked now and then.

An `Occasional` rule looks at the run when it has grown by a fifth since its last look, and once more at its end: what it
found stays found until it looks again. Looks are at numbers of steps, wherever a block ends. In the first 1,500 steps they
are 20; a look of all such rules took 1 to 2 ms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from gradlens.analysis.history import History
from gradlens.analysis.trend import Trend, trend
from gradlens.facts import Features, Graph, Modes, Settings
from gradlens.records import Finding, Snapshot, Stage
from gradlens.schedules import next_grown

GROWTH = 1.2
#: A look is taken at most each so many steps.
EVERY = 10


@dataclass(frozen=True)
class Occasional:
    """A rule about the run as a whole. Subclasses give `look(history)`, which the rule set asks when one is due."""

    def __call__(self, history: History) -> Iterable[Finding]:
        return tuple(self.look(history)) if history.newest() is not None else ()

    def next_look(self, seen: int) -> int:
        """At how many steps it looks again, after it looked at so many."""
        return next_grown(seen, GROWTH, EVERY)

    def look(self, history: History) -> Iterator[Finding]:
        """What is found in the run so far."""
        raise NotImplementedError


def loss_trend(history: History) -> Trend:
    """What the loss did so far; asked by many rules at the same moment."""
    result: Trend = history.remembered("trend", lambda asked: trend(asked.course, asked.facts))
    return result


def newest_step(history: History) -> int:
    """The step of the newest snapshot."""
    newest = history.latest()
    return 0 if newest is None else newest.step


def middle(values: np.ndarray) -> float:
    """The median of what is known; NaN of nothing."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan


def graphs(history: History) -> list[Graph]:
    """The newest graph of each backward of a step."""
    newest: dict[int, Graph] = {}
    for fact in list(history.facts):
        if isinstance(fact, Graph) and not fact.values:
            newest[fact.backward] = fact
    return list(newest.values())


def settings(history: History) -> dict[int, list[Settings]]:
    """What each optimizer was set to, oldest first."""
    result: dict[int, list[Settings]] = {}
    for fact in list(history.facts):
        if isinstance(fact, Settings):
            result.setdefault(fact.index, []).append(fact)
    return result


def features(history: History) -> dict[str, list[Features]]:
    """What layers got, by layer, oldest first."""
    result: dict[str, list[Features]] = {}
    for fact in list(history.facts):
        if isinstance(fact, Features):
            result.setdefault(fact.layer, []).append(fact)
    return result


def modes(history: History) -> list[Modes]:
    """The modules' modes, oldest first."""
    return [fact for fact in list(history.facts) if isinstance(fact, Modes)]


def used(history: History) -> Snapshot | None:
    """The newest gradient that an optimizer consumed, or the newest of all where none is known."""
    return history.latest(Stage.USED) or history.latest()


def operations(history: History) -> set[str]:
    """The names of all operations that were seen in graphs."""
    return {op.name for graph in graphs(history) for op in graph.operations}
