"""What an optimizer did, measured: the weights before and after, and the gradient that it was given.

The gradient in `.grad` once a step is over is the one that was given only if it is the same tensor with the same version and
the same bits in a fixed sample. If it was written over, a copy that feature `flips` has kept stands in, or columns that rest
on it are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from gradlens import kernels
from gradlens._torch import local_part
from gradlens.capture.events import Update, WeightsBefore
from gradlens.capture.provenance import loss_gradient
from gradlens.kernels.tensors import PLAIN
from gradlens.records import Parameters, Source
from gradlens.statistics.buffers import Buffer, keepable
from gradlens.statistics.memory import Plan
from gradlens.statistics.table import Piece, UpdatePiece

#: Fixed samples of gradients, by device.
Samples = dict[torch.device, Piece]

_CPU = torch.device("cpu")
_ON_CPU = attrgetter("is_cpu")


@dataclass(eq=False)
class UpdateEntries:
    """The entries of one parameter that the update is measured on."""

    row: int
    used: Tensor | None
    before: Tensor
    after: Tensor


class UpdateMeter:
    """The weights before the step, samples of gradients, and the moves of one step."""

    def __init__(self, plan: Plan) -> None:
        self._before = Buffer(plan)
        self._reading = kernels.StableTensors()  # what was read at the end of a pass, until its samples were taken
        self._ended: Samples = {}  # `.grad` as the last backward left it
        self._consumed: Samples = {}  # as the optimizer got it
        self._consumed_before: list[Piece] = []  # what other optimizers got, whose moves may not be measured yet

    def forget(self) -> None:
        """The step is over."""
        self._ended, self._consumed, self._reading = {}, {}, kernels.StableTensors()
        self._consumed_before.clear()
        self._before.forget()

    # --- gradients --------------------------------------------------------------------------------------------------

    def reading(self, gradients: kernels.StableTensors) -> None:
        """These are being read at the end of a pass: their samples are asked for next."""
        self._reading = gradients

    def pass_ended(self, rows: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Sample `.grad` as a backward pass left it, to tell later what was done to it."""
        self._ended, last, self._reading = {}, self._reading, kernels.StableTensors()
        if len(last) == len(gradients) and all(map(is_, last, gradients)):  # what was just read, on one device
            self._ended = {last[0].device: Piece(list(rows), kernels.sample(last))} if last else {}
        else:
            self._ended = _sample(rows, gradients)

    def consumed(self, rows: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Sample what an optimizer is given."""
        for device, piece in _sample(rows, gradients).items():
            self._consume(device, piece)

    def _consume(self, device: torch.device, piece: Piece) -> None:
        last = self._consumed.get(device)
        if last is not None and last.rows and piece.rows and last.rows[0] not in piece.rows:
            self._consumed_before.append(last)
        self._consumed[device] = piece

    def _samples_of(self, rows: Sequence[int], device: torch.device) -> Piece | None:
        """The samples of what the optimizer of these rows was given."""
        last = self._consumed.get(device)
        if last is not None and self._consumed_before and set(rows).isdisjoint(last.rows):
            earlier = [p for p in reversed(self._consumed_before) if not set(rows).isdisjoint(p.rows)]
            return earlier[0] if earlier else last
        return last

    def still_as_backward_left(self, rows: Sequence[int]) -> bool:
        """Whether samples of what the optimizer was given are those of what backward left.

        Only on the CPU: elsewhere the comparison would make the host wait.
        """
        return {*self._consumed, *self._ended} == {_CPU} and _bit_equal(self._ended[_CPU], self._consumed[_CPU], rows)

    # --- by the book ------------------------------------------------------------------------------------------------

    def room(self, parameters: Parameters, rows: Sequence[int]) -> kernels.StableTensors | None:
        """Where the weights before the step go, if all of them are kept whole."""
        return self._before.rooms(parameters, rows, kept=False)

    def read_steadily(self, samples: Piece) -> None:
        """A backward ended by the book, with these samples."""
        self._ended, self._reading = {_CPU: samples}, kernels.StableTensors()

    def given_steadily(self, parameters: Parameters, room: kernels.StableTensors | None, samples: Piece) -> None:
        """An optimizer is given gradients with these samples; the weights before are in this room."""
        self._consume(_CPU, samples)
        if room is not None:
            self._before.use(parameters).fill(samples.rows, room)

    def measured_steadily(
        self, moved: Piece, positive: Sequence[bool], source: Source, *, own: bool, scale: float | Tensor
    ) -> UpdatePiece:
        """The piece of a step's move, whose loss has its gradient from there."""
        ended = self._ended.get(_CPU) if own else None
        used = self._samples_of(moved.rows, _CPU) if self._consumed_before else self._consumed[_CPU]
        same, kept = source is Source.USED, source is Source.KEPT
        return UpdatePiece(moved, positive, False, kept, ended, used, same, scale)

    # --- weights ----------------------------------------------------------------------------------------------------

    def keep(self, event: WeightsBefore) -> None:
        """Copy the weights that are about to be moved."""
        self._before.use(event.parameters)
        for rows, tensors, _ in by_device(event.rows, event.weights, event.weights):
            there = present(tensors)
            if there is tensors:
                self._before.keep(rows, tensors)
            else:
                kept = [(row, w) for row, w in zip(rows, there, strict=True) if w is not None]
                self._before.keep([row for row, _ in kept], [w for _, w in kept])

    def weight_before(self, row: int, weight: Tensor) -> Tensor:
        """The weight before the step, where all of it was kept; else as it is now, one update later."""
        kept = self._before.get(row) if self._before.whole(row) else None
        return weight if kept is None else kept

    def measure(self, update: Update, given: Buffer | None, last: Buffer | None) -> list[UpdatePiece]:
        """The pieces of a step's move.

        given: Copies of the gradients that the optimizer was given. last: copies of those of the step's last backward.
        """
        positive = dict(zip(update.rows, update.lr_positive, strict=True))
        pieces = []
        for rows, weights, there in by_device(update.rows, update.weights, update.used):
            device = weights[0].device
            used = self._given(rows, there, device, given)
            source = loss_gradient(update.facts, update.scale, kept=last is not None)
            measured, numbers, kept = self._compare(rows, used, weights, source, last)
            if numbers is not None:
                pieces.append(
                    UpdatePiece(
                        Piece(measured, numbers),
                        moved=[positive[row] for row in measured],
                        skipped=update.skipped,
                        kept=kept,
                        ended=self._ended.get(device) if update.facts.own else None,
                        used=self._samples_of(rows, device),
                        same=source is Source.USED,
                        scale=update.scale,
                    )
                )
        return pieces

    def _given(
        self, rows: Sequence[int], used: Sequence[Tensor | None], device: torch.device, copies: Buffer | None
    ) -> list[Tensor | None]:
        """The gradients as the optimizer was given them; None where it wrote over one and there is no copy."""
        sampled = self._samples_of(rows, device)
        if sampled is None:
            return list(used)
        overwritten = {row for row, g in zip(rows, used, strict=True) if g is None}
        overwritten &= set(sampled.rows)
        if device == _CPU:
            there = [(row, g) for row, g in zip(rows, used, strict=True) if g is not None]
            now = Piece([row for row, _ in there], kernels.sample([g for _, g in there])) if there else Piece([], _NOTHING)
            overwritten |= _different(now, sampled)
        if not overwritten:
            return list(used)
        return [
            g if row not in overwritten else copies.get(row) if copies is not None and copies.whole(row) else None
            for row, g in zip(rows, used, strict=True)
        ]

    def _compare(
        self,
        rows: list[int],
        used: Sequence[Tensor | None],
        weights: list[Tensor],
        source: Source,
        last: Buffer | None,
    ) -> tuple[list[int], Tensor | None, bool]:
        """The rows that are measured, their numbers, and whether these rest on kept gradients of the loss."""
        whole = self._before.together(rows, weights)
        if (
            whole is not None
            and present(weights) is weights
            and source is Source.USED
            and all(g is None or g.layout == torch.strided for g in used)
        ):
            return rows, kernels.compare(used, whole, weights), False
        there = zip(rows, present(weights), used, strict=True)
        entries = [e for row, w, g in there if w is not None and (e := self._entries(row, w, g))]
        if not entries:
            return [], None, False
        loss = _kept(entries, last) if source is Source.KEPT else None
        numbers = kernels.compare([e.used for e in entries], [e.before for e in entries], [e.after for e in entries], loss)
        return [e.row for e in entries], numbers, loss is not None

    def _entries(self, row: int, weight: Tensor, used: Tensor | None) -> UpdateEntries | None:
        before = self._before.get(row)
        if before is None:
            return None
        gradient = None if used is None or not keepable(used) else self._before.view(row, used)
        return UpdateEntries(row, gradient, before, self._before.view(row, weight))


_NOTHING = torch.empty((0, 16), dtype=torch.float64)


def present(tensors: list[Tensor]) -> Sequence[Tensor | None]:
    """The tensors; None for those whose memory was released (`storage.resize_(0)`): to read one ends the process."""
    try:
        if 0 not in map(Tensor.data_ptr, tensors):
            return tensors
        return [w if not w.numel() or w.data_ptr() else None for w in tensors]
    except RuntimeError:  # no storage of their own: sparse, or inside a transform
        return tensors


def _kept(entries: Sequence[UpdateEntries], last: Buffer | None) -> list[Tensor | None] | None:
    """The loss's own gradient, where `flips` has kept it from the step's only backward."""
    if last is None:
        return None
    kept = [None if e.used is None else last.get(e.row) for e in entries]
    return kept if all(g is not None or e.used is None for g, e in zip(kept, entries, strict=True)) else None


def _sample(rows: Sequence[int], tensors: Sequence[Tensor]) -> Samples:
    groups = by_device(rows, tensors, tensors)
    return {members[0].device: Piece(at, kernels.sample(members)) for at, members, _ in groups}


def _bits(piece: Piece) -> dict[int, Any]:
    return dict(zip(piece.rows, piece.numbers.view(torch.int64).tolist(), strict=True))


def _bit_equal(a: Piece, b: Piece, rows: Sequence[int]) -> bool:
    """Whether two pieces have the same bits in these rows."""
    if list(a.rows) == list(b.rows) == list(rows):
        return torch.equal(a.numbers.view(torch.int64), b.numbers.view(torch.int64))
    left, right = _bits(a), _bits(b)
    return all(row in left and left[row] == right.get(row) for row in rows)


def _different(now: Piece, before: Piece) -> set[int]:
    """The rows of `now` whose samples are not those of before; rows without a sample before are left out."""
    if list(now.rows) == list(before.rows) and torch.equal(now.numbers.view(torch.int64), before.numbers.view(torch.int64)):
        return set()
    old = _bits(before)
    return {row for row, bits in _bits(now).items() if row in old and old[row] != bits}


def by_device(
    rows: Sequence[int], tensors: Sequence[Tensor], others: Sequence[Any]
) -> list[tuple[list[int], list[Tensor], list[Any]]]:
    """Groups of one device each; tensors without storage (meta) are left out."""
    if set(map(type, tensors)) <= PLAIN and all(map(_ON_CPU, tensors)):
        return [(list(rows), list(tensors), list(others))] if rows else []
    groups: dict[torch.device, tuple[list[int], list[Tensor], list[Any]]] = {}
    for row, tensor, other in zip(rows, tensors, others, strict=True):
        local = local_part(tensor)
        if local.device.type != "meta":
            group = groups.setdefault(local.device, ([], [], []))
            group[0].append(row)
            group[1].append(local)
            group[2].append(None if other is None else local_part(other))
    return list(groups.values())
