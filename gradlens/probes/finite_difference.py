"""Partials checked against their definition: one weight moved, all others held fixed.

    dL/dw_i  =?  (L(w + h e_i) - L(w - h e_i)) / 2h,   in float64, with h = 1e-5 max(1, |w_i|)

The loss is evaluated with the same random numbers and the same buffers each time, on private copies of the weights. A weight
whose partial does not agree at that step is tried at a longer and at a shorter one, so that neither curvature nor rounding
nor a kink nearby is taken for an error. Where the slopes to the left and to the right differ at all of them (a ReLU at 0),
any partial between the two is right, and the row says `kink`.

The tolerance of a row is 1e-4 of the partial, plus 1e-6 of its parameter's largest, plus what the rounding of the loss can
do to the difference (measured: the loss is computed again with weights moved by about one unit in their last place). Where
an operation exists in float32 only, steps and tolerances are wider, and the result says so.
What this cannot see: weights that were not drawn (padding rows of embeddings, 0 by declaration, never are). What differs on
purpose (a straight-through estimator, a stopped gradient) is said by `allow=`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradlens import markup
from gradlens.errors import ArgumentError, ProbeError
from gradlens.probes.allowed import Allowed, parse_allowed
from gradlens.probes.interrupts import leaves_no_trace
from gradlens.probes.isolated_loss import IsolatedLoss
from gradlens.probes.loss import Target
from gradlens.probes.memory import Need, compact_numel, in_float64, state_memory
from gradlens.probes.per_weight import unravelled
from gradlens.probes.rows import Rows
from gradlens.probes.second_order import kept_at_zero, not_repeatable
from gradlens.progress import tracked
from gradlens.records import Parameters
from gradlens.selection import Select
from gradlens.weight_names import label

if TYPE_CHECKING:
    import pandas as pd

ROUNDING = 10  #: times the measured rounding noise of the loss
MOVED, RUNS = 1 << 14, 1 << 6  #: weights of a parameter that are moved to measure it, in so many runs of neighbours


@dataclass(frozen=True)
class Precision:
    """Steps and tolerances that fit what the loss is computed in."""

    steps: tuple[float, ...]  #: relative to max(1, |w|): the best one first, the others before crying wolf
    relative: float  #: truncation stays a hundredth of it on smooth losses, and no wrong backward is off by as little
    of_largest: float  #: truncation does not shrink with the partial: allow this share of the parameter's largest one
    unit: float  #: in the last place


FINE = Precision((1e-5, 1e-4, 1e-6), 1e-4, 1e-6, 2.0**-52)
COARSE = Precision((1e-2, 3e-2, 3e-3), 2e-2, 2e-3, 2.0**-23)  #: where an operation exists in float32 only


@dataclass(frozen=True)
class Row:
    """One weight: what backward says, and what the loss does."""

    parameter: int
    index: int
    value: float
    partial: float
    difference: float
    tolerance: float
    result: str


@dataclass(frozen=True, eq=False, repr=False)
class PartialsCheck(markup.Shown):
    """What `check_partials` found. `ok`: no partial was wrong."""

    rows: tuple[Row, ...]  #: one a weight
    parameters: Parameters
    weights: int  #: how many there are to draw from
    missed: tuple[str, ...]  #: parameters of which none was drawn
    narrow: tuple[str, ...]  #: operations that could not be computed in float64
    coarse: tuple[str, ...] = ()  #: of these, operations that do not exist in float64: tolerances are wider
    allowed: tuple[str, ...] = ()  #: what `allow` was given
    noise: float = 0.0  #: how far rounding moves the loss
    seed: int = 0

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row a weight: `parameter, index, value, partial, difference, error, tolerance, result`."""
        import pandas as pd

        names, shapes = self.parameters.names, self.parameters.shapes
        index = [unravelled(np.array([row.index]), shapes[row.parameter])[0] for row in self.rows]
        return pd.DataFrame(
            {
                "parameter": pd.Series([names[row.parameter] for row in self.rows], dtype="str"),
                "index": pd.Series(index, dtype=object),
                "value": [row.value for row in self.rows],
                "partial": [row.partial for row in self.rows],
                "difference": [row.difference for row in self.rows],
                "error": [abs(row.partial - row.difference) for row in self.rows],
                "tolerance": [row.tolerance for row in self.rows],
                "result": pd.Series([row.result for row in self.rows], dtype="str"),
            }
        )

    @property
    def ok(self) -> bool:
        """Whether all partials that were checked are right, lie at a kink, or were allowed to differ."""
        return not any(row.result == "wrong" for row in self.rows)

    def __str__(self) -> str:
        counts = self.frame["result"].value_counts()
        wrong = self.frame[self.frame["result"] == "wrong"].sort_values("error", ascending=False)
        lines = [self._first(counts)]
        for name, index, partial, difference in wrong[["parameter", "index", "partial", "difference"]].head(10).values:
            lines.append(
                f"  {label(name, index)}: partial {partial:.6g}, but the loss changes at a rate of {difference:.6g}"
            )
        if len(wrong):
            lines.append(
                "  likely: a custom autograd.Function with a wrong backward; a value cut off by detach(), .data, .item() or "
                "no_grad(); a tensor changed in place where autograd does not see it; an operation that is not deterministic"
            )
            lines.append(
                "  a straight-through estimator or a gradient stopped on purpose is meant to differ: check_partials(..., "
                "allow='detach') holds what is cut off, allow='encoder.*' leaves parameters out"
            )
        lines.append(
            f"  {len(self.frame)} weights drawn by seed {self.seed}, moved by {self.step:g} max(1, |w|); rounding moves the "
            f"loss by {self.noise:.1g}"
        )
        return "\n".join([*lines, *self._caveats()])

    @property
    def step(self) -> float:
        """How far a weight w was moved, in units of max(1, |w|); in doubt also further, and less far."""
        return (COARSE if self.coarse else FINE).steps[0]

    def _first(self, counts: Any) -> str:
        beside = "".join(f", {counts[word]} {said}" for word, said in _BESIDE.items() if counts.get(word))
        drawn = f"of {len(self.frame)} drawn"
        if not self.ok:
            return (
                f"partials are WRONG: {counts['wrong']} {drawn} do not agree with central differences; "
                f"{counts.get('right', 0)} agree{beside} ({self.weights:,} weights in all)"
            )
        return (
            f"partials are right: {counts.get('right', 0)} {drawn} agree with central differences{beside} "
            f"({self.weights:,} weights in all){'' if self._caveats() else '; nothing to do'}"
        )

    def _caveats(self) -> list[str]:
        lines = []
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
        if self.allowed:
            lines.append(f"  allowed: {', '.join(self.allowed)}")
        if self.coarse:
            lines.append(
                f"  {', '.join(self.coarse)} does not exist in float64 and was computed in less: steps are longer, and only "
                f"partials that are off by {COARSE.relative:.0%} and more are found"
            )
        others = [name for name in self.narrow if name not in self.coarse]
        if others:
            lines.append(f"  computed in less than float64, so less exact: {', '.join(others)}")
        return lines


_BESIDE = {"kink": "at a kink", "allowed": "allowed to differ"}


@leaves_no_trace
def check_partials(
    model: Target,
    loss_fn: Callable[[Any], Tensor],
    k: int = 32,
    *,
    allow: str | Sequence[str] | None = None,
    select: Select = None,
    seed: int = 0,
    progress: bool | None = None,
) -> PartialsCheck:
    """Check `k` partials of `loss_fn(model)` against central differences in float64.

    The weights are drawn by `seed`: of each parameter its most sensitive one first, then others at random, parameters in
    turn, so that k should be at least the number of parameters. Costs two evaluations of the loss a weight, six in doubt;
    memory, in float64: a copy of the weights and up to two gradients, those of sparse tables for the rows looked up.

    `allow="detach"` holds what the loss cuts off on purpose (`detach()`, `.data`, `no_grad()`) at its value, so that a
    straight-through estimator or a stopped gradient is checked as it is meant; a pattern of names (`allow="encoder.*"`) lets
    the partials of these parameters differ.

    Raises `ProbeError` when the loss ignores its argument, differs from call to call, or is not finite.

    >>> print(check_partials(model, lambda model: criterion(model(x), y)))  # doctest: +SKIP
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ArgumentError(f"k is the number of weights to check, at least 1, not {k!r}")
    allowed = parse_allowed(allow)
    with IsolatedLoss(model, loss_fn, select=select, wide=True, hold_cuts=allowed.cuts) as isolated:
        allowed.check(isolated.all_names)
        _state_memory(isolated, progress)
        loss, partials = isolated.gradient(sparse=True)
        isolated.draws.settle()
        rows = [Rows.of(g, w) for g, w in zip(partials, isolated.weights, strict=True)]
        gradient = [
            None if g is None else r.gradient(g, w) for r, g, w in zip(rows, partials, isolated.weights, strict=True)
        ]
        precision = COARSE if isolated.coarse else FINE
        noise = _noise(isolated, rows, loss.item(), seed, precision)
        skipped = [kept_at_zero(owner, w) for owner, w in zip(isolated.owners(), isolated.weights, strict=True)]
        largest = [(0, 0.0) if g is None else _largest(g) for g in gradient]
        places = _draw(largest, rows, skipped, k, seed)
        check = _Check(isolated, gradient, [size for _, size in largest], rows, loss.item(), noise, precision)
        found = [check.row(place) for place in tracked(places, "checking partials", len(places), progress)]
        if any(row.result == "wrong" for row in found) and isolated.watch_operations():
            found = [check.row(at) if row.result == "wrong" else row for at, row in zip(places, found, strict=True)]
        return _result(isolated, found, allowed, noise, seed)


def _state_memory(isolated: IsolatedLoss, progress: bool | None) -> None:
    weights = isolated.tensors()
    entries, largest = compact_numel(weights, isolated.owners())
    needs = [
        Need(in_float64(isolated.copied()), "a float64 copy of the weights"),
        Need(8 * (2 * entries + 2 * largest), "gradients, those of sparse tables left out"),
    ]
    state_memory("check_partials", [], needs, weights, "check some parameters (select=)", progress)


def _evaluate(isolated: IsolatedLoss) -> float:
    isolated.draws.rewind()
    return isolated.loss()


def _noise(isolated: IsolatedLoss, rows: Sequence[Rows], loss: float, seed: int, precision: Precision) -> float:
    """How far rounding moves the loss; an error when something else does."""
    if not np.isfinite(loss):
        raise ProbeError(
            f"the loss is {loss}: there is nothing to compare at this point; check a batch whose loss is finite"
        )
    again = isolated.loss_again(loss)
    size = max(abs(loss), abs(again))
    if not abs(again - loss) <= max(1e-9, 16 * precision.unit) * size:
        raise not_repeatable(loss, again)
    moved, random = [again], torch.Generator().manual_seed(seed)
    for _ in range(4):
        moved.append(_shaken(isolated, rows, random, precision.unit))
    return max(abs(other - loss) for other in moved) + precision.unit * size


def _shaken(isolated: IsolatedLoss, rows: Sequence[Rows], random: torch.Generator, unit: float) -> float:
    """The loss with weights moved by about one unit in their last place: those that a table's rows are looked up for, and
    in other large parameters an even part of them."""
    pairs = list(zip(rows, isolated.weights, strict=True))
    parts = [_even_part(w.detach()) if r.index is None else r.compact(w.detach()) for r, w in pairs]
    held = [part.clone() for part in parts]
    signs = torch.randint(0, 2, (max((part.numel() for part in parts), default=0),), generator=random, dtype=torch.int8)
    factors = 1 + unit * (2 * signs.double() - 1)

    def put(values: Iterable[Tensor]) -> None:
        for (r, w), part, value in zip(pairs, parts, values, strict=True):
            part.copy_(value) if r.index is None else r.write(w, value)

    try:
        put(part * factors[: part.numel()].to(part.device, part.dtype).view(part.shape) for part in held)
        return _evaluate(isolated)
    finally:
        put(held)


def _even_part(weight: Tensor) -> Tensor:
    """Runs of neighbouring entries, evenly spread; all of a small parameter."""
    flat = weight.view(-1)
    if len(flat) <= MOVED:
        return flat
    return flat[: len(flat) // RUNS * RUNS].view(RUNS, -1)[:, : MOVED // RUNS]


def _draw(
    largest: Sequence[tuple[int, float]], rows: Sequence[Rows], skipped: Sequence[range], k: int, seed: int
) -> list[tuple[int, int]]:
    """(parameter, flat index) of the weights to check: parameters in turn, of each the most sensitive weight first.

    Of a table that is looked up in a few rows, every other one is of those rows.
    """
    random = np.random.default_rng(seed)
    queues = []
    for position in random.permutation(len(rows)):
        away, numel = skipped[position], rows[position].shape.numel()
        if numel:
            others = random.choice(numel, size=min(k + len(away), numel), replace=False)
            reached = rows[position].flat()
            if reached is not None and len(reached):
                among = random.choice(reached, size=min(k, len(reached)), replace=False)
                others = np.array([i for pair in zip_longest(among, others) for i in pair if i is not None])
            first = largest[position][0]
            first = first if reached is None or not len(reached) else int(reached[first])
            drawn = dict.fromkeys([first, *others.tolist()])
            queues.append([(int(position), int(i)) for i in drawn if i not in away])
    chosen = [queue[turn] for turn in range(k) for queue in queues if turn < len(queue)]
    return sorted(chosen[:k])


def _largest(gradient: Tensor) -> tuple[int, float]:
    """The flat index of the largest |partial|, where NaN is the largest, and the largest finite |partial|."""
    flat = gradient.detach().reshape(-1)
    if not flat.numel():
        return 0, 0.0
    low, high = (end.item() for end in torch.aminmax(flat))
    if np.isfinite(low) and np.isfinite(high):
        return int(flat.argmin() if -low > high else flat.argmax()), max(-low, high)
    size = flat.abs()
    return int(size.nan_to_num(nan=torch.inf).argmax()), size.where(size.isfinite(), 0).max().item()


class _Check:
    """The comparison of one weight after the other."""

    def __init__(
        self,
        isolated: IsolatedLoss,
        gradient: Sequence[Tensor | None],
        largest: Sequence[float],
        rows: Sequence[Rows],
        loss: float,
        noise: float,
        precision: Precision,
    ) -> None:
        self._isolated, self._gradient, self._loss, self._noise = isolated, gradient, loss, noise
        self._largest, self._rows, self._precision = largest, rows, precision

    def row(self, place: tuple[int, int]) -> Row:
        """Right at one of the steps, else at a kink, else wrong."""
        position, index = place
        g = self._gradient[position]
        partial = 0.0 if g is None else self._rows[position].entry(g, index)
        weight = self._isolated.weights[position].detach().view(-1)[index]
        value = weight.item()
        rows = []
        for step in self._precision.steps:
            h = step * max(1.0, abs(value))
            below, above = _around(self._isolated, weight, value, h)
            floor = self._precision.of_largest * self._largest[position] + ROUNDING * self._noise / h
            rows.append(_compared(place, value, partial, (below, self._loss, above), h, floor, self._precision.relative))
            if rows[-1].result == "right":
                return rows[-1]
        return next((row for row in rows if row.result == "kink"), rows[0])


def _around(isolated: IsolatedLoss, weight: Tensor, value: float, h: float) -> tuple[float, float]:
    """The loss with one weight lowered and raised by h, and all others as they are."""
    try:
        weight.fill_(value - h)
        below = _evaluate(isolated)
        weight.fill_(value + h)
        return below, _evaluate(isolated)
    finally:
        weight.fill_(value)


def _compared(
    place: tuple[int, int],
    value: float,
    partial: float,
    losses: Sequence[float],
    h: float,
    floor: float,
    relative: float,
) -> Row:
    below, at, above = losses
    difference, left, right = (above - below) / (2 * h), (at - below) / h, (above - at) / h
    tolerance = relative * max(abs(partial), abs(difference)) + floor
    if abs(partial - difference) <= tolerance:
        result = "right"
    elif abs(right - left) > tolerance and min(left, right) - tolerance <= partial <= max(left, right) + tolerance:
        result = "kink"
    else:  # not finite included
        result = "wrong"
    return Row(*place, value, partial, difference, tolerance, result)


def _result(isolated: IsolatedLoss, rows: Sequence[Row], allowed: Allowed, noise: float, seed: int) -> PartialsCheck:
    parameters = isolated.parameters
    drawn = {row.parameter for row in rows}
    return PartialsCheck(
        rows=tuple(
            replace(row, result="allowed")
            if row.result == "wrong" and allowed.covers(parameters.names[row.parameter])
            else row
            for row in rows
        ),
        parameters=parameters,
        weights=sum(w.numel() for w in isolated.weights),
        missed=tuple(name for i, name in enumerate(parameters.names) if i not in drawn and 0 not in parameters.shapes[i]),
        narrow=isolated.narrow,
        coarse=isolated.coarse,
        allowed=allowed.given,
        noise=noise,
        seed=seed,
    )
