"""Many tensors as few matrices: the reference asked about all of them at once, for where no kernel runs.

Tensors are cut into pieces as the reference cuts them. Pieces of about one length are the rows of a matrix, padded with NaN
to the longest, so that the torch operations are as many as the bytes ask for and not as the tensors are: on a GPU it is
launches that cost. What `entries` says of the rows is then merged by tensor.

    tensors -> pieces -> matrices [pieces, length] -> numbers [pieces] -> numbers [tensors]

Sparse tensors go to the reference. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradlens import fields
from gradlens.kernels import entries, reference
from gradlens.kernels.entries import Numbers

#: Entries of a matrix, and the memory of about twelve such in float64. On the CPU they had better stay in the cache.
ROOM = {"cpu": 2**17}
ROOM_ELSEWHERE = 2**20

OptionalTensors = Sequence[Tensor | None]
Operands = Sequence[Any]  #: tensors of one shape, or None
Prepared = tuple[Operands, Tensor | None]  #: what is read of a row, and where the first operand is to be kept


def summarize(
    gradients: Sequence[Tensor],
    weights: OptionalTensors | None = None,
    previous: OptionalTensors | None = None,
    keep: OptionalTensors | None = None,
    detail: bool = True,
    /,
) -> Tensor:
    """As `reference.summarize`."""
    names, n = ("weights", "previous", "keep"), len(gradients)
    lists = [reference.optional(name, given, n) for name, given in zip(names, (weights, previous, keep), strict=True)]
    one_by_one, together = partial(reference.summarize, detail=detail), partial(_summaries, detail=detail)
    return _rows([gradients, *lists], one_by_one, _to_summarize, together, reference.width(detail))


def compare(
    used: OptionalTensors, before: Sequence[Tensor], after: Sequence[Tensor], loss: OptionalTensors | None = None, /
) -> Tensor:
    """As `reference.compare`."""
    n = len(before)
    lists = [
        reference.optional("used", used, n),
        before,
        reference.check_lengths("after", after, n),
        reference.optional("loss", loss, n),
    ]
    return _rows(lists, reference.compare, _to_compare, _updates, len(fields.UPDATES))


def sample(tensors: Sequence[Tensor], /) -> Tensor:
    """As `reference.sample`."""
    return _rows([tensors], reference.sample, _to_sample, _samples, reference.SAMPLES)


def _rows(lists: Sequence[OptionalTensors], fallback: Callable, prepare: Callable, ask: Callable, width: int) -> Tensor:
    """The rows of those that can be asked together, and of the others one by one."""
    with reference.quiet():
        groups: dict[tuple[bool, ...], list[tuple[int, Prepared]]] = {}  # by which operands there are
        left = []
        for i, given in enumerate(zip(*lists, strict=True)):
            if any(tensor is not None and reference.is_sparse(tensor) for tensor in given):
                left.append(i)
            else:
                ready = prepare(*given)
                groups.setdefault(tuple(tensor is None for tensor in ready[0]), []).append((i, ready))
        if not groups:
            return fallback(*lists)
        device = next(tensor.device for tensor in next(iter(groups.values()))[0][1][0] if tensor is not None)
        rows = torch.empty(len(lists[0]), width, dtype=torch.float64, device=device)
        for members in groups.values():
            numbers = ask([operands for _, (operands, _) in members], device)
            torch._foreach_copy_([rows[i] for i, _ in members], list(numbers))
        for members in groups.values():
            for _, (operands, room) in members:
                if room is not None:
                    reference.write(room, operands[0])
        if left:
            others = fallback(*([column[i] for i in left] for column in lists))
            torch._foreach_copy_([rows[i] for i in left], list(others))
        return rows


def _to_summarize(g: Tensor, w: Tensor | None, previous: Tensor | None, keep: Tensor | None) -> Prepared:
    g = reference.plain(g)
    operands = g, reference.like("a weight", w, g), reference.like("a previous gradient", previous, g)
    return operands, reference.room_for(keep, g)


def _to_compare(used: Tensor | None, before: Tensor, after: Tensor, loss: Tensor | None) -> Prepared:
    before = reference.plain(before)
    like = reference.like
    return (like("used", used, before), before, like("after", after, before), like("loss", loss, before)), None


def _to_sample(tensor: Tensor) -> Prepared:
    return (reference.plain(tensor),), None


# --- matrices ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Matrices:
    """Pieces of about one length: a matrix an operand, float64, `[pieces, length]`, padded with NaN."""

    operands: list[Tensor | None]
    owners: list[int]  #: of each piece its tensor
    starts: Tensor  #: the index of its first entry
    lengths: Tensor  #: its entries, `[pieces]`, int64


@dataclass(frozen=True)
class _Piece:
    owner: int
    start: int
    length: int
    operands: Operands  # flat


def _matrices(tensors: Iterable[Operands], device: torch.device) -> Iterator[Matrices]:
    room = ROOM.get(device.type, ROOM_ELSEWHERE)
    waiting: dict[int, list[_Piece]] = {}
    for owner, operands in enumerate(tensors):
        start = 0
        for group in reference.pieces(operands):
            flat = [None if tensor is None else reference.flat(tensor) for tensor in group]
            length = len(next(tensor for tensor in flat if tensor is not None))
            width = max(fields.TOP, 1 << (length - 1).bit_length())
            alike = waiting.setdefault(width, [])
            alike.append(_Piece(owner, start, length, flat))
            start += length
            if len(alike) * width >= room:
                yield _matrix(waiting.pop(width), device)
    for alike in waiting.values():
        yield _matrix(alike, device)


def _matrix(alike: Sequence[_Piece], device: torch.device) -> Matrices:
    width = max(fields.TOP, *(piece.length for piece in alike))
    offsets, offset = [], 0
    for piece in alike:
        offsets.append(offset)
        offset += piece.length
    offsets_there, starts, lengths = shipped([offsets, [p.start for p in alike], [p.length for p in alike]], device)
    operands: list[Tensor | None] = []
    full = all(piece.length == width for piece in alike)
    at = torch.arange(width, device=device, dtype=torch.int64)
    index = None if full else (offsets_there[:, None] + at).clamp(max=offset - 1)
    for column in zip(*(piece.operands for piece in alike), strict=True):
        if column[0] is None:
            operands.append(None)
            continue
        whole = torch.cat([_known(tensor) for tensor in column])
        if index is None:
            operands.append(whole.view(len(alike), width).to(torch.float64))
        else:
            operands.append(torch.where(at < lengths[:, None], whole[index].to(torch.float64), torch.nan))
    return Matrices(operands, [piece.owner for piece in alike], starts, lengths)


def _known(tensor: Tensor) -> Tensor:
    """Of a type that torch can do more with than convert it: float8 is none."""
    return tensor.to(torch.float32) if tensor.dtype.itemsize == 1 else tensor


def shipped(lists: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Lists of whole numbers on the device, `[lists, n]`. From pinned memory, which the allocator keeps until it is read."""
    host = torch.tensor(lists, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _summaries(tensors: Sequence[Operands], device: torch.device, detail: bool) -> Tensor:
    n = len(tensors)
    strides = [entries.stride(g.numel() * (2 if g.is_complex() else 1), g.is_contiguous(), detail) for g, *_ in tensors]
    parts: list[Numbers] = []
    owners: list[int] = []
    tops = [entries.nobody(device, n)]  # so that each has as many candidates as there is room
    _, has_weights, has_previous = (tensor is not None for tensor in tensors[0])
    for matrices in _matrices(tensors, device):
        g, w, p = matrices.operands
        assert g is not None
        counted: Tensor | bool = True
        if max(lines := [strides[owner] for owner in matrices.owners]) > 1:
            counted = entries.sampled(matrices.starts[:, None], g.shape[1], shipped([lines], device)[0][:, None], device)
        numbers = entries.summary(g, w, p, counted)
        lengths = matrices.lengths.to(torch.float64)
        parts.append(_without_padding(numbers, g.shape[1] - lengths) | {"numel": lengths})
        owners += matrices.owners
        tops.append(entries.largest(g, w, matrices.starts[:, None]))
    names = entries.GRADIENT + (entries.WEIGHTS if has_weights else []) + (entries.FLIPS if has_previous else [])
    numbers = _merged(names, parts, owners, n, device)
    top = _best(torch.cat(tops, dim=1), [*range(n), *owners], n)
    return entries.row(numbers, top, detail)


def _updates(tensors: Sequence[Operands], device: torch.device) -> Tensor:
    parts: list[Numbers] = []
    owners: list[int] = []
    has_used, _, _, has_loss = (tensor is not None for tensor in tensors[0])
    for matrices in _matrices(tensors, device):
        used, before, after, loss = matrices.operands
        assert before is not None
        assert after is not None
        lengths = matrices.lengths.to(torch.float64)
        numbers = _without_padding(entries.update(used, before, after, loss), before.shape[1] - lengths)
        parts.append(numbers | {"update_numel": lengths})
        owners += matrices.owners
    names = entries.MOTION + (entries.USED if has_used else []) + (entries.LOSS if has_loss else [])
    numbers = _merged(names, parts, owners, len(tensors), device)
    if has_loss:
        numbers["update_loss_exact"] = torch.ones_like(numbers["update_numel"])
    return entries.closed(numbers, fields.UPDATES)


def _without_padding(numbers: Numbers, padding: Tensor) -> Numbers:
    return numbers | {name: numbers[name] - padding for name in entries.PADDED if name in numbers}


def _merged(names: Sequence[str], parts: Sequence[Numbers], owners: Sequence[int], n: int, device: torch.device) -> Numbers:
    """The numbers of `n` tensors from those of their pieces."""
    numbers = entries.identity(names, device, n)
    if not parts:
        return numbers
    at = shipped([owners], device)[0]
    for name in names:
        values = torch.cat([part[name] for part in parts])
        if entries.rule(name) == "sum":
            numbers[name].index_add_(0, at, values)
        else:
            numbers[name].scatter_reduce_(0, at, values, f"a{entries.rule(name)}")
    return numbers


def _best(tops: Tensor, owners: Sequence[int], n: int) -> Tensor:
    """The largest of each tensor, `[4, n, TOP]`, from those of its pieces, `[4, pieces, TOP]`."""
    counts = [0] * (n + 1)
    for owner in owners:
        counts[owner + 1] += fields.TOP
    firsts = [0]
    for count in counts[1:-1]:
        firsts.append(firsts[-1] + count)
    candidates = tops.flatten(1)
    whose = shipped([owners], tops.device)[0].repeat_interleave(fields.TOP, output_size=candidates.shape[1])
    order = torch.argsort(candidates[2], stable=True)
    order = order[torch.argsort(candidates[0][order], stable=True, descending=True)]
    order = order[torch.argsort(whose[order], stable=True)]
    first = shipped([firsts], tops.device)[0][:, None]
    return candidates[:, order[first + torch.arange(fields.TOP, device=tops.device)]]


def _samples(tensors: Sequence[Operands], device: torch.device) -> Tensor:
    """One look at each tensor, then one matrix."""
    flat = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else _known(t).resolve_neg() for (t,) in tensors]
    last = reference.SAMPLES - 1
    places = [
        [k * (n - 1) // last if n > reference.SAMPLES else min(k, max(n - 1, 0)) for k in range(reference.SAMPLES)]
        for n in (tensor.numel() for tensor in flat)
    ]
    index = shipped(places, device)
    nothing = torch.zeros(reference.SAMPLES, dtype=torch.float64, device=device)
    looks = [torch.take(t, i).to(torch.float64) if t.numel() else nothing for t, i in zip(flat, index, strict=True)]
    lengths = shipped([[tensor.numel() for tensor in flat]], device)[0]
    lanes = torch.arange(reference.SAMPLES, device=device)
    return torch.where(lanes < lengths[:, None], torch.stack(looks), 0.0)
