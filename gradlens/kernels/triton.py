"""The GPU kernels: all tensors of a call in three launches a type, and nothing that waits for the device.

The host only collects addresses: a table of 64-bit integers goes to the device in one asynchronous copy from pinned memory,
the programs find their tensor in it (`programs`), and the rows stay there. Plain strided tensors are taken, of float32,
float64, bfloat16, float16 or complex, in any layout of up to eight axes; all else goes to the reference, tensor by tensor.

Memory besides the rows is bounded: 2.3 KB of partial numbers for each of at most `Sizes.programs` chunks and one a tensor.

The first call of a kind compiles its programs, once a machine: Triton keeps them on disk.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gradlens import fields
from gradlens._torch import local_part
from gradlens.kernels import programs, reference
from gradlens.kernels.entries import stride
from gradlens.kernels.tensors import PLAIN

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_LAYOUTS = (0, 4, 8)  # numbers of axes that programs are compiled for; 0: contiguous

OptionalTensors = Sequence[Tensor | None]
Column = Sequence[Any] | None


@dataclass(frozen=True)
class Sizes:
    """How the work is cut: powers of two, but `programs`.

    Two entries a thread keep `scan` clear of spilled registers (it takes 80 to 124 on sm_80 and sm_90; 32 entries spill
    1 KB).
    """

    tile: int = 256  #: entries that a program of four warps reads in one go
    chunk: int = 2**14  #: entries of a chunk, at least
    programs: int = 2048  #: chunks, at most, but for one a tensor
    peaks: int = 256  #: chunks whose extremes are looked at in one go
    searched: int = 4096  #: entries of a chunk that are searched for the largest in one go
    merged: int = 16  #: partial rows that are added in one go


@dataclass(frozen=True)
class Triton:
    """The kernels, for CUDA tensors; for any under Triton's interpreter."""

    sizes: Sizes = Sizes()

    def summarize(
        self,
        gradients: Sequence[Tensor],
        weights: OptionalTensors | None = None,
        previous: OptionalTensors | None = None,
        keep: OptionalTensors | None = None,
        detail: bool = True,
    ) -> Tensor:
        """As `reference.summarize`."""
        columns, width = [gradients, weights, previous, keep], reference.width(detail)
        launch, fallback = partial(self._summarize, detail=detail), partial(reference.summarize, detail=detail)
        return self._rows(launch, fallback, columns, width, keeps=True, detail=detail)

    def compare(
        self, used: OptionalTensors, before: Sequence[Tensor], after: Sequence[Tensor], loss: OptionalTensors | None = None
    ) -> Tensor:
        """As `reference.compare`."""
        return self._rows(self._compare, reference.compare, [used, before, after, loss], len(fields.UPDATES))

    def sample(self, tensors: Sequence[Tensor]) -> Tensor:
        """As `reference.sample`."""
        return self._rows(self._sample, reference.sample, [tensors], reference.SAMPLES)

    def _rows(
        self,
        launch: Callable,
        fallback: Callable,
        columns: Sequence[Column],
        width: int,
        keeps: bool = False,
        detail: bool = True,
    ) -> Tensor:
        work = _Work(columns, keeps, detail)
        if not work.groups or torch._C._len_torch_dispatch_stack():
            return fallback(*columns)
        device = work.device
        with torch.no_grad(), torch.inference_mode(False), _on(device):
            rows = torch.empty(work.count, width, dtype=torch.float64, device=device)
            for group, table, owners in work.shipped(self.sizes):
                launch(group, table, owners, rows)
            if work.left:
                others = fallback(*(None if column is None else [column[i] for i in work.left] for column in columns))
                torch._foreach_copy_([rows[i] for i in work.left], list(others))
            return rows

    def _summarize(self, group: Group, table: Tensor, owners: Tensor, rows: Tensor, detail: bool) -> None:
        sizes, count, chunks = self.sizes, len(group.members), len(owners)
        g, w, p, kept = group.types
        partials = _room(rows, chunks, programs.PARTIAL)
        slots = fields.TOP if any(entries > group.length for _, entries in group.members) else 1
        magnitudes = _room(rows, count, slots, fields.TOP)
        indices = _room(rows, count, slots, fields.TOP, dtype=torch.int64)
        layout = {"AXES": group.axes, "ALIGNED": group.aligned}
        if chunks:
            programs.scan[(chunks,)](
                table, owners, partials, group.length, g, w, p, kept is not None, **layout, TILE=sizes.tile
            )
        programs.top[(count, slots)](
            table,
            partials,
            magnitudes,
            indices,
            group.length,
            g,
            **layout,
            PEAKS=sizes.peaks,
            TILE=sizes.searched,
            num_warps=8,
        )
        programs.close[(count,)](
            table, partials, magnitudes, indices, slots, rows, g, w, p, detail, AXES=group.axes, MERGED=sizes.merged
        )

    def _compare(self, group: Group, table: Tensor, owners: Tensor, rows: Tensor) -> None:
        sizes, chunks = self.sizes, len(owners)
        used, before, after, loss = group.types
        partials = _room(rows, chunks, programs.MOVED)
        if chunks:
            layout = {"AXES": group.axes, "ALIGNED": group.aligned, "TILE": sizes.tile}
            programs.move[(chunks,)](table, owners, partials, group.length, used, before, after, loss, **layout)
        programs.settle[(len(group.members),)](table, partials, rows, used, loss, AXES=group.axes, MERGED=sizes.merged)

    def _sample(self, group: Group, table: Tensor, owners: Tensor, rows: Tensor) -> None:
        programs.pick[(len(group.members),)](table, rows, group.types[0], AXES=group.axes)


def _room(like: Tensor, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# --- what is launched -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Group:
    """Tensors whose operands have the same types and that are laid out alike enough for one program."""

    types: Sequence[Any]  #: of the four operands, None where there is none
    axes: int
    aligned: bool  #: every address is a multiple of 16 bytes
    members: list[tuple[int, int]] = field(default_factory=list)  #: row and entries
    layouts: list[Sequence[int]] = field(default_factory=list)
    addresses: list[Sequence[int]] = field(default_factory=list)
    strides: list[int] = field(default_factory=list)  #: of the sample that quantiles rest on
    length: int = 0  #: entries of a chunk

    def words(self, sizes: Sizes) -> tuple[array, array]:
        """The table, and the tensor of each chunk."""
        total = sum(entries for _, entries in self.members)
        self.length = sizes.chunk * max(1, -(-total // (sizes.chunk * sizes.programs)))
        self.length = min(self.length, sizes.tile * 2**15)  # lanes count what is not finite in 16 bits
        table, owners, first = array("q"), array("q"), 0
        for i, (row, entries) in enumerate(self.members):
            count = -(-entries // self.length)
            table.extend(self.addresses[i])
            table.extend((entries, first, count, row, self.strides[i], 0))
            table.extend(self.layouts[i])
            owners.extend([i] * count)
            first += count
        return table, owners


class _Work:
    """Lists of tensors as groups; those that no program takes are `left`."""

    def __init__(self, columns: Sequence[Column], keeps: bool = False, detail: bool = True) -> None:
        self.groups: dict[tuple, Group] = {}
        self.left: list[int] = []
        self.device = torch.device("cpu")
        self._keeps, self._detail = keeps, detail
        self._local: list[Tensor] = []  # parts of distributed tensors, alive while their addresses are in use
        self.count = next(len(column) for column in columns if column is not None)
        lists = [reference.optional("a list", column, self.count) for column in columns]
        lists += [[None] * self.count] * (4 - len(lists))
        for i, group in enumerate(zip(*lists, strict=True)):
            if not self._take(i, group):
                self.left.append(i)

    def shipped(self, sizes: Sizes) -> list[tuple[Group, Tensor, Tensor]]:
        """Each group with its table and owners on the device: one copy for all."""
        words, parts = array("q"), []
        for group in self.groups.values():
            for part in group.words(sizes):
                parts.append((len(words), len(part)))
                words.extend(part)
                words.extend([0] * (len(words) % 2))  # whole 16 bytes, as the programs expect of a pointer
        there = _shipped(words, self.device)
        views = [there[start : start + length] for start, length in parts]
        return list(zip(self.groups.values(), views[::2], views[1::2], strict=True))

    def _take(self, row: int, group: Sequence[Tensor | None]) -> bool:
        try:
            operands = [None if tensor is None else self._operand(tensor) for tensor in group]
        except (RuntimeError, _NotPlainError):  # no storage at all: sparse, opaque, or inside a transform
            return False
        tensors = [tensor for tensor in operands if tensor is not None]
        first = tensors[0]
        if any(tensor.device != first.device for tensor in tensors) or (self.groups and first.device != self.device):
            return False
        if self._keeps and operands[3] is not None and not _may_keep(operands[3], operands):
            return False
        layout = _layout(operands)
        if layout is None:
            return False
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in operands]
        types = tuple(None if tensor is None else _TYPES[tensor.dtype] for tensor in operands)
        aligned = not any(address % 16 for address in addresses)
        key = (types, len(layout) // 5, aligned)
        into = self.groups.get(key)
        if into is None:
            into = self.groups[key] = Group(*key)
            self.device = first.device
        into.members.append((row, first.numel()))
        into.addresses.append(addresses)
        into.layouts.append(layout)
        into.strides.append(stride(first.numel(), first.is_contiguous(), self._detail))
        return True

    def _operand(self, tensor: Tensor) -> Tensor:
        if type(tensor) not in PLAIN:
            local = local_part(tensor)
            if local is tensor:
                raise _NotPlainError
            tensor = local.detach()
            self._local.append(tensor)
        if type(tensor) not in PLAIN or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            raise _NotPlainError
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.detach())
        if (
            tensor.dtype not in _TYPES
            or tensor._is_zerotensor()
            or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            or tensor.untyped_storage().nbytes() < _end(tensor)
        ):
            raise _NotPlainError
        return tensor


class _NotPlainError(Exception):
    pass


def _shipped(words: array, device: torch.device) -> Tensor:
    """The words on the device. From pinned memory, which the allocator keeps until the copy is done."""
    host = torch.frombuffer(words, dtype=torch.int64)
    return host.clone() if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def _end(tensor: Tensor) -> int:
    """The bytes that its storage needs."""
    return (int(tensor.storage_offset()) + _extent(tensor)) * tensor.element_size() if tensor.numel() else 0


def _extent(tensor: Tensor) -> int:
    """From its first entry to its last, in entries."""
    return 1 + sum((n - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _layout(operands: OptionalTensors) -> Sequence[int] | None:
    """Sizes and strides of each operand, the last axis first, padded to a number of axes that programs exist for.

    Nothing for contiguous tensors of as many entries; None where no program does.
    """
    tensors = [tensor for tensor in operands if tensor is not None]
    first = tensors[0]
    if any(tensor.numel() != first.numel() for tensor in tensors):
        return None
    if all(tensor.is_contiguous() for tensor in tensors):
        return ()
    if first.numel() >= 2**31 or any(tensor.shape != first.shape for tensor in tensors):
        return None
    axes: list[list[int]] = []  # size, and four strides
    for axis in reversed(range(first.ndim)):
        size, strides = first.shape[axis], [0 if tensor is None else tensor.stride(axis) for tensor in operands]
        if size == 1:
            continue
        if axes and all(outer == inner * axes[-1][0] for outer, inner in zip(strides, axes[-1][1:], strict=True)):
            axes[-1][0] *= size
        else:
            axes.append([size, *strides])
    room = next((n for n in _LAYOUTS[1:] if n >= len(axes)), None)
    if room is None:
        return None
    axes += [[1, 0, 0, 0, 0]] * (room - len(axes))
    return [axis[i] for i in range(5) for axis in axes]


def _may_keep(keep: Tensor, operands: OptionalTensors) -> bool:
    """Whether the gradient can be written there while it is read: bits as they are, over no tensor but the very previous."""
    gradient, weight, previous, _ = operands
    if gradient is None or keep.dtype != gradient.dtype or _extent(keep) != keep.numel():
        return False
    home = keep.untyped_storage().data_ptr()
    if any(tensor is not None and tensor.untyped_storage().data_ptr() == home for tensor in (gradient, weight)):
        return False
    if previous is None or previous.untyped_storage().data_ptr() != home:
        return True
    same = previous.data_ptr() == keep.data_ptr() and previous.dtype == keep.dtype
    return same and previous.shape == keep.shape and previous.stride() == keep.stride()
