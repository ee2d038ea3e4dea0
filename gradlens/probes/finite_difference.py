"""Partials checked against their definition: one weight moved, all others held fixed.

    dL/dw_i  =?  (L(w + h e_i) - L(w - h e_i)) / 2h,   in float64, with h = 1e-5 max(1, |w_i|)

The loss is evaluated with the same random numbers and the same buffers each time, on private copies of the weights. A weight
whose partial does not agree at that step is tried at a longer and at a shorter one, so that neither curvature nor rounding
nor a kink nearby is taken for an error. Where the slopes to the left and to the right differ at all of them (a ReLU at 0),
any partial between the two is right, and the row says `kink`.

The tolerance of a row is 1e-4 of the partial, plus 1e-6 of its parameter's largest, plus what the rounding of the loss can
do to the difference (measured: the loss is computed again with every weight moved by about one unit in its last place).
What this cannot see: weights that were not drawn (padding rows of embeddings, 0 by declaration, never are). What it
reports though it may be meant: straight-through estimators, and forwards that write into their weights
(`Embedding(max_norm=)`), whose partials are not those of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradlens import markup
from gradlens.errors import ArgumentError, ProbeError
from gradlens.probes.interrupts import leaves_no_trace
from gradlens.probes.isolated_loss import IsolatedLoss
from gradlens.probes.loss import Target
from gradlens.probes.per_weight import unravelled
from gradlens.probes.second_order import kept_at_zero
from gradlens.progress import tracked
from gradlens.records import Parameters
from gradlens.selection import Select
from gradlens.weight_names import label

if TYPE_CHECKING:
    import pandas as pd

STEPS = (1e-5, 1e-4, 1e-6)  #: relative to max(1, |w|): the best one first, the others before crying wolf
RELATIVE = 1e-4  #: truncation stays below 1e-6 on smooth losses, and no wrong backward is off by as little as this
OF_LARGEST = 1e-6  #: truncation does not shrink with the partial: allow this share of the parameter's largest one
ROUNDING = 10  #: times the measured rounding noise of the loss


@dataclass(frozen=True, eq=False, repr=False)
class PartialsCheck(markup.Shown):
    """What `check_partials` found. `ok`: no partial was wrong."""

    frame: pd.DataFrame  #: a row a weight: `parameter, index, value, partial, difference, error, tolerance, result`
    weights: int  #: how many there are to draw from
    missed: tuple[str, ...]  #: parameters of which none was drawn
    narrow: tuple[str, ...]  #: operations that could not be computed in float64

    @property
    def ok(self) -> bool:
        """Whether all partials that were checked are right, or lie at a kink."""
        return not (self.frame["result"] == "wrong").any()

    def __str__(self) -> str:
        counts = self.frame["result"].value_counts()
        kinks = f", {counts['kink']} at a kink" if counts.get("kink") else ""
        lines = [
            f"partials are {'right' if self.ok else 'WRONG'}: {counts.get('right', 0)} of {len(self.frame)} drawn "
            f"agree with central differences{kinks} ({self.weights:,} weights in all)"
        ]
        wrong = self.frame[self.frame["result"] == "wrong"].sort_values("error", ascending=False)
        for name, index, partial, difference in wrong[["parameter", "index", "partial", "difference"]].head(10).values:
            lines.append(
                f"  {label(name, index)}: partial {partial:.6g}, but the loss changes at a rate of {difference:.6g}"
            )
        if len(wrong):
            lines.append(
                "  likely: a custom autograd.Function with a wrong backward; a value cut off by detach(), .data, .item() or "
                "no_grad(); a tensor changed in place where autograd does not see it; a straight-through estimator (meant)"
            )
        if not self.frame["partial"].any():
            lines.append("  every partial checked is 0: little was put to test")
        size = self.frame["partial"].abs()
        hidden = (size > 1e-10 * size.max()) & (size <= self.frame["tolerance"])  # what is below that is 0 but for rounding
        if hidden.any():
            lines.append(
                f"  {hidden.sum()} of them are too small beside the loss to be told from its rounding: leave out of it what "
                f"they do not bear on"
            )
        if self.missed:
            lines.append(
                f"  nothing was drawn from {len(self.missed)} parameters ({', '.join(self.missed[:3])}, ...): raise k"
            )
        if self.narrow:
            lines.append(f"  computed in less than float64, so less exact: {', '.join(self.narrow)}")
        return "\n".join(lines)


@leaves_no_trace
def check_partials(
    model: Target,
    loss_fn: Callable[[Any], Tensor],
    k: int = 32,
    *,
    select: Select = None,
    seed: int = 0,
    progress: bool | None = None,
) -> PartialsCheck:
    """Check `k` partials of `loss_fn(model)` against central differences in float64.

    The weights are drawn by `seed`: of each parameter its most sensitive one first, then others at random, parameters in
    turn, so that k should be at least the number of parameters. Costs two evaluations of the loss a weight, six in doubt.

    Raises `ProbeError` when the loss ignores its argument, differs from call to call, or is not finite.

    >>> print(check_partials(model, lambda model: criterion(model(x), y)))  # doctest: +SKIP
    """
    if k < 1:
        raise ArgumentError(f"k is the number of weights to check, at least 1, not {k}")
    with IsolatedLoss(model, loss_fn, select=select, wide=True) as isolated:
        loss, partials = isolated.gradient()
        gradient = [torch.zeros_like(w) if g is None else g for g, w in zip(partials, isolated.weights, strict=True)]
        noise = _noise(isolated, loss.item(), seed)
        places = _draw(
            gradient, [kept_at_zero(owner, w) for owner, w in zip(isolated.owners(), gradient, strict=True)], k, seed
        )
        rows = [
            _row(isolated, gradient, place, loss.item(), noise)
            for place in tracked(places, "checking partials", len(places), progress)
        ]
        weights = sum(w.numel() for w in isolated.weights)
        return _result(isolated.parameters, rows, weights, isolated.narrow)


@dataclass(frozen=True)
class _Row:
    parameter: int
    index: int
    value: float
    partial: float
    difference: float
    tolerance: float
    result: str


def _evaluate(isolated: IsolatedLoss) -> float:
    isolated.rewind()
    return isolated.loss()


def _noise(isolated: IsolatedLoss, loss: float, seed: int) -> float:
    """How far rounding moves the loss; an error when something else does."""
    if not np.isfinite(loss):
        raise ProbeError(
            f"the loss is {loss}: there is nothing to compare at this point; check a batch whose loss is finite"
        )
    again = _evaluate(isolated)
    size = max(abs(loss), abs(again))
    if abs(again - loss) > 1e-9 * size:
        raise ProbeError(
            f"loss_fn gives {loss:.9g} and then {again:.9g} at the same weights with the same random numbers: fix the batch "
            f"outside of it (no next(iterator)), and draw from torch's, numpy's or Python's global generators only"
        )
    held, random = [w.detach().clone() for w in isolated.weights], torch.Generator().manual_seed(seed)
    moved = [again]
    for _ in range(4):
        for w, kept in zip(isolated.weights, held, strict=True):
            signs = torch.randint(0, 2, w.shape, generator=random).to(w) * 2 - 1
            _set(w, kept * (1 + 2.0**-52 * signs))
        moved.append(_evaluate(isolated))
    for w, kept in zip(isolated.weights, held, strict=True):
        _set(w, kept)
    return max(abs(other - loss) for other in moved) + 2.0**-52 * size


def _set(w: Tensor, value: Tensor | float) -> None:
    with torch.no_grad():
        w.copy_(value) if isinstance(value, Tensor) else w.fill_(value)


def _draw(gradient: Sequence[Tensor], skipped: Sequence[range], k: int, seed: int) -> list[tuple[int, int]]:
    """(parameter, flat index) of the weights to check: parameters in turn, of each the most sensitive weight first."""
    random = np.random.default_rng(seed)
    queues = []
    for position in random.permutation(len(gradient)):
        g = gradient[position].detach().reshape(-1).abs().nan_to_num(nan=torch.inf).cpu().numpy()
        if g.size:
            first = int(g.argmax())
            others = random.choice(g.size, size=min(k + len(skipped[position]), g.size), replace=False)
            drawn = [first, *others[others != first]]
            queues.append([(int(position), int(i)) for i in drawn if i not in skipped[position]])
    rounds = [queue[turn] for turn in range(k) for queue in queues if turn < len(queue)]
    return sorted(rounds[:k])


def _row(isolated: IsolatedLoss, gradient: Sequence[Tensor], place: tuple[int, int], loss: float, noise: float) -> _Row:
    position, index = place
    flat = gradient[position].reshape(-1)
    partial = flat[index].item()
    largest = flat.abs().nan_to_num(0, 0, 0).max().item()
    weight = isolated.weights[position].detach().view(-1)[index]
    value = weight.item()
    rows = []
    for step in STEPS:
        h = step * max(1.0, abs(value))
        above, below = (_moved(isolated, weight, value + move) for move in (h, -h))
        rows.append(_compared(place, value, partial, (below, loss, above), h, OF_LARGEST * largest + ROUNDING * noise / h))
        if rows[-1].result == "right":
            return rows[-1]
    return next((row for row in rows if row.result == "kink"), rows[0])


def _moved(isolated: IsolatedLoss, weight: Tensor, target: float) -> float:
    """The loss with one weight moved and all others as they are."""
    value = weight.item()
    _set(weight, target)
    try:
        return _evaluate(isolated)
    finally:
        _set(weight, value)


def _compared(place: tuple[int, int], value: float, partial: float, losses: Sequence[float], h: float, floor: float) -> _Row:
    below, at, above = losses
    difference, left, right = (above - below) / (2 * h), (at - below) / h, (above - at) / h
    tolerance = RELATIVE * max(abs(partial), abs(difference)) + floor
    if abs(partial - difference) <= tolerance:
        result = "right"
    elif abs(right - left) > tolerance and min(left, right) - tolerance <= partial <= max(left, right) + tolerance:
        result = "kink"
    else:  # not finite included
        result = "wrong"
    return _Row(*place, value, partial, difference, tolerance, result)


def _result(parameters: Parameters, rows: Sequence[_Row], weights: int, narrow: tuple[str, ...]) -> PartialsCheck:
    import pandas as pd

    frame = pd.DataFrame(
        {
            "parameter": pd.Series([parameters.names[row.parameter] for row in rows], dtype="str"),
            "index": pd.Series(
                [unravelled(np.array([row.index]), parameters.shapes[row.parameter])[0] for row in rows], dtype=object
            ),
            "value": [row.value for row in rows],
            "partial": [row.partial for row in rows],
            "difference": [row.difference for row in rows],
            "error": [abs(row.partial - row.difference) for row in rows],
            "tolerance": [row.tolerance for row in rows],
            "result": pd.Series([row.result for row in rows], dtype="str"),
        }
    )
    drawn = {row.parameter for row in rows}
    missed = tuple(name for i, name in enumerate(parameters.names) if i not in drawn and 0 not in parameters.shapes[i])
    return PartialsCheck(frame, weights, missed, narrow)


def _index(shape: tuple[int, ...], flat: int) -> tuple[int, ...]:
    return unravelled(np.array([flat]), shape)[0]
