"""Verdicts put to the test: move the weights a little as they say, and see what the loss does.

    predicted = sum_i dL/dw_i dw_i        with dw_i = +size (increase), -size (decrease), 0 (undecided)
    actual    = L(w + dw) - L(w)          averaged over batches, the same random numbers on both sides

On the surveyed batches the two differ by curvature (of order size^2), by dropout's other draws, and by rounding. On batches
that were held out they differ by sampling too, and by what the survey's choice of the largest means exaggerates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gradlens import markup
from gradlens.errors import ArgumentError, ArgumentTypeError, nearest
from gradlens.probes.batches import Sizes, check_batches, counted, generators, noted_if_one_batch
from gradlens.probes.interrupts import leaves_no_trace
from gradlens.probes.isolated_loss import IsolatedLoss
from gradlens.probes.loss import Target
from gradlens.probes.memory import Need, state_memory, stored
from gradlens.probes.verdicts import MOVE, Survey, numbered
from gradlens.statistics.evidence import VERDICTS
from gradlens.weight_names import known_name

if TYPE_CHECKING:
    import pandas as pd

SIGN = {"increase": 1.0, "decrease": -1.0, "undecided": 0.0}
NEEDED = ("parameter", "index", "verdict", "partial")


@dataclass(frozen=True, eq=False, repr=False)
class Nudge(markup.Shown):
    """What moving the weights did to the loss."""

    losses: np.ndarray  #: a row a batch: its size, the loss before and after
    predicted: float  #: first-order change, from the partials of the verdicts
    noise: float  #: standard error of `actual`: the spread of the change over batches, and the rounding of the losses
    rounding: float  #: that part of the noise which is rounding
    moved: int  #: how many weights had a verdict
    rounded_away: int  #: of these, how many did not move, since `size` is lost in the precision of their storage
    size: float

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row a batch: `size, before, after, change`."""
        import pandas as pd

        size, before, after = self.losses.T
        return pd.DataFrame({"size": size, "before": before, "after": after, "change": after - before})

    @property
    def actual(self) -> float:
        """The change of the mean loss; NaN where a loss is not finite."""
        size, before, after = self.losses.T
        with np.errstate(invalid="ignore"):
            return float(np.average(after - before, weights=size))

    @property
    def spoiled(self) -> tuple[int, ...]:
        """The batches, from 0, whose loss was not finite before or after."""
        return tuple(np.flatnonzero(~np.isfinite(self.losses[:, 1:]).all(axis=1)).tolist())

    @property
    def share(self) -> float:
        """The actual change as a share of the predicted one; NaN where none was predicted."""
        return self.actual / self.predicted if self.predicted else float("nan")

    def _first(self) -> str:
        """What came of it, in one sentence."""
        if self.spoiled:
            was = "were" if len(self.spoiled) > 1 else "was"
            return (
                f"nothing can be said: the loss of {numbered(self.spoiled)} {was} not finite; leave it out, or find the "
                f"operation by trace_nonfinite"
            )
        if not self.predicted:
            return "nothing was predicted: no verdict says which way a weight should move"
        if abs(self.predicted) < self.noise and abs(self.actual) < 2 * self.noise:
            return "too small to tell: the predicted change is within the noise; take a larger size or more batches"
        if abs(self.share) < 0.05:
            return (
                "the loss hardly changed: these partials are not those of this loss at these weights (captured before "
                "a step, scaled, or of another batch?); survey again"
            )
        if self.share < 0:
            return "the loss changed the OTHER way: the verdicts do not hold on these batches, or the size is too large"
        if self.share > 0.5:
            return "the loss changed as the partials predict: the verdicts hold on these batches"
        return (
            "the loss changed by less than predicted: other batches than were surveyed, or curvature (take a smaller size)"
        )

    def __str__(self) -> str:
        text = self._first() + (
            f"\n  moved {self.moved:,} weights by {self.size:g}: predicted change of the loss {self.predicted:.4g}, "
            f"actual {self.actual:.4g} ± {self.noise:.2g} over {len(self.losses)} batches"
        )
        if self.predicted:
            text += f" ({self.share:.1%} of the prediction)"
        if self.rounded_away:
            text += f"; {self.rounded_away:,} did not move, {self.size:g} being too little for their storage type"
        if self.moved and self.rounding > abs(self.predicted) / 10:
            text += f"; rounding alone makes ± {self.rounding:.2g}: take a larger size"
        return text


@leaves_no_trace
def nudge(
    model: Target,
    loss_fn: Callable[[Any, Any], Tensor],
    verdicts: Survey | pd.DataFrame,
    batches: Iterable[Any],
    size: float = MOVE,
    *,
    sizes: Sizes = None,
    progress: bool | None = None,
) -> Nudge:
    """Move the weights by `size` as the verdicts say, on a copy, and compare the change of the loss with the predicted one.

    `verdicts`: a survey, or a part of its `frame` (columns `parameter, index, verdict, partial`). `batches`: the surveyed
    ones, or others; `sizes` as in `survey`. Costs two evaluations of the loss a batch, and two copies of the weights.

    >>> print(nudge(model, loss_fn, survey(model, loss_fn, batches), held_out))  # doctest: +SKIP
    """
    if not isinstance(size, int | float) or not np.isfinite(size) or size == 0:
        raise ArgumentError(f"size is how far each weight moves, a finite number that is not 0, not {size!r}")
    check_batches(batches)
    isolated = IsolatedLoss(model, loss_fn, batched=True)
    isolated.keep(generators(batches))
    _state_memory(isolated, progress)
    with isolated, noted_if_one_batch(batches):
        moved, predicted, counts = _moved(isolated, verdicts, float(size))
        rows: list[tuple[float | None, float, float]] = []
        for batch, n in counted(batches, "nudging", progress, sizes):
            random = isolated.draws.state()
            before = isolated.loss(batch)
            if not rows:
                isolated.draws.settle(random)
            isolated.draws.put_back(random)
            rows.append((n, before, isolated.loss(batch, at=moved)))
        precision = max(torch.finfo(w.dtype).eps for w in isolated.weights)
    if not rows:
        raise ArgumentError("nudge needs at least one batch to see what the loss does")
    return _result(rows, predicted, precision, *counts, float(size))


def _state_memory(isolated: IsolatedLoss, progress: bool | None) -> None:
    weights = isolated.tensors()
    largest = max(w.numel() for w in weights)
    state_memory(
        "nudge",
        [Need(20 * largest, "the verdicts of one parameter")],
        [Need(stored(isolated.copied()) + stored(weights), "two copies of the weights")],
        weights,
        "move fewer parameters",
        progress,
    )


def _moved(
    isolated: IsolatedLoss, verdicts: Survey | pd.DataFrame, size: float
) -> tuple[list[Tensor], float, tuple[int, int]]:
    """The moved weights, a tensor a parameter; the change of the loss that is predicted; how many move, and do not."""
    if isinstance(verdicts, Survey):
        listed = _of_survey(isolated, verdicts)
    elif all(column in getattr(verdicts, "columns", ()) for column in NEEDED):
        listed = _of_frame(isolated, verdicts)
    else:
        raise ArgumentTypeError(
            f"verdicts are a survey, or its frame with the columns {', '.join(NEEDED)}, not {type(verdicts).__name__}"
        )
    moved = list(isolated.weights)  # what has no verdict is not copied
    predicted, wanted, lost = 0.0, 0, 0
    for name, flat, sign, partial in listed:
        position = isolated.parameters.position[name]
        w = isolated.weights[position].detach()
        predicted += size * float(np.dot(sign, np.where(sign != 0, partial, 0.0)))
        n = int(np.count_nonzero(sign))
        if n:
            at = slice(None) if flat is None else torch.from_numpy(flat).to(w.device)
            other = w.clone() if moved[position] is isolated.weights[position] else moved[position].detach()
            entries = other.view(-1)
            entries[at] += torch.from_numpy(sign).to(w.device, w.dtype) * size
            moved[position] = nn.Parameter(other)
            wanted, lost = wanted + n, lost + n - int((entries[at] != w.view(-1)[at]).count_nonzero())
    return moved, predicted, (wanted, lost)


#: Of one parameter: its name, and for some of its weights (None: all) the flat index, the sign of the move, and the partial.
Listed = tuple[str, np.ndarray | None, np.ndarray, np.ndarray]


def _of_survey(isolated: IsolatedLoss, survey: Survey) -> Iterator[Listed]:
    sign = np.array([SIGN[word] for word in VERDICTS], np.float32)
    known, verdict = survey.parameters, survey.results.verdict
    for name, shape, index, bounds in zip(known.names, known.shapes, survey.index, survey.bounds, strict=True):
        _check(isolated, name, shape)
        entries = slice(*bounds)
        decided = np.flatnonzero(verdict[entries])
        if 8 * len(decided) < len(verdict[entries]):  # in tables most are not
            flat, chosen = decided if index is None else index[decided], bounds[0] + decided
            yield name, flat, sign[verdict[chosen]], survey.results.mean[chosen]
        else:
            yield name, index, sign[verdict[entries]], survey.results.mean[entries]


def _of_frame(isolated: IsolatedLoss, frame: pd.DataFrame) -> Iterator[Listed]:
    for key, rows in frame.groupby("parameter", sort=False):
        name = known_name(str(key), isolated.parameters.names) or str(key)
        _check(isolated, name, None)
        shape = isolated.parameters.shapes[isolated.parameters.position[name]]
        axes = tuple(np.array(axis, np.int64) for axis in zip(*rows["index"], strict=True))
        try:
            flat = np.ravel_multi_index(axes, shape) if shape else np.zeros(len(rows), np.int64)
        except ValueError as error:
            raise ArgumentError(f"an index of {name!r} is outside of its shape {shape}: {error}") from None
        words = rows["verdict"].map(SIGN)
        if words.isna().any():
            raise ArgumentError(f"a verdict is one of {', '.join(SIGN)}, not {rows['verdict'][words.isna()].iloc[0]!r}")
        yield name, np.asarray(flat, np.int64), words.to_numpy(np.float64, copy=True), rows["partial"].to_numpy(np.float64)


def _check(isolated: IsolatedLoss, name: str, shape: tuple[int, ...] | None) -> None:
    known = isolated.parameters
    if name not in known.position:
        raise ArgumentError(f"there are verdicts on {name!r}, which this model does not have{nearest(name, known.names)}")
    has = known.shapes[known.position[name]]
    if shape is not None and shape != has:
        raise ArgumentError(f"the verdicts on {name!r} are for shape {shape}, and the model has {has}; survey this model")


def _result(
    rows: Sequence[tuple[float | None, float, float]],
    predicted: float,
    precision: float,
    moved: int,
    rounded_away: int,
    nudged: float,
) -> Nudge:
    losses = np.array([(n or 1, before, after) for n, before, after in rows], np.float64)
    size, before, after = losses.T
    share, k = size / size.sum(), len(rows)
    with np.errstate(invalid="ignore"):
        change = after - before
        spread = float(share @ (change - share @ change) ** 2 / (k - 1)) if k > 1 else float("nan")
    rounding = float(precision * np.abs(losses[:, 1:]).max() / k**0.5)
    noise = float(np.sqrt(spread + rounding**2))
    return Nudge(losses, predicted, noise, rounding, moved, rounded_away, nudged)
