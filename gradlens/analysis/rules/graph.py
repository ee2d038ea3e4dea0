"""What the loss's graph says, as `patterns` finds it, and a loss that depends on nothing of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np

from gradlens.analysis import patterns
from gradlens.analysis.history import History
from gradlens.analysis.rules.base import check_steps, lasting, remembered
from gradlens.analysis.rules.occasional import Occasional, graphs, loss_trend, newest_step
from gradlens.facts import Graph
from gradlens.records import Finding, Severity, Snapshot, Stage, Status


@lru_cache(maxsize=64)
def _found(graph: Graph) -> tuple[Finding, ...]:
    return tuple(patterns.audit(graph))


@dataclass(frozen=True)
class GraphAudit(Occasional):
    """Mistakes that show in the graph of the loss: softmax taken twice, shapes broadcast, layers that nobody has.

    The table of patterns is `gradlens.analysis.patterns.PATTERNS`. A finding of one look stands until the next.
    """

    name: ClassVar[str] = "graph"

    def look(self, history: History) -> Iterator[Finding]:
        """Of the newest graph of each backward of a step."""
        said: set[str] = set()
        ill = loss_trend(history).ill
        for graph in graphs(history):
            for finding in _found(graph):
                if finding.rule in said:
                    continue
                said.add(finding.rule)
                loud = ill and finding.rule == "unregistered"
                yield replace(finding, step=newest_step(history), severity=Severity.WARNING if loud else finding.severity)


@dataclass(frozen=True)
class Cut:
    """The optimizer steps, and the loss reaches none of its parameters, on each of the last steps."""

    steps: int = 5

    name: ClassVar[str] = "cut"

    def __post_init__(self) -> None:
        check_steps(self)

    def __call__(self, history: History) -> Iterable[Finding]:
        newest = history.latest()
        if newest is None or newest.stage != Stage.USED or not nothing_reached(newest).any():
            return ()
        rows = lasting(history, _nothing, self.steps)
        return (patterns.cut(newest.step, steps=self.steps),) if len(rows) == len(newest) else ()


def nothing_reached(snapshot: Snapshot) -> np.ndarray:
    """`[n]` whether the loss reached no parameter at all."""
    trained = ~snapshot.has(Status.FROZEN)
    absent = snapshot.has(Status.ABSENT)
    cut = bool(len(snapshot) and trained.any() and absent[trained].all())
    return np.full(len(snapshot), cut)


@remembered
def _nothing(snapshot: Snapshot) -> np.ndarray:
    return nothing_reached(snapshot).astype(np.int8)
