"""A survey: K gradients at fixed weights, and for each weight a verdict on which way it should move.

    g_1 ... g_K  ->  mean, t, p, q  ->  increase | decrease | undecided

One batch's sign is right for little more than half of the weights. A survey repeats the measurement over K batches without
moving the weights, tests each weight's mean partial against 0, and keeps what passes the control of false discoveries over
all weights at once. What is tested is the *expected* partial over batches of this size, in the mode the model is in.

It says nothing of how far to move, of what happens when the others move too, or of the weights after a step. Of the kept
verdicts at most a share q is expected to be wrong, on average over surveys; `Survey.caveats` says where that fails.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradlens.errors import ArgumentError, GradlensWarning, ProbeError
from gradlens.probes.batches import Sizes, check_batches, counted, generators, noted_if_one_batch
from gradlens.probes.interrupts import leaves_no_trace
from gradlens.probes.isolated_loss import IsolatedLoss
from gradlens.probes.loss import Target
from gradlens.probes.memory import Need, state_memory, stored
from gradlens.probes.per_weight import sampled
from gradlens.probes.strongest import check_top, strongest
from gradlens.probes.table_moments import TableMoments, is_table
from gradlens.probes.verdicts import Survey, numbered
from gradlens.selection import Select
from gradlens.statistics.evidence import CHUNK, Moments, check_level, flat, reals, test_means
from gradlens.statistics.significance import detectable

SMALL_TABLE = 1 << 16  #: entries up to which a sparse gradient is read faster when it is made dense
ENOUGH = 8  #: batches below which a survey warns
#: Of each weight surveyed, at the peak (measured 131): moments 24; value, t, p, q, agreement 40; sorting 60; words.
BYTES = 132

Given = Iterator[tuple[int, tuple[Any, float | None]]]  #: batches with their numbers and sizes


@leaves_no_trace
def survey(
    model: Target,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    q: float = 0.1,
    *,
    method: str = "bh",
    sample: int | float | None = None,
    top: int | None = None,
    sizes: Sizes = None,
    select: Select = None,
    progress: bool | None = None,
) -> Survey:
    """Which way each weight should move, with evidence from all of `batches` at the present weights.

    `loss_fn(model, batch) -> scalar` gives the mean loss of one batch. `batches` is any iterable: 16 to 64 of the size
    that is trained with, drawn at random, each once; `itertools.islice(loader, 32)` takes a part of a loader. Where the
    sizes of batches (the first dimension of their first tensor) differ, each counts by its size; `sizes` says it where that
    is not the number of examples: a function (`lambda batch: batch[0].shape[1]` where time comes first), or a number each.

    `sample`: survey only so many weights (an int), or such a share of them (a float), spread evenly, by a fixed seed.
    `top`: survey only so many of the most sensitive weights: those of the largest partial in the first batch, which serves
    for that alone, so that the choice does not bear on the tests. Memory is 132 bytes a weight surveyed, besides a copy of
    the weights and two gradients, those of sparse tables left out: of these a batch costs the rows that it looks up.
    `select` restricts it to some parameters, as in watch(). `method="by"` holds under any dependence among the weights and
    keeps fewer.

    Raises `ArgumentError` for fewer than two batches, identical batches, and what does not fit in memory.

    >>> print(survey(model, lambda model, batch: criterion(model(batch[0]), batch[1]), loader))  # doctest: +SKIP
    """
    check_level(q, method)
    check_batches(batches)
    check_top(top, sample)
    isolated = IsolatedLoss(model, loss_fn, select=select, batched=True)
    numel = [int(np.prod(shape, dtype=np.int64)) for shape in isolated.parameters.shapes]
    index = sampled(numel, sample)
    chosen = top if top is not None and top < sum(numel) else 0
    surveyed = chosen or sum(n if at is None else len(at) for n, at in zip(numel, index, strict=True))
    _state_memory(surveyed, isolated, progress)
    isolated.keep(generators(batches))
    with isolated, noted_if_one_batch(batches):
        given = enumerate(counted(batches, "surveying", progress, sizes))
        if chosen:
            index = _most_sensitive(isolated, chosen, given)
        measured = _measure(isolated, index, given, "besides the first, which chose the weights" if chosen else "")
        values = [flat(w.detach(), at).cpu().numpy() for w, at in zip(isolated.weights, measured.at, strict=True)]
    _warn_few(len(measured.losses), q)
    return Survey(
        parameters=isolated.parameters,
        index=tuple(index),
        value=np.concatenate(values),
        results=test_means(measured.moments, q, method),
        batches=len(measured.losses),
        sizes=(min(measured.sizes), max(measured.sizes)) if measured.sizes else None,
        level=float(q),
        method=method,
        loss=float(np.average(measured.losses, weights=measured.sizes or None)),
        training=isolated.training,
        total=sum(numel),
        spoiled=tuple(measured.spoiled),
        chosen="sensitivity" if chosen else "sample" if surveyed < sum(numel) else "",
    )


@dataclass(frozen=True, eq=False)
class _Measured:
    at: list[Tensor | None]  #: the weights surveyed of each parameter; None: all
    moments: Moments
    losses: list[float]
    sizes: list[float]  #: empty where batches do not say how large they are
    spoiled: list[int]  #: batches whose loss or partials were not finite


def _most_sensitive(isolated: IsolatedLoss, k: int, batches: Given) -> list[np.ndarray | None]:
    """The weights of the largest partials in the first batch, which is taken off."""
    for _, (batch, _) in batches:
        return [*strongest(isolated.gradient(batch, sparse=True)[1], isolated.weights, k)]
    return [np.empty(0, np.int64) for _ in isolated.weights]


def _measure(isolated: IsolatedLoss, index: Sequence[np.ndarray | None], batches: Given, besides: str) -> _Measured:
    """The moments of all gradients, and the losses and sizes of their batches."""
    at = [None if i is None else torch.from_numpy(i).to(w.device) for i, w in zip(index, isolated.weights, strict=True)]
    tables = TableMoments(Moments(isolated.weights, at), isolated.weights)
    losses, sizes, spoiled = [], [], []
    prints = _Fingerprint()
    reached, seen, repeated = False, dict[tuple[float, ...], int](), list[tuple[int, int]]()
    for k, (batch, size) in batches:
        loss, gradient = isolated.gradient(batch, sparse=True)
        losses.append(loss.item())
        sizes += [] if size is None else [size]
        gradient = [g if g is None or not g.is_sparse else _sparse(g) for g in gradient]
        tables.update(gradient, size or 1.0)
        reached = reached or any(g is not None for g in gradient)
        marks = prints.of(losses[-1], gradient)
        if not np.isfinite(marks).all():
            spoiled.append(k)
        first = seen.setdefault(marks, k)
        repeated += [(first, k)] if first != k else []
        del gradient  # or it would live on beside the next one
    if len(losses) < 2:
        raise ArgumentError(
            f"a survey needs at least 2 batches {besides}{' ' if besides else ''}to tell a direction from noise, not "
            f"{len(losses)}; 16 to 64 are good"
        )
    if not reached:
        raise ProbeError("the loss depends on none of the surveyed parameters: detach(), .item() or no_grad() cuts the way")
    moments = tables.settle()
    _refuse_identical(moments)
    _warn_repeated(repeated)
    _warn_spoiled(spoiled)
    return _Measured(at, moments, losses, sizes, spoiled)


def _sparse(gradient: Tensor) -> Tensor:
    """A sparse gradient ready to be read; dense where that is less work."""
    return gradient.coalesce() if is_table(gradient) and gradient.numel() > SMALL_TABLE else gradient.to_dense()


class _Fingerprint:
    """By which a batch that comes again is known: the loss, and each gradient weighted by place, read once.

    Not finite if a partial is not.
    """

    def __init__(self) -> None:
        self._places: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def of(self, loss: float, gradient: Sequence[Tensor | None]) -> tuple[float, ...]:
        marks = [self._weighed(g) for g in gradient if g is not None and g.numel()]
        read = torch.stack(marks).tolist() if len({mark.device for mark in marks}) == 1 else [m.item() for m in marks]
        for i, g in enumerate(g for g in gradient if g is not None and g.numel()):
            entries = g.coalesce().values() if g.is_sparse else g
            if not np.isfinite(read[i]) and all(bool(part.isfinite().all()) for part in reals(entries).split(CHUNK)):
                read[i] = float(reals(entries).double().abs().max())  # finite, and too large for a sum in float32
        return loss, *read

    def _weighed(self, gradient: Tensor) -> Tensor:
        place, number = self._weights(gradient.device)
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            rows, values = gradient.indices()[0], gradient.values().reshape(gradient.indices().shape[1], -1)
            by_row = values.to(place.dtype).split(CHUNK, dim=1)
            return sum(part @ place[: part.shape[1]] for part in by_row) @ number[rows % CHUNK]
        flat = reals(gradient)
        if len(flat) <= CHUNK:
            return flat.to(place.dtype) @ place[: len(flat)]
        parts = [part.to(place.dtype) @ place[: len(part)] for part in flat.split(CHUNK)]
        return torch.stack(parts) @ number[: len(parts)]

    def _weights(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._places:
            random = torch.Generator().manual_seed(0)
            made = [torch.rand(CHUNK, generator=random) for _ in range(2)]
            self._places[device] = made[0].to(device), made[1].to(device)
        return self._places[device]


def _refuse_identical(moments: Moments) -> None:
    varied = any(bool((squares > 0).any()) for squares in moments.squares)
    broken = any(bool((~mean.isfinite()).any()) for mean in moments.mean)
    moved = any(bool((mean != 0).any()) for mean in moments.mean)
    if moved and not varied and not broken:
        raise ArgumentError(
            f"these batches are identical: all {moments.count} gave the same gradient, bit for bit. Give each batch "
            f"once, drawn at random; a loss whose gradient does not depend on the data needs no survey"
        )


def _warn_repeated(repeated: Sequence[tuple[int, int]]) -> None:
    if repeated:
        warnings.warn(
            f"batches {repeated[0][0]} and {repeated[0][1]} gave the same gradient"
            + (f" (and {len(repeated) - 1} more pairs)" if len(repeated) > 1 else "")
            + ": a batch that is surveyed twice counts as evidence twice, and verdicts look surer than they are",
            GradlensWarning,
            stacklevel=4,
        )


def _warn_spoiled(spoiled: Sequence[int]) -> None:
    if spoiled:
        warnings.warn(
            f"{numbered(spoiled)} gave a loss or partials that are not finite: the weights that they reach are "
            f"undecided (nonfinite), whatever the other batches say; leave them out",
            GradlensWarning,
            stacklevel=4,
        )


def _warn_few(k: int, q: float) -> None:
    if k >= ENOUGH:
        return
    sure = detectable(k - 1, q / 20) / k**0.5
    warnings.warn(
        f"{k} batches leave {k - 1} degrees of freedom: to be kept, a weight's mean partial must be about {sure:.1f} "
        f"times its spread over batches, where one weight in twenty is kept. Expect verdicts for few weights or none, "
        f"and more wrong ones than q says; take 16 to 64 batches",
        GradlensWarning,
        stacklevel=3,
    )


def _state_memory(surveyed: int, isolated: IsolatedLoss, progress: bool | None) -> None:
    """Say what a survey needs before it starts: where a bar is shown too."""
    pairs = zip(isolated.tensors(), isolated.owners(), strict=True)
    dense = [tensor for tensor, owner in pairs if not getattr(owner, "sparse", False)]
    state_memory(
        f"survey of {surveyed:,} weights",
        [Need(surveyed * BYTES, "statistics")],
        [
            Need(stored(isolated.copied()), "a copy of the weights"),
            Need(2 * stored(dense), "two gradients, those of sparse tables left out"),
        ],
        isolated.tensors(),
        "survey a sample (sample=1_000_000, or sample=0.01), the most sensitive (top=1_000_000), or some parameters "
        "(select=)",
        True if progress is None and sys.stderr.isatty() else progress,
    )
