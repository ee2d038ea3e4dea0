"""Gradients that no optimizer uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import Columns, History
from gradlens.analysis.rules.base import (
    ColumnRule,
    Condition,
    Rows,
    check_steps,
    judged,
    lasting,
    newest_of,
    of_whole_model,
    on_steps,
    remembered,
    tristate,
)
from gradlens.records import Finding, Severity, Snapshot, Stage, Status


@dataclass(frozen=True)
class Lost(ColumnRule):
    """What backward gave was gone when the optimizer came: `.grad` was None or exactly 0, at each of the last steps.

    `zero_grad()` between `backward()` and `step()` does that; such a training stands still, or moves by momentum and weight
    decay alone. Where it happens to some parameters only, somebody does it by hand: an info.
    """

    steps: int = 3

    name: ClassVar[str] = "lost"
    stages: ClassVar[tuple[str, ...]] = (Stage.USED,)

    def __post_init__(self) -> None:
        check_steps(self)

    def holds(self, columns: Columns) -> np.ndarray:
        """Where the optimizer got nothing; whether backward gave something is asked then."""
        return tristate(_nothing(columns), judged(columns))

    def findings(self, history: History, rows: Sequence[int]) -> Iterator[Finding]:
        """One for all."""
        newest = newest_of(history)
        backward = history.recent(self.steps, Stage.BACKWARD)
        rows = lasting(history, _lost(backward), self.steps)
        rows = [row for row in rows if not _cancels(backward, newest)[row]]
        if not rows:
            return
        names = tuple(newest.names[row] for row in rows)
        everything = len(rows) == int(judged(newest).sum())
        some = "" if everything else f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        yield Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.WARNING if everything else Severity.INFO,
            parameter=names[0] if len(names) == 1 else None,
            stage=newest.stage,
            seen=f"the optimizer got nothing of what backward() gave to {'all' if everything else 'some'} {len(names)} "
            f"parameters{some}: .grad was None or exactly 0 when it stepped, {on_steps(self.steps)}",
            causes=("optimizer.zero_grad() is called between backward() and step()",)
            if everything
            else ("something sets these gradients to None or 0 by hand, or multiplies them by 0",),
            remedy="call zero_grad() before backward(), or after step()"
            if everything
            else "nothing if it is meant; requires_grad_(False) spares backward the work",
            value=float(len(names)),
            parameters=names if len(names) > 1 else (),
        )


@remembered
def nothing_used(rows: Rows) -> np.ndarray:
    """`[..., n]` rows of which an optimizer had the parameter, saw no gradient, and moved nothing."""
    columns = rows.columns
    still = (columns["update_numel"] > 0) & (columns["update_square_sum"] == 0)
    return still & np.isnan(columns["update_used_square_sum"]) & judged(rows)


def _nothing(used: Rows) -> np.ndarray:
    return nothing_used(used) | used.has(Status.ZERO)


def _cancels(backward: list[Snapshot], used: Snapshot) -> np.ndarray:
    """`[n]` where what several backwards of the step gave adds up to nothing, and is 0 in what was used."""
    own = [s for s in backward if s.step == used.step and s.names == used.names]
    if len(own) < 2:
        return np.zeros(len(used), bool)
    together = np.abs(np.add.reduce([s.columns["sum"] for s in own]))
    size = np.add.reduce([s.columns["abs_sum"] for s in own])
    return np.asarray(used.has(Status.ZERO) & (together <= 1e-6 * size))


def gave(backward: list[Snapshot], used: Snapshot) -> np.ndarray:
    """`[n]` whether some backward of the step had partials that are not 0, in the rows of what was used."""
    result = np.zeros(len(used), bool)
    for snapshot in backward:
        if snapshot.step != used.step:
            continue
        some = snapshot.has(Status.OK)
        if snapshot.names == used.names:
            result |= some
        else:
            position = snapshot.parameters.position
            result |= [name in position and bool(some[position[name]]) for name in used.names]
    return result


def _lost(backward: list[Snapshot]) -> Condition:
    def lost(used: Snapshot) -> np.ndarray:
        return tristate(_nothing(used) & gave(backward, used), judged(used))

    return lost


@dataclass(frozen=True)
class Unstepped(ColumnRule):
    """So many backward passes, and no watched optimizer has ever stepped.

    Gradients may be accumulated over many micro-batches, so this is asked late.
    """

    backwards: int = 100

    name: ClassVar[str] = "unstepped"

    def __post_init__(self) -> None:
        check_steps(self, "backwards")

    def holds(self, columns: Columns) -> np.ndarray:
        """Where so many backwards have come in one step."""
        return of_whole_model(columns, columns.backward + 1 >= self.backwards)

    def findings(self, history: History, rows: Sequence[int]) -> Iterator[Finding]:
        """One of the model."""
        newest = newest_of(history)
        if history.newest(Stage.USED) is not None or history.steps() != [newest.step]:
            return
        yield Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.WARNING,
            stage=newest.stage,
            seen=f"{newest.backward + 1} backward passes, and no optimizer that gradlens watches has stepped yet",
            causes=(
                "optimizer.step() is missing, or in a branch that is never taken",
                "the optimizer that steps is another one than watch() was given",
                "gradients are accumulated over very many micro-batches",
            ),
            remedy="call optimizer.step() after backward(), or give the optimizer that steps to gradlens.watch()",
            value=float(newest.backward + 1),
        )
