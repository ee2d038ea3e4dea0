"""The native kernel, called through `ctypes`: addresses and lengths go in, rows of float64 come out.

The library knows nothing of Python and torch, so that one build serves every version of both. It takes plain tensors only:
of the exact class `Tensor` or `Parameter` (or the local part of a distributed one), strided, on the CPU, float32, float64,
bfloat16 or float16, without lazy bits, in memory that is really there. Everything else goes to the reference, row by row.

All tensors of a call are one call. To ask a tensor costs more than to read a small one, so a list is asked one question
after the other, by `map`. Only a list in which not all are plain and contiguous is halved until the odd ones are found.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import add, ge, is_, mul
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradlens import fields
from gradlens.errors import GradlensError
from gradlens.kernels import reference

LIBRARY = Path(__file__).with_name("_native.so")
VARIANTS = ("plain", "AVX2", "AVX-512")  #: what the inner loops are compiled for

#: Entries from which a second thread is worth its start.
THREADED = 2**18

_FORM = 2  # of the calls: the library has the same number
_PLAIN = {Tensor, torch.nn.Parameter}
_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_BYTES = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2, torch.float16: 2}
_OPERANDS, _TASK = 4, 10  # numbers of a task: the addresses, the types, a count, and where the layout stands
_AXES = 8  # tensors of more are left to the reference
_NOWHERE = 1  # stands for the address of an empty tensor, which is never read: 0 says that there is no tensor
_GAP = -1  # stands for the count of a tensor that is not there

Holes = Sequence[Tensor | None]
Column = Sequence[Any] | None


class Own(tuple[Tensor, ...]):
    """Tensors that are gradlens' own: nobody else moves or frees them, so each is asked once where it is."""

    facts: _Facts | None = None


class UnavailableError(GradlensError, ImportError):
    """There is no native kernel here; the message says why."""


def load(path: Path = LIBRARY) -> Native:
    """The kernel, for the best variant that this processor runs.

    Raises:
        UnavailableError: It was not built, does not load, or was built for other columns.
    """
    if not path.exists():
        raise UnavailableError("the native kernel was not built; with a C compiler there, install gradlens again")
    try:
        library = ctypes.CDLL(str(path))
        library.gradlens_columns.restype = ctypes.c_char_p
        built_for = library.gradlens_columns().decode()
    except (OSError, AttributeError) as error:
        raise UnavailableError(f"the native kernel does not load: {error}") from error
    if built_for != _columns():
        raise UnavailableError("the native kernel was built for other columns; install gradlens again")
    arguments = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    for call in (library.gradlens_summarize, library.gradlens_compare, library.gradlens_sample):
        call.argtypes = arguments
        call.restype = ctypes.c_int
    return Native(library, library.gradlens_variant())


def _columns() -> str:
    summary, updates = (" ".join(field.name for field in group) for group in (fields.SUMMARY, fields.UPDATES))
    return f"{_FORM} | {summary} histogram {fields.EXPONENT_MIN} {fields.EXPONENT_MAX} top {fields.TOP} | {updates}"


@dataclass(frozen=True)
class Native:
    """The library, and which of its `VARIANTS` runs."""

    library: ctypes.CDLL
    variant: int

    def summarize(
        self,
        gradients: Sequence[Tensor],
        weights: Holes | None = None,
        previous: Holes | None = None,
        keep: Holes | None = None,
    ) -> Tensor:
        """As `reference.summarize`."""
        columns = [gradients, weights, previous, keep]
        return self._rows(self.library.gradlens_summarize, reference.summarize, columns, fields.WIDTH, keep)

    def compare(self, used: Holes, before: Sequence[Tensor], after: Sequence[Tensor], loss: Holes | None = None) -> Tensor:
        """As `reference.compare`."""
        columns = [used, before, after, loss]
        return self._rows(self.library.gradlens_compare, reference.compare, columns, len(fields.UPDATES))

    def sample(self, tensors: Sequence[Tensor]) -> Tensor:
        """As `reference.sample`."""
        return self._rows(self.library.gradlens_sample, reference.sample, [tensors], reference.SAMPLES)

    def _rows(
        self, call: Callable, honest: Callable, columns: Sequence[Column], width: int, keep: Holes | None = None
    ) -> Tensor:
        if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
            return honest(*columns)  # what is made here would be no ordinary tensor
        with torch._C.DisableTorchFunction(), torch.inference_mode(False):
            work = _Work(columns)
            rows = torch.empty(len(work.taken), width, dtype=torch.float64, device="cpu")
            threads = torch.get_num_threads() if work.entries >= THREADED else 1
            tasks, layouts = (numbers.buffer_info()[0] for numbers in (work.tasks, work.layouts))
            safe = keep is None or _apart(columns, keep, work)
            done = safe and call(tasks, len(work.taken), layouts, rows.data_ptr(), threads, self.variant)
        if not done:
            return honest(*columns)
        if not work.left:
            return rows
        others = honest(*(None if column is None else [column[i] for i in work.left] for column in columns))
        with torch.no_grad(), torch.inference_mode(False):
            order = torch.tensor([*work.taken, *work.left], dtype=torch.int64, device="cpu").argsort()
            return torch.cat([rows, others]).index_select(0, order)


# --- lists of tensors in the library's form: `task` and `layouts` of native.c --------------------------------------------


class _Work:
    """The tasks of a call, and which rows are `taken`; what is `left` is not plain."""

    def __init__(self, columns: Sequence[Column]) -> None:
        n = next(len(column) for column in columns if column is not None)
        self._columns = [None if column is None else reference.whole("a list", column, n) for column in columns]
        self._local: list[Tensor] = []  # parts of distributed tensors, alive while their addresses are in use
        self.tasks, self.layouts = array("q"), array("q", [0])
        self.taken: list[int] = []
        self.left: list[int] = []
        self._n = n
        self._take(0, n)
        self.entries = sum(self.tasks[2 * _OPERANDS :: _TASK])

    def _take(self, start: int, stop: int) -> None:
        part = self._columns
        if stop - start < self._n:
            part = [None if column is None else column[start:stop] for column in self._columns]
        tasks = _tasks(part, stop - start)
        if tasks is None and stop - start > 1:
            middle = (start + stop) // 2
            self._take(start, middle)
            self._take(middle, stop)
            return
        if tasks is None:
            tasks = self._bent([None if column is None else column[0] for column in part])
        if tasks is None:
            self.left.append(start)
        else:
            self.taken.extend(range(start, stop))
            self.tasks.extend(tasks)

    def _bent(self, row: Sequence[Tensor | None]) -> array | None:
        """The task of plain tensors in whatever order of memory; None where one is not plain."""
        row = [None if tensor is None else _local_part(tensor) for tensor in row]
        task = _tasks([None if tensor is None else [tensor] for tensor in row], 1, straight=False)
        if task is None:
            return None
        self._local.extend(tensor for tensor in row if tensor is not None)
        shapes = [tensor.shape for tensor in row if tensor is not None]
        if any(tensor is not None and not tensor.is_contiguous() for tensor in row):
            if len(set(shapes)) > 1 or len(shapes[0]) > _AXES:
                return None
            task[_TASK - 1] = len(self.layouts)
            self.layouts.extend([len(shapes[0]), *shapes[0]])
            for tensor in (*row, *[None] * (_OPERANDS - len(row))):
                self.layouts.extend([0] * len(shapes[0]) if tensor is None else tensor.stride())
        return task


def _tasks(columns: Sequence[Column], n: int, *, straight: bool = True) -> array | None:
    """The tasks of n rows of plain tensors, one size a row; None if any is not plain, or not contiguous where it must be."""
    tasks = array("q", bytes(8 * _TASK * n))
    counts: list[int] = []
    known: list[tuple[Sequence[Any], _Facts]] = []
    for operand, column in enumerate(columns):
        if column is None:
            continue
        facts = next((facts for earlier, facts in known if earlier is column or all(map(is_, earlier, column))), None)
        facts = _facts(column, straight) if facts is None else facts
        if facts is None:
            return None
        known.append((column, facts))
        pointers, codes, sizes = facts
        if not counts:
            counts = sizes
        elif sizes != counts:
            if any(a != b and _GAP not in (a, b) for a, b in zip(sizes, counts, strict=True)):
                return None
            counts = list(map(max, sizes, counts))
        tasks[operand::_TASK] = array("q", pointers)
        tasks[_OPERANDS + operand :: _TASK] = array("q", codes)
    tasks[2 * _OPERANDS :: _TASK] = array("q", counts)
    return tasks


_Facts = tuple[list[int], list[int], list[int]]  # addresses, types and counts


def _facts(column: Sequence[Tensor | None], straight: bool) -> _Facts | None:
    """What the library must know of plain tensors; None if any is not plain."""
    if isinstance(column, Own) and straight:
        if column.facts is None:
            column.facts = _facts(list(column), straight)
        return column.facts
    kinds = set(map(type, column))
    if type(None) in kinds:
        return _spread(column, _facts([tensor for tensor in column if tensor is not None], straight))
    tensors: Any = column
    if not kinds <= _PLAIN:
        return None
    types = [tensor.dtype for tensor in tensors]
    if not _CODES.keys() >= set(types):
        return None
    try:
        if any(map(Tensor.is_neg, tensors)) or not all(tensor.is_cpu for tensor in tensors):
            return None
        if straight and not all(map(Tensor.is_contiguous, tensors)):
            return None
        counts = list(map(Tensor.numel, tensors))
        ends = map(add, map(Tensor.storage_offset, tensors), counts) if straight else map(_end, tensors)
        there = map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors))
        if not all(map(ge, there, map(mul, ends, map(_BYTES.__getitem__, types)))):
            return None
        pointers = list(map(Tensor.data_ptr, tensors))
    except RuntimeError:  # no storage at all: sparse, opaque, or inside a transform
        return None
    if 0 in pointers:
        pointers = [pointer or (0 if count else _NOWHERE) for pointer, count in zip(pointers, counts, strict=True)]
        if 0 in pointers:
            return None  # a storage without memory
    return pointers, list(map(_CODES.__getitem__, types)), counts


def _spread(column: Sequence[Tensor | None], facts: _Facts | None) -> _Facts | None:
    """The facts with gaps where the column has none."""
    if facts is None:
        return None
    given = zip(*facts, strict=True)
    gap = (0, 0, _GAP)
    pointers, codes, counts = zip(*(gap if tensor is None else next(given) for tensor in column), strict=True)
    return list(pointers), list(codes), list(counts)


def _end(tensor: Tensor) -> int:
    """The entries that its storage must have."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1)


def _local_part(tensor: Tensor) -> Tensor:
    local = None if type(tensor) in _PLAIN else getattr(tensor, "to_local", None)
    return tensor if local is None else local().detach()


def _apart(columns: Sequence[Column], keep: Holes, work: _Work) -> bool:
    """Whether no tensor to be overwritten lies in the memory of one that the other backend reads, or the other way round."""
    if not work.left:
        return True  # the library looks at its own
    rows = {True: work.taken, False: work.left}
    written = {mine: _homes(keep[i] for i in rows[mine]) for mine in rows}
    read = {mine: _homes(column[i] for column in columns if column is not None for i in rows[mine]) for mine in rows}
    return written[True].isdisjoint(read[False]) and written[False].isdisjoint(read[True])


def _homes(tensors: Iterable[Tensor | None]) -> set[int]:
    """Where their storages begin."""
    strided = (tensor for tensor in tensors if tensor is not None and tensor.layout == torch.strided)
    return {tensor.untyped_storage().data_ptr() for tensor in map(_local_part, strided) if tensor.is_cpu} - {0}
