"""The definition of every number that a kernel writes, in plain torch; each faster backend equals this one.

A tensor counts as the list of its real entries in logical order: conjugate and negative bits resolved, a complex entry as
two reals, a sparse tensor with its duplicates added and its untouched entries 0, a distributed one as its local part.
Entries are read as float64 and summed in float64, a piece of at most `PIECE` entries at a time, so that the memory needed
does not grow with the tensor. What the numbers of entries are, and how they merge, says `entries`.

Works on any device and never waits for one, but for a sparse gradient that is not coalesced yet: torch waits there.
Not promised: speed, and float64 gradients whose squares overflow (their sums do, as torch's would).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradlens import fields
from gradlens._torch import local_part
from gradlens.errors import ArgumentError
from gradlens.kernels import entries
from gradlens.kernels.entries import Numbers

PIECE = 2**17  #: entries looked at in one go: 1 MiB of float64, about ten times that with all intermediate results
SAMPLES = 16  #: entries that `sample` takes of each tensor

Group = Sequence[Any]  #: tensors of one shape, or None


def summarize(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor | None] | None = None,
    previous: Sequence[Tensor | None] | None = None,
    keep: Sequence[Tensor | None] | None = None,
    detail: bool = True,
) -> Tensor:
    """One row a gradient, float64, on their device. See `gradlens.kernels.summarize`."""
    n = len(gradients)
    columns = [optional(name, given, n) for name, given in (("weights", weights), ("previous", previous), ("keep", keep))]
    with quiet():
        rows = [_summary(*group, detail=detail) for group in zip(gradients, *columns, strict=True)]
        return torch.stack(rows) if rows else torch.empty(0, width(detail), dtype=torch.float64, device="cpu")


def compare(
    used: Sequence[Tensor | None],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    loss: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """One row an update, `[n, len(fields.UPDATES)]`, float64, on their device. See `gradlens.kernels.compare`."""
    n = len(before)
    columns = [optional("used", used, n), before, check_lengths("after", after, n), optional("loss", loss, n)]
    with quiet():
        rows = [_update(*group) for group in zip(*columns, strict=True)]
        return torch.stack(rows) if rows else torch.empty(0, len(fields.UPDATES), dtype=torch.float64, device="cpu")


def sample(tensors: Sequence[Tensor]) -> Tensor:
    """Some entries of each tensor, `[n, SAMPLES]`, float64, on their device. See `gradlens.kernels.sample`."""
    with quiet():
        rows = [_sample(plain(tensor)) for tensor in tensors]
        return torch.stack(rows) if rows else torch.empty(0, SAMPLES, dtype=torch.float64, device="cpu")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Compute without a graph, with ordinary tensors as results, past the overrides of the user's tensor classes."""
    with torch.no_grad(), torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
        yield


def optional(name: str, given: Sequence[Tensor | None] | None, n: int) -> Sequence[Tensor | None]:
    return [None] * n if given is None else check_lengths(name, given, n)


def width(detail: bool) -> int:
    return fields.WIDTH if detail else fields.LIGHT_WIDTH


def check_lengths(name: str, given: Sequence[Any], n: int) -> Sequence[Any]:
    if len(given) != n:
        raise ArgumentError(f"{name} has {len(given)} entries for {n} tensors; give one each, None where there is none")
    return given


# --- any tensor as pieces of real entries ---------------------------------------------------------------------------


def plain(tensor: Tensor) -> Tensor:
    """Without its graph, and of a distributed tensor the local part."""
    return local_part(tensor).detach()


def is_sparse(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.layout != torch.strided


def like(name: str, tensor: Tensor | None, model: Tensor) -> Tensor | None:
    """The tensor in the shape of the model, dense."""
    if tensor is None:
        return None
    tensor = plain(tensor)
    if tensor.numel() != model.numel() or tensor.is_complex() != model.is_complex():
        given, expected = (f"{tuple(t.shape)} of {t.dtype}" for t in (tensor, model))
        raise ArgumentError(f"{name} has shape {given}, but the tensor it belongs to has {expected}; give as many entries")
    dense = tensor.to_dense() if is_sparse(tensor) else tensor
    return dense if dense.shape == model.shape else dense.reshape(model.shape)


def pieces(group: Group, limit: int = PIECE) -> Iterator[Group]:
    """Tensors of one shape, cut alike in logical order into pieces of at most `limit` entries. Nothing is copied."""
    first = next(tensor for tensor in group if tensor is not None)
    if first.numel() <= limit:
        if first.numel():
            yield group
        return
    if first.ndim > 1 and all(tensor is None or tensor.is_contiguous() for tensor in group):
        yield from pieces([None if tensor is None else tensor.view(-1) for tensor in group], limit)
        return
    length = len(first)
    rows = limit // (first.numel() // length)
    for start in range(0, length, max(rows, 1)):
        if rows:
            yield [None if t is None else t.narrow(0, start, min(rows, length - start)) for t in group]
        else:
            yield from pieces([None if t is None else t[start] for t in group], limit)


def flat(piece: Tensor) -> Tensor:
    """Real entries of a piece, in a row."""
    piece = piece.resolve_conj()
    if piece.is_complex():
        piece = torch.view_as_real(piece)
    return piece.resolve_neg().reshape(-1)


def _read(group: Group) -> list[Any]:
    return [None if piece is None else flat(piece).to(torch.float64) for piece in group]


def _reals(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def write(room: Tensor, piece: Tensor) -> None:
    """Overwrite, whatever mode the room was made in."""
    with torch.inference_mode(room.is_inference()):
        room.copy_(piece)


# --- rows of summarize ------------------------------------------------------------------------------------------------


def _summary(g: Tensor, w: Tensor | None, previous: Tensor | None, keep: Tensor | None, *, detail: bool) -> Tensor:
    g = plain(g)
    if is_sparse(g) and (previous is not None or keep is not None or g.numel() == 0):
        g = g.to_dense()
    w, p, room = like("a weight", w, g), like("a previous gradient", previous, g), room_for(keep, g)
    numbers, top = _sparse_numbers(g, w) if is_sparse(g) else _dense_numbers(g, w, p, room, detail)
    return entries.row(numbers, top, detail)


def room_for(keep: Tensor | None, g: Tensor) -> Tensor | None:
    if keep is None or keep.shape == g.shape:
        return keep
    if keep.numel() != g.numel() or not keep.is_contiguous():
        raise ArgumentError(
            f"keep has shape {tuple(keep.shape)} for a gradient of {tuple(g.shape)}; give room for each entry"
        )
    return keep.view(g.shape)


def _dense_numbers(
    g: Tensor, w: Tensor | None, p: Tensor | None, room: Tensor | None, detail: bool = True
) -> tuple[Numbers, Tensor]:
    names = entries.GRADIENT + (entries.WEIGHTS if w is not None else []) + (entries.FLIPS if p is not None else [])
    numbers, top, start = entries.identity(names, g.device), entries.nobody(g.device), 0
    stride = entries.stride(_reals(g), g.is_contiguous(), detail)
    for g_piece, w_piece, p_piece, target in pieces([g, w, p, room]):
        x, y, z = _read([g_piece, w_piece, p_piece])
        counted = True if stride == 1 else entries.sampled(start, len(x), stride, x.device)
        entries.merge(numbers, entries.summary(x, y, z, counted))
        top = entries.best(torch.cat([top, entries.largest(x, y, start)], dim=1))
        start += x.numel()
        if target is not None:
            write(target, g_piece)
    return numbers, top


def _sparse_numbers(g: Tensor, w: Tensor | None) -> tuple[Numbers, Tensor]:
    """Those of the entries it has, then those of the zeros between them. The weights count in full."""
    touched = _Touched(g)
    numbers, top = _dense_numbers(touched.values, None if w is None else touched.of(w), None, None)
    top[2] = torch.where(top[2] < 0, -1.0, touched.index(top[2].to(torch.int64)).to(torch.float64))
    untouched = _reals(g) - _reals(touched.values)
    if untouched:
        zero = torch.zeros((), dtype=torch.float64, device=g.device)
        count = torch.full_like(zero, untouched)
        counts = dict.fromkeys(["numel", "zero", entries.COUNTED_ZERO], count)
        entries.merge(numbers, counts | {"min": zero, "max": zero, "abs_max": zero})
        index = touched.first_untouched(min(fields.TOP, untouched))
        values = torch.full_like(index, torch.nan, dtype=torch.float64) if w is None else _at(w, index)
        top = entries.best(torch.cat([top, entries.candidates(torch.zeros_like(values), index, values)], dim=1))
    if w is not None:
        numbers |= entries.identity([name for name in entries.WEIGHTS if name != "dot"], g.device)
        for group in pieces([w]):
            entries.merge(numbers, entries.weights(*_read(group)))
    return numbers, top


class _Touched:
    """The entries that a sparse tensor has: `values` has a row for each place of the sparse axes, by rising place."""

    def __init__(self, tensor: Tensor) -> None:
        tensor = (tensor if tensor.layout == torch.sparse_coo else tensor.to_sparse()).coalesce()
        self.axes, self.values = tensor.indices(), tensor.values()
        self.places = torch.zeros_like(self.axes[0])
        for axis, length in zip(self.axes, tensor.shape[: tensor.sparse_dim()], strict=True):
            self.places = self.places * length + axis
        self._width = math.prod(self.values.shape[1:]) * (2 if tensor.is_complex() else 1)

    def of(self, tensor: Tensor) -> Tensor:
        """The entries of a dense tensor at the places of this piece, in the shape of `values`."""
        return tensor[tuple(self.axes)]

    def index(self, at: Tensor) -> Tensor:
        """The index in the whole tensor of entries given by their index in `values`."""
        if not len(self.places):
            return at
        row = torch.div(at, self._width, rounding_mode="floor")
        return self.places[row] * self._width + at - row * self._width

    def first_untouched(self, count: int) -> Tensor:
        """The indices of the first `count` entries that the sparse tensor does not store."""
        at = torch.arange(count, dtype=torch.int64, device=self.places.device)
        rank = torch.div(at, self._width, rounding_mode="floor")
        # Before the k-th touched place lie places[k] - k untouched ones.
        before = self.places - torch.arange(len(self.places), device=self.places.device)
        place = rank + torch.searchsorted(before, rank, right=True)
        return place * self._width + at - rank * self._width

    def at(self, index: Tensor) -> Tensor:
        """The entries at indices of the whole tensor, float64; 0 where there is none."""
        place = torch.div(index, self._width, rounding_mode="floor")
        row = torch.searchsorted(self.places, place).clamp(max=len(self.places) - 1)
        value = _at(self.values, row * self._width + index - place * self._width)
        return torch.where(self.places[row] == place, value, 0.0)


def _at(tensor: Tensor, index: Tensor) -> Tensor:
    """Real entries of a strided tensor by their index in logical order, float64."""
    parts = 2 if tensor.is_complex() else 1
    place, part = torch.div(index, parts, rounding_mode="floor"), index % parts
    axes = []
    for length in reversed(tensor.shape):
        axes.append(place % length)
        place = torch.div(place, length, rounding_mode="floor")
    found = tensor[tuple(reversed(axes))] if axes else tensor.expand(len(index))
    return flat(found).to(torch.float64).view(-1, parts).gather(1, part[:, None])[:, 0]


# --- rows of compare and sample ---------------------------------------------------------------------------------------


def _update(used: Tensor | None, before: Tensor, after: Tensor, loss: Tensor | None) -> Tensor:
    before = plain(before)
    if is_sparse(before):
        before = before.to_dense()
    moved = like("after", after, before)
    assert moved is not None
    group = [_along(name, tensor, before) for name, tensor in (("used", used), ("loss", loss))]
    dense = [None if tensor is None or is_sparse(tensor) else tensor for tensor in group]
    numbers = _moved(dense[0], before, moved, dense[1])
    for name, tensor in zip(("used", "loss"), group, strict=True):
        if tensor is not None and is_sparse(tensor):
            touched = _Touched(tensor)
            there = (touched.of(before), touched.of(moved))
            more = _moved(touched.values, *there, None) if name == "used" else _moved(None, *there, touched.values)
            numbers |= {key: value for key, value in more.items() if key not in entries.MOTION}
    if loss is not None:
        numbers["update_loss_exact"] = torch.ones((), dtype=torch.float64, device=before.device)
    return entries.closed(numbers, fields.UPDATES)


def _along(name: str, tensor: Tensor | None, before: Tensor) -> Tensor | None:
    if tensor is not None and is_sparse(tensor) and tensor.shape == before.shape and before.numel():
        return tensor.detach()
    return like(name, tensor, before)


def _moved(used: Tensor | None, before: Tensor, after: Tensor, loss: Tensor | None) -> Numbers:
    names = entries.MOTION + (entries.USED if used is not None else []) + (entries.LOSS if loss is not None else [])
    numbers = entries.identity(names, before.device)
    for piece in pieces([before, after, used, loss]):
        w, new, g, exact = _read(piece)
        entries.merge(numbers, entries.update(g, w, new, exact))
    return numbers


def _sample(tensor: Tensor) -> Tensor:
    n = _reals(tensor)
    row = torch.zeros(SAMPLES, dtype=torch.float64, device=tensor.device)
    if n == 0:
        return row
    at = torch.arange(min(n, SAMPLES), dtype=torch.int64, device=tensor.device)
    if n > SAMPLES:
        at = torch.div(at * (n - 1), SAMPLES - 1, rounding_mode="floor")
    if is_sparse(tensor):
        touched = _Touched(tensor)
        row[: len(at)] = touched.at(at) if len(touched.places) else 0.0
    else:
        row[: len(at)] = _at(tensor, at)
    return row
