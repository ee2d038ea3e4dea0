"""What the gradients' pattern says of how a model was made: equal weights, huge inputs, a signal that fades over depth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import Columns, History
from gradlens.analysis.rules.base import (
    BlockCondition,
    ColumnRule,
    check_number,
    check_steps,
    format_number,
    judged,
    layout,
    newest_of,
    on_steps,
    tristate,
)
from gradlens.analysis.rules.learning import last_spread
from gradlens.analysis.rules.occasional import Occasional, features, graphs, loss_trend, newest_step, used
from gradlens.analysis.trend import State
from gradlens.records import Finding, Severity, Snapshot, Stage, Status


@dataclass(frozen=True)
class Identical(ColumnRule):
    """All partials of a weight are the same number, at each of the last steps: its units are copies of each other.

    Units that start with the same weights get the same gradient and stay the same (symmetry is broken by random
    initialisation). `spread`: the standard deviation of the partials beside their rms; a healthy weight has near 1.
    """

    spread: float = 1e-4
    steps: int = 3

    name: ClassVar[str] = "identical"
    stages: ClassVar[tuple[str, ...]] = (Stage.USED,)

    def __post_init__(self) -> None:
        check_number(self, "spread", most=0.1)
        check_steps(self)

    def conditions(self) -> tuple[tuple[BlockCondition, int], ...]:
        """Partials that are one number for some steps, and weights that begin with entries of one size."""
        return ((self.holds, self.steps), (_constant, 1))

    def findings(self, history: History, rows: Sequence[int], constant: Sequence[int]) -> Iterable[Finding]:
        """Of what begins so, one for all; of partials one a parameter."""
        newest = newest_of(history)
        if constant:
            yield self._initial(newest, tuple(newest.names[row] for row in constant))
        yield from (self._finding(newest, row) for row in rows)

    def holds(self, columns: Columns) -> np.ndarray:
        """Where all partials of a weight are the same number."""
        of = columns.columns
        known = layout(columns.parameters).matrix & columns.has(Status.OK) & (of["numel"] >= 4)
        n = np.maximum(of["numel"], 1)
        with np.errstate(invalid="ignore"):
            mean, square = of["sum"] / n, of["square_sum"] / n
            same = (square > 0) & (np.abs(square - mean**2) < self.spread**2 * square)
        return tristate(same & (of["zero"] == 0), known)

    def _finding(self, newest: Snapshot, row: int) -> Finding:
        return Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.WARNING,
            parameter=newest.names[row],
            stage=newest.stage,
            seen=f"all {int(newest.columns['numel'][row])} partials are the same number "
            f"({format_number(float(newest.column('mean')[row]))}) "
            f"{on_steps(self.steps)}: its units are identical and stay so",
            causes=(
                "a constant initialisation (nn.init.constant_, ones_, zeros_): nothing breaks the symmetry of the units",
            ),
            remedy="initialise weights at random: nn.init.kaiming_normal_ or torch's default; biases may be constant",
            value=0.0,
        )

    def _initial(self, newest: Snapshot, names: tuple[str, ...]) -> Finding:
        return Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.WARNING,
            stage=newest.stage,
            seen=f"{len(names)} weights begin with entries of one and the same size ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}): their units are identical, get identical gradients and stay so",
            causes=(
                "a constant initialisation (nn.init.constant_, ones_, fill_): nothing breaks the symmetry of the units",
            ),
            remedy="initialise weights at random: nn.init.kaiming_normal_ or torch's default; biases may be constant",
            parameters=names,
            parameter=names[0],
            value=float(len(names)),
        )


def _constant(columns: Columns) -> np.ndarray:
    """At the first moment, weights whose entries have one size, where they are most of the model's: one may be a scale.

    Half of the weights of low-rank adapters begin at 0 and are well; more than half at 0 pass nothing.
    """
    of = columns.columns
    matrix = layout(columns.parameters).matrix & judged(columns) & (of["numel"] >= 4)
    empty = of["weight_abs_max"] == 0
    with np.errstate(invalid="ignore"):
        even = of["weight_square_sum"] > (1 - 1e-6) * of["numel"] * of["weight_abs_max"] ** 2
    constant = matrix & (even | (empty & (of["weight_square_sum"] == 0)))
    count, zeros = constant.sum(axis=1, keepdims=True), (constant & empty).sum(axis=1, keepdims=True)
    begins = (columns.first is None) | (columns.step == (-1 if columns.first is None else columns.first.step))
    half = 0.5 * matrix.sum(axis=1, keepdims=True)
    many = (count >= 2) & ((count - zeros >= half) | (count > half))
    return (constant & many & np.asarray(begins)[:, None]).astype(np.int8)


#: |dw| / |w| of the whole model, of a step that leaves little of what it was.
LEAP = 0.5


@dataclass(frozen=True)
class InputScale(Occasional):
    """Inputs far from unit size, and a loss that does not fall.

    The first layer's gradient is the gradient of its output times its input, so inputs of a thousand make steps a thousand
    times too large there (LeCun et al. 1998). The size is read from what the first layer keeps for its backward; where that
    is not there, from |gW| / |gb| of the first layer, which is the inputs' length. Where the loss falls and no step moved
    the weights by more than half of their norm, it is an info: a small learning rate makes up for it.
    """

    size: float = 20.0

    name: ClassVar[str] = "input_scale"

    def __post_init__(self) -> None:
        check_number(self, "size", above=1.0)

    def look(self, history: History) -> Iterator[Finding]:
        """Of the inputs, or of the first layer with a weight and a bias."""
        trend = loss_trend(history)
        if trend.state in (State.UNKNOWN, State.YOUNG):
            return
        looks = [fact for layer, facts in features(history).items() if layer.startswith("input:") for fact in facts[:3]]
        size = max((fact.rms for fact in looks), default=math.nan)
        if not size > self.size:
            return
        layer = looks[0].layer.partition(":")[2]
        _, ratios = history.course.series("ratio")
        leapt = len(ratios) > 0 and float(np.nanmax(ratios)) > LEAP
        yield Finding(
            rule=self.name,
            step=newest_step(history),
            severity=Severity.WARNING if trend.ill or leapt else Severity.INFO,
            seen=f"the inputs of {layer!r} have an rms of {format_number(size)}: they are not normalised"
            + (
                ", and the loss does not fall"
                if trend.ill
                else ", and a step moved the weights by half of themselves" * leapt
            ),
            causes=("input data on their own scale: pixels up to 255, prices, raw sensor values",),
            remedy="normalise the inputs to mean 0 and standard deviation 1 with the training set's numbers; or begin the "
            "model with a BatchNorm",
            value=size,
        )


@dataclass(frozen=True)
class Fading(Occasional):
    """A gradient that shrinks by a steady factor from layer to layer towards the input, or grows so, with a flat loss.

    Biases are compared where there are some, as their gradient is the backpropagated signal itself. Healthy deep networks
    were measured at a factor of 3 over seven layers; one of default initialisation at 280, one of sigmoids at 400,000. The
    loss must be flat: a network that learns has found its way.
    """

    factor: float = 50.0
    layers: int = 4

    name: ClassVar[str] = "fading"

    def __post_init__(self) -> None:
        check_number(self, "factor", above=1.0)
        check_steps(self, "layers")

    def look(self, history: History) -> Iterator[Finding]:
        """Of the newest gradient that was used."""
        trend = loss_trend(history)
        newest = used(history)
        if newest is None or trend.state not in (State.FLAT, State.RISES):
            return
        biases, weights = _along(newest)
        sizes = biases if len(biases) >= max(self.layers, len(weights) // 2) else weights
        spread = last_spread(history)
        if len(sizes) < self.layers or spread > 0.2 or trend.points < 40:
            return
        slope, steady = _slope(sizes)
        along, _ = _slope(weights)
        whole = math.exp(abs(slope) * (len(sizes) - 1))
        if steady < 0.85 or whole < self.factor or slope * along <= 0 or abs(along) * (len(weights) - 1) < math.log(10):
            return
        fades, each = slope > 0, math.exp(abs(slope))
        causes = (_WEAK, _SATURATED)
        sigmoids = sum(op.name in ("Sigmoid", "Tanh") for graph in graphs(history) for op in graph.operations)
        yield Finding(
            rule=self.name,
            step=newest_step(history),
            severity=Severity.WARNING,
            seen=f"the gradient {'fades' if fades else 'grows'} by a factor of {each:.1f} from layer to layer towards the "
            f"input, "
            f"{format_number(whole)} over {len(sizes)} layers, and the loss does not fall"
            + (
                f"; what reaches the last layer differs by {format_number(spread)} of its size between examples"
                if spread < 1
                else ""
            ),
            causes=(causes[::-1] if sigmoids >= 3 else causes) if fades else (_STRONG,),
            remedy="nn.init.kaiming_normal_(weight, nonlinearity='relu') with ReLU; normalisation layers or residual "
            "connections in a deep model",
            value=whole,
        )


_WEAK = (
    "weights that start too small for the depth: the gradient vanishes (torch's default initialisation, without "
    "normalisation)"
)
_SATURATED = "sigmoid or tanh in a deep stack: each passes on a quarter of the gradient at most, and it vanishes"
_STRONG = "weights that start too large for the depth: the gradient explodes towards the input"


def _slope(sizes: np.ndarray) -> tuple[float, float]:
    """By how much the logarithm rises from layer to layer, and how steadily (a correlation)."""
    logs, depth = np.log(sizes), np.arange(len(sizes))
    if np.ptp(logs) == 0:
        return 0.0, 0.0
    return float(np.polyfit(depth, logs, 1)[0]), abs(float(np.corrcoef(depth, logs)[0, 1]))


def _along(snapshot: Snapshot) -> tuple[np.ndarray, np.ndarray]:
    """The rms of the gradient of each layer's bias and weight, in model order, of layers with a weight.

    A bias whose gradient cancels out (behind a normalisation, or under a loss of differences) tells nothing.
    """
    where, ok = layout(snapshot.parameters), snapshot.has(Status.OK)
    rms = np.where(ok, snapshot.column("rms"), np.nan)
    biases, weights = [], []
    for layer in range(len(where.front)):
        rows = np.flatnonzero(where.layer == layer)
        if not where.weighty[layer]:
            continue
        flat = [row for row in rows if not where.matrix[row] and rms[row] > 0]
        steep = [row for row in rows if where.matrix[row] and rms[row] > 0]
        if flat and steep and rms[flat[0]] > 1e-3 * rms[steep[0]]:
            biases.append(float(rms[flat[0]]))
        if steep:
            weights.append(float(rms[steep[0]]))
    return np.asarray(biases), np.asarray(weights)
