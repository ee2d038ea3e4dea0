"""Gradients that do not reach a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import Columns, History
from gradlens.analysis.rules.base import (
    BlockCondition,
    ColumnRule,
    RowFindings,
    Rows,
    by_layer,
    check_number,
    check_steps,
    format_number,
    layout,
    newest_of,
    of_whole_model,
    on_steps,
    remembered,
)
from gradlens.records import Finding, Severity, Snapshot, Status

#: A layer stronger than this is no measure for the others: it may be the one that explodes.
STRONG = 1.0
#: Fewer weak layers in a row than this may be a matter of what they do, not of where they are.
RUN = 3


@dataclass(frozen=True)
class Vanishing(ColumnRule):
    """Partials that are tiny beside those of the strongest layer, in several layers in a row, at each of the last steps.

    The measure is a ratio: in a healthy model gradients shrink too while it converges, but together. Layers are compared, by
    their strongest parameter and over the partials that are not 0: the bias before a normalisation has no gradient in a
    healthy model either, and an embedding only that of the words in the batch.

    A gradient that vanishes does so along the depth, so the layer must be one of at least three weak ones in a row, or the
    weak ones must begin at the first layer. Queries and keys of a young transformer, whose attention is still uniform, are
    weak as well, and healthy: ratios down to 4e-7 were measured.

    A sigmoid passes on at most a quarter of the gradient (Bengio et al. 1994; Glorot and Bengio 2010): 12 layers make 1e-9
    of it.

    `floor`: if even the strongest layer is below it, the whole gradient has vanished. It is the epsilon of Adam, which does
    not make up for smaller gradients.
    """

    ratio: float = 1e-4
    steps: int = 10
    floor: float = 1e-8

    name: ClassVar[str] = "vanishing"

    def __post_init__(self) -> None:
        check_number(self, "ratio", most=0.1)
        check_number(self, "floor")
        check_steps(self)

    def conditions(self) -> tuple[tuple[BlockCondition, int], ...]:
        """The whole gradient is tiny; or that of some layers is."""
        return ((self._whole, self.steps), (self._weak, self.steps))

    def findings(self, history: History, whole: Sequence[int], rows: Sequence[int]) -> Iterable[Finding]:
        """One of the model; else one a layer."""
        newest = newest_of(history)
        if whole:
            return [self._everything(history, newest)]
        if _strength(newest).max(initial=-np.inf) < self.floor:
            return ()
        return RowFindings(self.name, Severity.WARNING, newest, rows, lambda row: self._finding(newest, row))

    def _finding(self, newest: Snapshot, row: int) -> Finding:
        where, strength = layout(newest.parameters), _strength(newest)
        best = int(np.argmax(strength))
        own = strength[where.layer[row]]
        return Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.WARNING,
            parameter=newest.names[row],
            stage=newest.stage,
            seen=f"the rms of its partials is {format_number(own)}, that of {newest.names[where.front[best]]} is "
            f"{format_number(strength[best])}; the ratio was below {format_number(self.ratio)} {on_steps(self.steps)}",
            causes=(
                "saturating activations (sigmoid, tanh) in a deep stack",
                "weights that start too small",
                "a branch that is multiplied by almost 0 (a gate, a LayerScale), or a loss term with a tiny factor",
            ),
            remedy="use ReLU or GELU with the initialisation made for it (kaiming_normal_), normalisation layers, or "
            "residual connections; `lens.table()` shows where along the model rms falls",
            value=float(own / strength[best]),
        )

    def _everything(self, history: History, newest: Snapshot) -> Finding:
        strongest = _strength(history.first()).max(initial=-np.inf)
        converged = not 0 < strongest < self.floor
        return Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.INFO if converged else Severity.WARNING,
            stage=newest.stage,
            seen=f"even the strongest layer's partials have an rms of only {format_number(_strength(newest).max())}, "
            f"{on_steps(self.steps)}",
            causes=("the training has converged",)
            if converged
            else (
                "the output is saturated: a sigmoid or softmax far out, with a loss that is flat there (MSE on them)",
                "the loss is multiplied by a tiny number",
            ),
            remedy="stop here, or go on with a smaller weight decay"
            if converged
            else "use the loss on logits (cross_entropy, binary_cross_entropy_with_logits), and look at the outputs' scale",
            value=float(_strength(newest).max()),
        )

    def _weak(self, columns: Columns) -> np.ndarray:
        """On the rows that stand for layers with weights."""
        where, strength = layout(columns.parameters), _strength(columns)
        result = np.full(columns.status.shape, -1, np.int8)
        known = where.weighty & (strength > 0)
        limit = self.ratio * np.minimum(strength.max(axis=-1, initial=-np.inf), STRONG)
        weak = known & (strength < limit[:, None])
        result[:, where.front] = np.where(known, 0, -1)
        for moment in np.flatnonzero(weak.any(axis=-1)):
            there = known[moment]
            leading = bool(there[np.argmax(where.weighty)])
            result[moment, where.front[there]] = _in_a_row(weak[moment, there], leading)
        return result

    def _whole(self, columns: Columns) -> np.ndarray:
        strongest = _strength(columns).max(axis=-1, initial=-np.inf)
        return of_whole_model(columns, strongest < self.floor, strongest > 0)


def _in_a_row(weak: np.ndarray, leading: bool) -> np.ndarray:
    """Which weak ones are among `RUN` neighbours, or among the first where the first is the model's first."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], weak, [False]])))
    result = np.zeros(len(weak), bool)
    for start, stop in edges.reshape(-1, 2):
        result[start:stop] = stop - start >= RUN or (leading and start == 0)
    return result


@remembered
def _strength(rows: Rows) -> np.ndarray:
    """`[..., layers]` the largest rms of a layer's parameters, over the partials that are not 0; -inf of none."""
    moving = rows.columns["positive"] + rows.columns["negative"]
    known = rows.has(Status.OK) & (moving > 0)
    return by_layer(rows, np.where(known, np.sqrt(rows.columns["square_sum"] / np.maximum(moving, 1)), np.nan))
