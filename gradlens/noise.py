"""The gradient noise scale: the batch size above which larger batches bring little (McCandlish et al. 2018,
arXiv:1812.06162).

    B_noise = tr(Sigma) / |G|^2,   G the true gradient, Sigma the covariance of one micro-batch's

From the squared norms of K micro-batches' gradients g_k (or of K ranks' local ones) and of their mean alone, no gradient
stored: since E|g_k|^2 = |G|^2 + tr(Sigma) and E|mean|^2 = |G|^2 + tr(Sigma) / K,

    tr(Sigma) ~ (avg |g_k|^2 - |mean|^2) K / (K - 1),        |G|^2 ~ (K |mean|^2 - avg |g_k|^2) / (K - 1)

Both are unbiased, and they equal what the stored gradients would give. Their ratio is not, and |G|^2 may come out negative,
so each is smoothed over steps by itself before the ratio is taken. Norms must be of unclipped gradients of one scale. The
unit is micro-batches; times the examples of one it is examples. Micro-batches of n_k examples whose losses count c_k (sum K)
have, with the variance s of one example's gradient, the same two equations,

    sum |c_k g_k|^2 = |G|^2 sum c_k^2 + s sum c_k^2 / n_k,        |sum c_k g_k|^2 = |G|^2 K^2 + s sum c_k^2 / n_k

so that with equal c_k the examples of one micro-batch are the harmonic mean of the n_k. It speaks of the loss's gradient
in its own coordinates: an adaptive optimizer's critical batch size may differ.

The norms are in the snapshots of a step: each backward's own, and that of the gradient they add up to, as it was
accumulated, averaged over ranks, or used, from which uniform clipping is divided out. That they do add up is checked
parameter by parameter, by the sum of the partials, which is linear: a parameter whose backwards were of different losses,
at different weights, or cleared in between is left out. Micro-batches are exchangeable: where the norms of a step's
backwards differ by their place, step after step, they are something else (the two losses of a GAN, the passes of SAM,
micro-batches of unequal size that were not said to be), and there is no number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.records import PARTIAL, Snapshot, Stage, Status

if TYPE_CHECKING:
    import pandas as pd

#: What is read of a snapshot.
COLUMNS = ("numel", "sum", "abs_sum", "square_sum", "update_dot", "update_loss_dot", "update_loss_exact")
DECAY = 0.95
_EPS = {"float64": 2.0**-52, "complex128": 2.0**-52, "float32": 2.0**-23, "complex64": 2.0**-23, "float16": 2.0**-10}
_REACHED = (Status.OK, Status.ZERO)
#: The gradient that the backwards add up to, the best first: `used` needs its clipping divided out.
_TOGETHER = (Stage.USED, Stage.REDUCED, Stage.ACCUMULATED)


# --- from norms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """Estimates from one step: numbers, or an array with an entry a parameter. NaN where there was one micro-batch."""

    signal: Any  #: |G|^2; may be negative
    trace: Any  #: tr(Sigma) of one micro-batch's gradient


def estimate(squares: Any, *, summed: Any = None, averaged: Any = None) -> Noise:
    """Signal and noise of one step.

    `squares`: [K] or [K, parameters], the squared norms of the K gradients. Of the squared norm of all K together give one:
    `summed`, of their sum (accumulated in `.grad`), or `averaged`, of their mean (as DDP leaves it). Parameters add up.
    """
    squares = np.asarray(squares, np.float64)
    k = squares.shape[0] if squares.ndim else 0
    if k == 0 or (summed is None) == (averaged is None):
        raise ArgumentError("estimate needs each gradient's squared norm, and either that of their sum or of their mean")
    together = np.asarray(averaged, np.float64) if summed is None else np.asarray(summed, np.float64) / k**2
    return _unbiased(k, squares.mean(axis=0), together)


def _unbiased(k: int, alone: Any, together: Any) -> Noise:
    """From the mean of the squared norms, and the squared norm of the mean."""
    if k == 1:
        return Noise(np.full_like(together, np.nan)[()], np.full_like(together, np.nan)[()])
    return Noise(((k * together - alone) / (k - 1))[()], ((alone - together) * k / (k - 1))[()])


@dataclass(frozen=True)
class EMA:
    """Noise and signal smoothed over steps, each by itself; a step's weight falls by `decay` with each one after it."""

    decay: float = DECAY
    signal: Any = 0.0
    trace: Any = 0.0
    weight: Any = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ArgumentError(f"decay is the weight of a step against the one after it, in [0, 1), not {self.decay!r}")

    def after(self, noise: Noise) -> EMA:
        """With one more step; an estimate that tells nothing (K = 1, or not finite) changes nothing."""
        known = np.isfinite(noise.signal) & np.isfinite(noise.trace)
        if not np.any(known):
            return self
        add = np.where(known, 1 - self.decay, 0.0)
        return replace(
            self,
            signal=((1 - add) * self.signal + add * np.where(known, noise.signal, 0.0))[()],
            trace=((1 - add) * self.trace + add * np.where(known, noise.trace, 0.0))[()],
            weight=((1 - add) * self.weight + add)[()],
        )

    def scale(self, examples: float = 1.0) -> Any:
        """The noise scale, in micro-batches or, given the examples of one, in examples; NaN where |G|^2 is not above 0."""
        signal, trace = np.asarray(self.signal, np.float64), np.asarray(self.trace, np.float64)
        return np.divide(examples * trace, signal, out=np.full_like(signal, np.nan), where=signal > 0)[()]


def effective_size(sizes: Sequence[float] | np.ndarray, weighted: bool = False) -> float:
    """The examples of one micro-batch: of unequal ones whose losses count alike, the harmonic mean.

    Of unequal ones it is never a whole number, be it by the last bit: so a record of it says that they were.
    """
    n = np.asarray(sizes, np.float64)
    mean = float(n.mean() if weighted else len(n) / (1 / n).sum())
    return float(np.nextafter(mean, np.inf)) if mean.is_integer() and len(set(n.tolist())) > 1 else mean


def check_sizes(sizes: Any) -> np.ndarray | None:
    """The examples of each of a step's micro-batches, as given; None where they were not."""
    if sizes is None:
        return None
    try:
        found = np.atleast_1d(np.asarray(sizes, np.float64))
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            f"sizes is how many examples each micro-batch of a step has, [30, 2], not {sizes!r}"
        ) from None
    if found.ndim != 1 or not len(found) or not (np.isfinite(found) & (found > 0)).all():
        raise ArgumentError(f"sizes is how many examples each micro-batch of a step has, above 0, not {sizes!r}")
    return found


# --- from snapshots ---------------------------------------------------------------------------------------------------


class Step:
    """What the snapshots of one step say of its noise; they are taken as they come. `ranks`: that averaged gradients."""

    def __init__(self, step: int, ranks: int = 1, sizes: np.ndarray | None = None, weighted: bool = False) -> None:
        self.step, self.ranks = step, ranks
        self.names: tuple[str, ...] = ()
        self.backwards = 0  #: of all ranks
        self.norms: list[float] = []  #: squared, of each backward
        self._sizes, self._weighted = sizes, weighted
        self.batch_size = math.nan  #: examples of one
        self._summed: dict[str, np.ndarray] = {}
        self._together = np.empty((2, 0))  # sum and square_sum of the gradient of the whole step
        self._from = np.empty(0)  # the stage that it is of, by place in `_TOGETHER`
        self._tolerance = np.empty(0)

    def take(self, snapshot: Snapshot) -> None:
        """One more snapshot of the step."""
        self.batch_size = float(snapshot.scalars.get("batch_size", self.batch_size))
        if snapshot.stage == Stage.BACKWARD:
            self._begin(snapshot)
            self._add(snapshot)
        elif self.names and not (self.ranks > 1 and snapshot.stage == Stage.ACCUMULATED):
            self._compare(snapshot)

    def _begin(self, snapshot: Snapshot) -> None:
        if snapshot.names == self.names:
            return
        self.names, n = snapshot.names, len(snapshot)  # other parameters: what was summed up is of a model that was
        self.backwards, self.norms = 0, []
        self._summed = {name: np.zeros(n) for name in ("sum", "abs_sum", "square_sum", "reached")}
        self._numel = snapshot.columns["numel"].astype(np.float64)
        self._together, self._from = np.full((2, n), np.nan), np.full(n, -1)
        self._tolerance = np.array([_EPS.get(dtype, 2.0**-7) for dtype in snapshot.parameters.dtypes])

    def _add(self, snapshot: Snapshot) -> None:
        self.backwards += 1
        self.norms.append(float(np.nansum(snapshot.columns["square_sum"])))
        for name in ("sum", "abs_sum", "square_sum"):
            self._summed[name] += snapshot.columns[name]
        reached = np.isin(snapshot.status.astype(str), _REACHED)
        reached[[row for row, piece in enumerate(snapshot.parameters.pieces) if piece == PARTIAL]] = False
        self._summed["reached"] += reached

    def _compare(self, snapshot: Snapshot) -> None:
        """The gradient that the backwards are to add up to; of several stages the best."""
        place = {name: i for i, name in enumerate(self.names)}
        rows = [row for row, name in enumerate(snapshot.names) if name in place]
        at = np.array([place[snapshot.names[row]] for row in rows], np.int64)
        clip = _clip(snapshot)[rows] if snapshot.stage == Stage.USED else np.ones(len(rows))
        level = _TOGETHER.index(Stage(snapshot.stage))
        better = (level >= self._from[at]) & np.isin(snapshot.status[rows].astype(str), _REACHED)
        for i, (name, power) in enumerate((("sum", 1), ("square_sum", 2))):
            with np.errstate(divide="ignore", invalid="ignore"):  # clipped to nothing, what it was before is not known
                self._together[i, at[better]] = (snapshot.columns[name][rows] / clip**power)[better]
        self._from[at[better]] = level

    def each(self) -> Noise:
        """By parameter; NaN for those that are left out."""
        if self.backwards < 2 or not self._fits():
            return Noise(np.full(len(self.names), np.nan), np.full(len(self.names), np.nan))
        k, kept = self.backwards, self._adding()
        alone, together = self._summed["square_sum"] / self.ranks**2, self._together[1]
        if self._sizes is None or not self._weighted:
            noise = _unbiased(k, alone / k, together / k**2)
        else:
            noise = _unequal(self._sizes, alone, together)
        return Noise(np.where(kept, noise.signal, np.nan), np.where(kept, noise.trace, np.nan))

    def _adding(self) -> np.ndarray:
        """The parameters that every backward reached, and whose partials add up to the gradient of the step."""
        off = np.abs(self._summed["sum"] / self.ranks - self._together[0])
        allowed = (16 + self.backwards) * self._tolerance * self._summed["abs_sum"] / self.ranks
        return (self._summed["reached"] == self.backwards) & (off <= allowed)

    @property
    def examples(self) -> float:
        """Of one micro-batch; NaN where nobody said."""
        return self.batch_size if self._sizes is None else effective_size(self._sizes, self._weighted)

    def _fits(self) -> bool:
        return self._sizes is None or len(self._sizes) == self.backwards

    def whole(self) -> tuple[Noise, float]:
        """Of the model, and the share of its weights that are in it."""
        each = self.each()
        known = np.isfinite(each.trace)
        if not known.any():
            return Noise(math.nan, math.nan), 0.0
        share = float(self._numel[known].sum() / max(self._numel.sum(), 1))
        return Noise(float(each.signal[known].sum()), float(each.trace[known].sum())), share

    @property
    def reason(self) -> str:
        """Why there is no estimate; empty where there is."""
        if self.whole()[1]:
            return ""
        if not self.backwards:
            return "no backward's own gradient was read: add 'backward' to stage="
        if self.backwards == 1:
            return "one backward a step: there is nothing to compare it with (accumulate gradients over micro-batches)"
        if not self._fits():
            assert self._sizes is not None
            return f"sizes= has {len(self._sizes)} numbers, and a step had {self.backwards} micro-batches"
        if not np.isfinite(self._together[0]).any():
            return "the step's whole gradient before clipping is not known: add 'accumulated' to stage="
        return (
            "the backwards do not add up to the step's gradient: they were cleared in between (a closure), of several "
            "losses, or of ranks whose records are not here"
        )


def _unequal(sizes: np.ndarray, alone: Any, together: Any) -> Noise:
    """Of micro-batches whose losses count by their size; the noise is that of one of mean size."""
    k, c = len(sizes), sizes / sizes.mean()
    signal = (together - alone) / (k**2 - (c**2).sum())
    example = (alone - signal * (c**2).sum()) / (c**2 / sizes).sum()
    return Noise(signal, example / sizes.mean())


class Alike:
    """Whether a step's backwards are alike: over steps, their norms do not differ by their place in it."""

    LEAST, RATIO = 8, 1.1  #: steps that are needed, and by how much norms must differ

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, np.zeros(0), np.zeros(0)

    def take(self, norms: Sequence[float]) -> None:
        """The squared norms of one more step's backwards."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.log(np.asarray(norms[1:]) / norms[0]) / 2
        if len(ratios) != len(self._mean):
            self._count, self._mean, self._squares = 0, np.zeros(len(ratios)), np.zeros(len(ratios))
        if not np.isfinite(ratios).all():
            return
        self._count += 1
        off = ratios - self._mean
        self._mean = self._mean + off / self._count
        self._squares = self._squares + off * (ratios - self._mean)

    @property
    def ratio(self) -> float:
        """How many times the norm of one backward is that of another, surely; 1 where they are alike or it is not sure."""
        if self._count < self.LEAST or not len(self._mean):
            return 1.0
        freedom = self._count - 1
        error = np.sqrt(self._squares / freedom / self._count)
        sure = np.abs(self._mean) > (4 + 28 / freedom) * error + math.log(self.RATIO)
        return float(np.exp(np.abs(self._mean[sure]).max())) if sure.any() else 1.0


def _clip(used: Snapshot) -> np.ndarray:
    """What clipping multiplied each used gradient by; NaN where that is not known."""
    c = {name: np.asarray(used.columns.get(name, np.full(len(used), np.nan)), np.float64) for name in COLUMNS}
    ratio = np.full(len(used), np.nan)
    np.divide(c["update_dot"], c["update_loss_dot"], out=ratio, where=c["update_loss_dot"] != 0)
    return np.where(c["update_loss_exact"] == 1, 1.0, np.where(ratio > 0, ratio, np.nan))


@dataclass(frozen=True)
class Row:
    """One step of which the noise is known."""

    step: int
    backwards: int
    batch_size: float  #: of one backward; NaN if it was not observed
    signal: float
    trace: float
    noise_scale: float  #: smoothed up to this step
    share: float  #: of the weights that it rests on


class NoiseScaleEstimator:
    """Follows the noise scale over the snapshots of a run, as they come."""

    def __init__(
        self, decay: float = DECAY, ranks: int = 1, *, sizes: np.ndarray | None = None, weighted: bool = False
    ) -> None:
        self._ranks, self._sizes, self._weighted = ranks, sizes, weighted
        self._open = self._step(-1)
        self.alike = Alike()
        self.smoothed = EMA(decay)
        self.in_examples = EMA(decay)  #: the trace is that of one example's gradient
        self.parameters = EMA(decay)
        self.names: tuple[str, ...] = ()
        self.last: Step | None = None  #: of those with most backwards

    def take(self, snapshot: Snapshot) -> None:
        """The next snapshot; one of another step than the last ends that."""
        if snapshot.step != self._open.step:
            self.end()
            self._open = self._step(snapshot.step)
        self._open.take(snapshot)

    def _step(self, step: int) -> Step:
        return Step(step, self._ranks, self._sizes, self._weighted)

    def end(self) -> Row | None:
        """The open step is over: what it gave, or None."""
        if self._open.step < 0:
            return None
        step, self._open = self._open, self._step(-1)
        unequal = self._sizes is not None or not (math.isnan(step.examples) or step.examples.is_integer())
        if not unequal and self._ranks == 1 and step.backwards > 1:
            self.alike.take(step.norms)
        if self.last is None or step.backwards >= self.last.backwards:
            self.last = step
        noise, share = step.whole()
        if not share or self.alike.ratio > 1:
            return None
        if step.names != self.names:
            self.names, self.parameters = step.names, EMA(self.smoothed.decay)
        self.smoothed, self.parameters = self.smoothed.after(noise), self.parameters.after(step.each())
        self.in_examples = self.in_examples.after(Noise(noise.signal, noise.trace * step.examples))
        scale = float((self.smoothed if math.isnan(step.examples) else self.in_examples).scale())
        return Row(step.step, step.backwards, step.examples, noise.signal, noise.trace, scale, share)


@dataclass(frozen=True, eq=False)
class NoiseScale:
    """The noise scale of a run, smoothed over its steps; `float(...)` gives the number.

    NaN where nothing is known (`reason` says why) or noise hides the signal.
    """

    value: float
    unit: str  #: `examples` where the last step's `batch_size` was observed, else `micro-batches`
    signal: float  #: |G|^2, smoothed
    trace: float  #: tr(Sigma) of one micro-batch, smoothed
    rows: tuple[Row, ...]  #: the steps that it rests on
    names: tuple[str, ...]
    parameters: EMA  #: an entry a parameter
    reason: str  #: why there is no step to rest on; empty where there is

    def __float__(self) -> float:
        return self.value

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a step: `step, backwards, batch_size, signal, trace, noise_scale, share`.

        `noise_scale` is the smoothed one, `share` that of the weights which it rests on.
        """
        import pandas as pd

        return pd.DataFrame([vars(row) for row in self.rows], columns=list(Row.__annotations__))

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a parameter: `parameter, signal, trace, noise_scale`, smoothed, in micro-batches."""
        import pandas as pd

        scale = self.parameters
        weight = np.where(scale.weight > 0, scale.weight, np.nan)
        return pd.DataFrame(
            {
                "parameter": pd.Series(self.names, dtype="str"),
                "signal": scale.signal / weight,
                "trace": scale.trace / weight,
                "noise_scale": scale.scale(),
            }
        )

    def __str__(self) -> str:
        if not self.rows:
            return f"noise scale: not known ({self.reason})"
        last, steps = self.rows[-1], len(self.rows)
        of = "" if math.isnan(last.batch_size) else f" of {last.batch_size:g} examples"
        over = f"over {steps} step{'s' * (steps > 1)}, the last of {last.backwards} micro-batches{of}"
        if math.isnan(self.value):
            return f"noise scale: hidden by noise ({over}): larger than all of a step's micro-batches together"
        return (
            f"noise scale: {self.value:.3g} {self.unit} ({over}): {self._advice(last)}; well below it a batch twice as "
            f"large saves almost half of the steps, well above it hardly any"
        )

    def _advice(self, last: Row) -> str:
        """Whether a step's batch is large or small beside it."""
        size = last.backwards * (last.batch_size if self.unit == "examples" else 1)
        if size < self.value / 2:
            return f"a step of {size:g} is well below it, a larger batch pays"
        if size > 2 * self.value:
            return f"a step of {size:g} is well above it, a smaller batch would do"
        return f"a step of {size:g} is of that size, nothing to do"


def measured(
    snapshots: Iterable[Snapshot],
    *,
    decay: float = DECAY,
    ranks: int = 1,
    sizes: Sequence[float] | None = None,
    weighted: bool = False,
) -> NoiseScale:
    """The noise scale from the snapshots of a run, those of a step together, of all ranks that averaged their gradients.

    `sizes`: the examples of each of a step's micro-batches, where they are unequal; `weighted` says that their losses
    counted by size (a sum over examples), and not alike.
    """
    estimator, rows = NoiseScaleEstimator(decay, ranks, sizes=check_sizes(sizes), weighted=weighted), []
    for _, group in groupby(snapshots, key=lambda snapshot: snapshot.step):
        for snapshot in group:
            estimator.take(snapshot)
        rows.append(estimator.end())
    known = tuple(row for row in rows if row is not None) if estimator.alike.ratio == 1 else ()
    micro = not known or math.isnan(known[-1].batch_size)
    found = estimator.smoothed
    return NoiseScale(
        value=float((found if micro else estimator.in_examples).scale()) if known else math.nan,
        unit="micro-batches" if micro else "examples",
        signal=float(found.signal / found.weight) if known else math.nan,
        trace=float(found.trace / found.weight) if known else math.nan,
        rows=known,
        names=estimator.names,
        parameters=estimator.parameters,
        reason="" if known else _reason(estimator),
    )


def _reason(estimator: NoiseScaleEstimator) -> str:
    if estimator.last is None:
        return "nothing was captured yet"
    if estimator.alike.ratio > 1:
        return (
            f"the backwards of a step are not alike: the gradient of one is {estimator.alike.ratio:.2g} times that of "
            f"another, step after step, as with the two losses of a GAN or the passes of SAM; for micro-batches of "
            f"unequal size give sizes="
        )
    return estimator.last.reason
