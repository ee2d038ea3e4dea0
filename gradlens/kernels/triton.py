"""The GPU kernels: all tensors of a call in one launch a type, and nothing that waits for the device.

The host only collects addresses: a table of 64-bit integers goes to the device in one asynchronous copy from pinned memory,
the programs find their tensor in it (`programs`), and the rows stay there. Plain strided tensors are taken, of float32,
float64, bfloat16, float16 or complex, in any layout of up to eight axes; all else goes to the reference, tensor by tensor.

Memory besides the rows is bounded: 3.3 KB of partial numbers (float64: 4.3) for each of at most `Sizes.programs` chunks and
one a tensor.

The first call of a kind compiles its programs, once a machine: Triton keeps them on disk.
"""

from __future__ import annotations

import contextlib
import struct
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import or_
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from gradlens import fields
from gradlens._torch import local_part
from gradlens.kernels import programs, reference
from gradlens.kernels.entries import stride
from gradlens.kernels.tensors import PLAIN

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_KEPT_TYPES = _TYPES | {torch.int32: tl.int32, torch.int8: tl.int8}
MOST = 2**36  #: entries of a tensor: its cache lines are counted in 32 bits
_LAYOUTS = (0, 4, 8)  # numbers of axes that programs are compiled for; 0: contiguous

OptionalTensors = Sequence[Tensor | None]
Column = Sequence[Any] | None


@dataclass(frozen=True)
class Sizes:
    """How the work is cut: powers of two, but `programs`.

    Two entries a thread and at most `registers` of these keep `summarize` clear of spilling, as it is compiled for sm_80 and
    sm_90: four programs fit on a multiprocessor. Without a limit some types take 160, and three fit.
    """

    tile: int = 256  #: entries that a program of four warps reads in one go
    chunk: int = 2**14  #: entries of a chunk, at least
    programs: int = 2048  #: chunks, at most, but for one a tensor
    fan: int = 32  #: chunks whose partial rows one program merges; of more, blocks of so many are merged first
    merged: int = 16  #: partial rows that are added in one go
    settled: int = 64  #: of updates
    peaks: int = 256  #: chunks whose extremes are looked at in one go
    registers: int = 128  #: a thread, at most
    searched: int = 64  #: entries of each of sixteen strips, or chunks, that are looked at in one go


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

    def add_moments(
        self,
        gradients: Sequence[Tensor],
        kept: Sequence[Sequence[Tensor]],
        divisor: float | Tensor,
        share: float,
        weight: float,
        left: set[int],
    ) -> None:
        """As `accumulate.add_moments` for each gradient; the places of those that were added are taken out of `left`."""
        work = _Work([gradients, *zip(*kept, strict=True)], types=_KEPT_TYPES)
        of, third = None, float(1)
        if isinstance(divisor, Tensor) and divisor.device == work.device:
            of, third = _TYPES.get(divisor.dtype), divisor.data_ptr()
            if of is None:
                return
        elif isinstance(divisor, Tensor) or divisor != 1:
            of, third = tl.int64, float(divisor)

        def launch(shipment: Shipment) -> None:
            operands = shipment.table, shipment.owners, shipment.more, shipment.group.length, shipment.group.types[0], of
            layout = shipment.group.layout
            programs.add_moments[(shipment.chunks,)](*operands, **layout, TILE=self.sizes.tile, enable_fp_fusion=False)

        self._change(work, launch, _words_of(share, weight, third), left)

    def fold_decayed(
        self, gradients: Sequence[Tensor], kept: Sequence[Sequence[Tensor]], share: float, left: set[int]
    ) -> None:
        """As `accumulate.fold_decayed` for each gradient; the places of those that were folded are taken out of `left`."""
        if not 0 < share < 0.5 or any(gradient.dtype != torch.float64 for gradient in gradients):
            return
        work = _Work([gradients, *zip(*kept, strict=True)], types=_KEPT_TYPES)

        def launch(shipment: Shipment) -> None:
            operands, group = (shipment.table, shipment.owners, shipment.more, shipment.group.length), shipment.group
            layout = {"ALIGNED": group.aligned, "WORDS": group.width, "TILE": self.sizes.tile}
            programs.fold_decayed[(shipment.chunks,)](*operands, **layout, enable_fp_fusion=False)

        self._change(work, launch, _words_of(share), left)

    def _change(self, work: _Work, launch: Callable[[Shipment], None], numbers: array, left: set[int]) -> None:
        """Launch what changes its operands: each tensor once, whatever fails in between."""
        if not work.groups or torch._C._len_torch_dispatch_stack():
            return
        with torch.no_grad(), torch.inference_mode(False), _on(work.device):
            for shipment in work.shipped(self.sizes, numbers):
                launch(shipment)
                left.difference_update(row for row, _ in shipment.group.members)

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
            for shipment in work.shipped(self.sizes):
                launch(shipment, rows)
            if work.left:
                others = fallback(*(None if column is None else [column[i] for i in work.left] for column in columns))
                torch._foreach_copy_([rows[i] for i in work.left], list(others))
            return rows

    def _summarize(self, shipment: Shipment, rows: Tensor, detail: bool) -> None:
        sizes, group = self.sizes, shipment.group
        g, w, p, kept = group.types
        parts = shipment.parts
        programs.summarize[(shipment.chunks,)](
            shipment.table,
            shipment.owners,
            shipment.more,
            _room(rows, parts, programs.PADDED),
            _room(rows, parts, programs.BINS, dtype=torch.int32),
            _room(rows, parts, sizes.tile, dtype=torch.int64 if g is tl.float64 else torch.int32),
            _room(rows, parts, sizes.tile, dtype=torch.int32),
            rows,
            group.length,
            *(g, w, p, kept is not None, detail),
            **group.layout,
            TILE=sizes.tile,
            FAN=sizes.fan,
            MERGED=sizes.merged,
            PEAKS=sizes.peaks,
            SEARCHED=sizes.searched,
            maxnreg=sizes.registers,
        )

    def _compare(self, shipment: Shipment, rows: Tensor) -> None:
        sizes, group = self.sizes, shipment.group
        partials = _room(rows, shipment.parts, programs.MOVED)
        operands = shipment.table, shipment.owners, partials, rows, group.length
        programs.compare[(shipment.chunks,)](*operands, *group.types, **group.layout, TILE=sizes.tile, MERGED=sizes.settled)

    def _sample(self, shipment: Shipment, rows: Tensor) -> None:
        group = shipment.group
        programs.sample[(len(group.members),)](shipment.table, rows, group.types[0], AXES=group.axes, WORDS=group.width)


def _words_of(*numbers: float) -> array:
    """The bits of float64 numbers; integers as they are."""
    bits = (n.to_bytes(8, sys.byteorder) if isinstance(n, int) else struct.pack("=d", n) for n in numbers)
    return array("q", b"".join(bits))


def _room(like: Tensor, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# --- what is launched -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Group:
    """Tensors whose operands have the same types and that are laid out alike enough for one program."""

    types: Sequence[Any]  #: of the operands, None where there is none
    axes: int
    aligned: bool  #: every address is a multiple of 16 bytes
    members: list[tuple[int, int]] = field(default_factory=list)  #: row and entries
    layouts: list[Sequence[Sequence[int]]] = field(default_factory=list)  #: sizes, and strides of each operand
    addresses: list[Sequence[int]] = field(default_factory=list)
    strides: list[int] = field(default_factory=list)  #: of the sample that quantiles rest on
    length: int = 0  #: entries of a chunk

    @property
    def width(self) -> int:
        """Integers of a table's entry."""
        return programs.HEAD + self.axes + len(self.types) * (1 + self.axes)

    @property
    def layout(self) -> dict[str, Any]:
        """What programs are compiled for."""
        return {"AXES": self.axes, "ALIGNED": self.aligned, "WORDS": self.width}

    def words(self, sizes: Sizes) -> tuple[array, array, array]:
        """The table; of each chunk the tensor, and which of its chunks it is; a counter a block."""
        total = sum(entries for _, entries in self.members)
        self.length = sizes.chunk * max(1, -(-total // (sizes.chunk * sizes.programs)))
        self.length = min(self.length, sizes.tile * 2**14)  # lanes count what is not finite in 16 bits
        counts = [max(1, -(-entries // self.length)) for _, entries in self.members]
        blocks = [-(-count // sizes.fan) if count > sizes.fan else 0 for count in counts]
        table, owners, block, first = array("q"), array("q"), 0, sum(blocks)
        for i, (row, entries) in enumerate(self.members):
            table.extend((entries, first, block, counts[i], row, self.strides[i], 0, 0, *self.layouts[i][0]))
            if self.axes:
                for address, steps in zip(self.addresses[i], self.layouts[i][1:], strict=True):
                    table.extend((address, *steps))
            else:
                table.extend(self.addresses[i])
            owners.extend(range(i << 32, (i << 32) + counts[i]))
            first, block = first + counts[i], block + blocks[i]
        return table, owners, array("q", bytes(8 * block))


class Shipment(NamedTuple):
    """A group with what its programs read, on the device."""

    group: Group
    table: Tensor
    owners: Tensor
    more: Tensor  #: a counter of arrivals for each block, or the numbers of a launch

    @property
    def chunks(self) -> int:
        """Programs of the launch."""
        return len(self.owners)

    @property
    def parts(self) -> int:
        """Partial rows: one a block, then one a chunk."""
        return len(self.more) + len(self.owners)


class _Work:
    """Lists of tensors as groups; those that no program takes are `left`."""

    def __init__(
        self,
        columns: Sequence[Column],
        keeps: bool = False,
        detail: bool = True,
        types: Mapping[torch.dtype, Any] = _TYPES,
    ) -> None:
        self.groups: dict[tuple, Group] = {}
        self.left: list[int] = []
        self.device = torch.device("cpu")
        self._keeps, self._detail, self._types = keeps, detail, types
        self._local: list[Tensor] = []  # parts of distributed tensors, alive while their addresses are in use
        self.count = next(len(column) for column in columns if column is not None)
        lists = [reference.optional("a list", column, self.count) for column in columns]
        for i, group in enumerate(zip(*lists, strict=True)):
            if not self._take(i, group):
                self.left.append(i)

    def shipped(self, sizes: Sizes, numbers: array | None = None) -> list[Shipment]:
        """Each group with its words on the device, and these numbers, if any, instead of counters: one copy for all."""
        words, parts = array("q"), []
        for group in self.groups.values():
            table, owners, arrivals = group.words(sizes)
            for part in (table, owners, arrivals if numbers is None else numbers):
                parts.append((len(words), len(part)))
                words.extend(part)
                words.extend([0] * (len(words) % 2))  # whole 16 bytes, as the programs expect of a pointer
        there = _shipped(words, self.device)
        views = [there[start : start + length] for start, length in parts]
        return list(map(Shipment, self.groups.values(), views[::3], views[1::3], views[2::3]))

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
        types = tuple(None if tensor is None else self._types[tensor.dtype] for tensor in operands)
        aligned = not reduce(or_, addresses) % 16
        key = (types, len(layout[0]), aligned)
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
            tensor.dtype not in self._types
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
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum((n - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _layout(operands: OptionalTensors) -> Sequence[Sequence[int]] | None:
    """Sizes and strides of each operand, the last axis first, padded to a number of axes that programs exist for.

    Nothing for contiguous tensors of as many entries; None where no program does.
    """
    tensors = [tensor for tensor in operands if tensor is not None]
    first = tensors[0]
    if first.numel() >= MOST or any(tensor.numel() != first.numel() for tensor in tensors):
        return None
    if all(tensor.is_contiguous() for tensor in tensors):
        return [()] * (1 + len(operands))
    if first.numel() >= 2**31 or any(tensor.shape != first.shape for tensor in tensors):
        return None
    axes: list[list[int]] = []  # size, and a stride of each operand
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
    axes += [[1] + [0] * len(operands)] * (room - len(axes))
    return list(zip(*axes, strict=True))


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
