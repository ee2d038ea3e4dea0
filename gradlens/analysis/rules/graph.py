"""What the loss's graph says, as `patterns` finds it, and a loss that depends on nothing of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np

from gradlens.analysis import patterns
from gradlens.analysis.history import Columns, History
from gradlens.analysis.rules.base import ColumnRule, check_steps, newest_of, of_whole_model
from gradlens.analysis.rules.occasional import Occasional, graphs, loss_trend, newest_step
from gradlens.facts import Graph
from gradlens.records import Finding, Severity, Stage, Status


@lru_cache(maxsize=64)
def _found(graph: Graph) -> tuple[Finding, ...]:
    return tuple(patterns.audit(graph))


#: What may be meant, and is no info where the loss does not fall.
LOUD_IF_ILL = ("unregistered", "summed-loss", "edge")


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
                loud = ill and finding.rule in LOUD_IF_ILL
                yield replace(finding, step=newest_step(history), severity=Severity.WARNING if loud else finding.severity)


@dataclass(frozen=True)
class Cut(ColumnRule):
    """The optimizer steps, and the loss reaches none of its parameters, on each of the last steps."""

    steps: int = 5

    name: ClassVar[str] = "cut"
    stages: ClassVar[tuple[str, ...]] = (Stage.USED,)
    settled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_steps(self)

    def holds(self, columns: Columns) -> np.ndarray:
        """Whether every parameter that trains is absent."""
        trained = ~columns.has(Status.FROZEN)
        absent = columns.has(Status.ABSENT) | ~trained
        return of_whole_model(columns, np.asarray(absent.all(axis=1)), np.asarray(trained.any(axis=1)))

    def findings(self, history: History, rows: Sequence[int]) -> Iterable[Finding]:
        """One for the whole model."""
        return (patterns.cut(newest_of(history).step, steps=self.steps),)
