"""The native kernel, called through `ctypes`: addresses and lengths go in, rows of float64 come out.

The library knows nothing of Python and torch, so that one build serves every version of both. It takes plain tensors only:
of the exact class `Tensor` or `Parameter` (or the local part of a distributed one), strided, on the CPU, float32, float64,
bfloat16 or float16, without lazy bits, in memory that is really there. Everything else goes to the reference, row by row.

All tensors of a call are one call. To ask a tensor what it is costs more than to read a small one. So the library asks,
through the table of functions that torch offers in DLPack's form; where torch has none yet, a list is asked one question
after the other, by `map`. Only a list in which not all are plain and contiguous is halved until the odd ones are found.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from operator import add, attrgetter, ge, is_, mul
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradlens import fields
from gradlens._torch import local_part
from gradlens.errors import GradlensError
from gradlens.kernels import reference
from gradlens.kernels.tensors import PLAIN

LIBRARY = Path(__file__).with_name("_native.so")
VARIANTS = ("plain", "AVX2", "AVX-512")  #: what the inner loops are compiled for

#: Entries from which a second thread is worth its start.
THREADED = 2**18

#: Entries below which a call keeps Python's lock: it takes less than 0.2 ms, a thread that waits for the lock 5.
BRIEF = 2**17

_FORM = 4  # of the calls: the library has the same number
_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_BYTES = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2, torch.float16: 2}
_OPERANDS, _TASK = 5, 12  # numbers of a task: the addresses, the types, a count, and where the layout stands
_AXES = 8  # tensors of more are left to the reference
_TYPE, _ON_CPU = attrgetter("dtype"), attrgetter("is_cpu")
_dispatching, _transforming = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_OPTIONAL = {*PLAIN, type(None)}
_NOWHERE = 1  # stands for the address of an empty tensor, which is never read: 0 says that there is no tensor
_GAP = -1  # stands for the count of a tensor that is not there

OptionalTensors = Sequence[Tensor | None]
Column = Sequence[Any] | None


class StableTensors(tuple[Tensor, ...]):
    """Tensors whose memory does not move while this list is in use, so each is asked for its address once.

    These are gradlens' own, or others for the duration of one call.
    """

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
    return Native(_declared(library), library.gradlens_variant(), _introspector(path), _declared(ctypes.PyDLL(str(path))))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its calls."""
    pointer, whole, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name in ("summarize", "summarize_light", "compare", "sample"):
        call = getattr(library, f"gradlens_{name}")
        call.argtypes, call.restype = (pointer, whole, pointer, pointer, integer, integer), integer
    library.gradlens_read.argtypes = (pointer, whole, pointer, pointer, integer, integer, integer)
    library.gradlens_read.restype = None
    for name in ("add_moments", "fold_decayed"):
        call = getattr(library, f"gradlens_{name}")
        call.argtypes, call.restype = (pointer, whole, integer, integer), None
    library.gradlens_output.argtypes, library.gradlens_output.restype = (pointer, integer, integer), None
    library.gradlens_unchanged.argtypes, library.gradlens_unchanged.restype = (pointer, whole, pointer, integer), integer
    return library


class Introspector(NamedTuple):
    """Reads the facts of tensors in C: for lists of plain contiguous tensors."""

    fill: Callable[[Sequence[Any], array, int], bool]  #: writes an operand into tasks, if all are plain
    same: Callable[[Sequence[Any], array, int], bool]  #: whether all are where and what the tasks say
    refill: Callable[[Sequence[Any], Sequence[Any], array], bool]  #: as `Native.refill`
    stayed: Callable[[list[Any], list[Any], array, int, bool], int]  #: gradients, weights: then `unchanged`


class _Exchange(ctypes.Structure):
    """DLPack's table of functions, version 1; the last one that is used here may be missing."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("others", ctypes.c_void_p * 4),
        ("tensor_of_object", ctypes.c_void_p),
    )


def _introspector(path: Path) -> Introspector | None:
    """An `Introspector`; None where this torch lacks the C functions that it calls."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    table = _Exchange.from_address(address(capsule, b"dlpack_exchange_api"))
    if table.major != 1 or not table.tensor_of_object:
        return None
    ask = ctypes.PyDLL(str(path)).gradlens_ask  # with the GIL: it asks Python's objects
    ask.argtypes = (
        *[ctypes.c_void_p] * 2,
        ctypes.py_object,
        *[ctypes.c_void_p] * 3,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int,
    )
    ask.restype = ctypes.c_int
    compare = ctypes.PyDLL(str(path)).gradlens_same
    compare.argtypes = (*[ctypes.c_void_p] * 2, ctypes.py_object, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
    compare.restype = ctypes.c_int
    functions = ctypes.cast(ctypes.pythonapi.PyList_GetItem, ctypes.c_void_p).value, table.tensor_of_object

    def same(column: Sequence[Any], tasks: array, operand: int) -> bool:
        objects = list(column)
        try:
            return bool(compare(*functions, objects, len(objects), tasks.buffer_info()[0], operand))
        except (RuntimeError, BufferError):
            return False

    agree = ctypes.PyDLL(str(path)).gradlens_stayed
    agree.argtypes = (*[ctypes.c_void_p] * 2, *[ctypes.py_object] * 2, ctypes.c_int64, *[ctypes.c_void_p] * 2, ctypes.c_int)
    agree.restype = ctypes.c_int

    def stayed(gradients: list[Any], weights: list[Any], tasks: array, samples: int, exact: bool) -> int:
        try:
            at = tasks.buffer_info()[0]
            return agree(*functions, gradients, weights, len(gradients), at, samples, exact)  # type: ignore[no-any-return]
        except (RuntimeError, BufferError):
            return 0

    def asked(column: Sequence[Any], tasks: array, operand: int) -> bool:
        objects, kinds = list(column), set(map(type, column))
        tensors = objects
        if not kinds <= PLAIN:
            if not kinds <= _OPTIONAL:
                return False
            tensors = [tensor for tensor in objects if tensor is not None]
        try:
            if any(map(Tensor.is_neg, tensors)):
                return False
            offsets = array("q", map(Tensor.storage_offset, tensors))  # type: ignore[type-var]
            sizes = array("q", map(len, map(Tensor.untyped_storage, tensors)))
            there = offsets.buffer_info()[0], sizes.buffer_info()[0]
            return bool(ask(*functions, objects, id(None), *there, len(objects), tasks.buffer_info()[0], operand))
        except (RuntimeError, BufferError):  # no storage at all: sparse, opaque, or inside a transform
            return False

    def refill(weights: Sequence[Any], gradients: Sequence[Any], tasks: array) -> bool:
        both, n = [*weights, *gradients], len(weights)
        if not set(map(type, both)) <= PLAIN:
            return False
        objects, at = both[n:], tasks.buffer_info()[0]
        try:
            if any(map(Tensor.is_neg, both)):
                return False
            offsets = array("q", map(Tensor.storage_offset, objects))  # type: ignore[type-var]
            sizes = array("q", map(len, map(Tensor.untyped_storage, objects)))
            there = offsets.buffer_info()[0], sizes.buffer_info()[0]
            return bool(compare(*functions, both, n, at, 1) and ask(*functions, objects, id(None), *there, n, at, 0))
        except (RuntimeError, BufferError):
            return False

    return Introspector(asked, same, refill, stayed)


def _columns() -> str:
    summary, updates = (" ".join(field.name for field in group) for group in (fields.SUMMARY, fields.UPDATES))
    quantiles = " ".join(map(str, fields.QUANTILES.values()))
    sample = f"{fields.LARGE} {fields.STRATA} {fields.LINE}"
    histogram = f"histogram {fields.EXPONENT_MIN} {fields.EXPONENT_MAX}"
    return f"{_FORM} | {summary} quantiles {quantiles} of {sample} top {fields.TOP} {histogram} | {updates}"


@dataclass(frozen=True)
class Native:
    """The library, which of its `VARIANTS` runs, and how it asks tensors.

    Calls of `holding` keep Python's lock. Where a call takes less time than another thread may keep the lock once it has
    it, that is the faster way.
    """

    library: ctypes.CDLL
    variant: int
    introspector: Introspector | None = None
    holding: ctypes.CDLL | None = None

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
        call = self.library.gradlens_summarize if detail else self.library.gradlens_summarize_light
        return self._rows(call, partial(reference.summarize, detail=detail), columns, width, keep)

    def compare(
        self, used: OptionalTensors, before: Sequence[Tensor], after: Sequence[Tensor], loss: OptionalTensors | None = None
    ) -> Tensor:
        """As `reference.compare`."""
        columns = [used, before, after, loss]
        return self._rows(self.library.gradlens_compare, reference.compare, columns, len(fields.UPDATES))

    def sample(self, tensors: Sequence[Tensor]) -> Tensor:
        """As `reference.sample`."""
        return self._rows(self.library.gradlens_sample, reference.sample, [tensors], reference.SAMPLES)

    def library_for(self, entries: int) -> ctypes.CDLL:
        """The calls for so many entries: brief ones keep Python's lock, where that is possible."""
        return self.holding if self.holding is not None and entries < BRIEF else self.library

    def fill(self, column: Sequence[Tensor], tasks: array, operand: int) -> bool:
        """Write an operand into tasks, if all tensors are plain, contiguous and as large as the operands before them."""
        if not set(map(type, column)) <= PLAIN:
            return False  # None among them: a gap would leave the address of an earlier call
        if self.introspector is not None:
            return self.introspector.fill(column, tasks, operand)
        facts = _facts(list(column), straight=True)
        return facts is not None and _fits(facts, tasks, operand)

    def refill(self, weights: Sequence[Tensor], gradients: Sequence[Tensor], tasks: array) -> bool:
        """Write other gradients into tasks that have been filled, if the weights are still where and what these say.

        Not while a mode is active.
        """
        if len(gradients) != len(weights) or _dispatching() or _transforming() is not None:
            return False
        if self.introspector is not None:
            return self.introspector.refill(weights, gradients, tasks)
        return self.is_same(weights, tasks, 1) and self.fill(gradients, tasks, 0)

    def unchanged(self, gradients: Sequence[Tensor], weights: list[Tensor], tasks: array, samples: int, exact: bool) -> int:
        """1 for the gradients, if they are where and what the tasks say with the samples there, plus 2 for the weights.

        0 where any is not where and what the tasks say, and while a mode is active; lazy bits and the size of storages are
        not asked. `exact`: where weights were copied, all of them are compared with the copy.
        """
        if len(gradients) != len(weights) or _dispatching() or _transforming() is not None:
            return 0
        if not set(map(type, gradients)) <= PLAIN:
            return 0
        if self.introspector is not None:
            return self.introspector.stayed(list(gradients), weights, tasks, samples, exact)
        with torch._C.DisableTorchFunction():
            if not (self.is_same(gradients, tasks, 0, lazy=False) and self.is_same(weights, tasks, 1, lazy=False)):
                return 0
        calls = self.library if self.holding is None else self.holding
        return int(calls.gradlens_unchanged(tasks.buffer_info()[0], len(gradients), samples, exact))

    def is_same(self, column: Sequence[Tensor], tasks: array, operand: int, *, lazy: bool = True) -> bool:
        """Whether these are plain tensors of the tasks' types, sizes and addresses.

        How large storages are is not asked: one that shrinks moves, and its tensors with it. `lazy`: ask for lazy bits too.
        """
        if not set(map(type, column)) <= PLAIN or (lazy and any(map(Tensor.is_neg, column))):
            return False
        if self.introspector is not None:
            return self.introspector.same(column, tasks, operand)
        facts = _facts(list(column), straight=True)
        places = addresses(tasks, operand), types(tasks, operand), tasks[2 * _OPERANDS :: _TASK]
        return facts is not None and tuple(array("q", column) for column in facts) == places

    def _rows(
        self, call: Callable, fallback: Callable, columns: Sequence[Column], width: int, keep: OptionalTensors | None = None
    ) -> Tensor:
        if modes_are_active():
            return fallback(*columns)
        with torch._C.DisableTorchFunction(), torch.inference_mode(False):
            work = _Work(columns, self.introspector)
            rows = torch.empty(len(work.taken), width, dtype=torch.float64, device="cpu")
            threads = threads_for(work.entries)
            tasks, layouts = (numbers.buffer_info()[0] for numbers in (work.tasks, work.layouts))
            safe = keep is None or _disjoint(columns, keep, work)
            done = safe and call(tasks, len(work.taken), layouts, rows.data_ptr(), threads, self.variant)
        if not done:
            return fallback(*columns)
        if not work.left:
            return rows
        others = fallback(*(None if column is None else [column[i] for i in work.left] for column in columns))
        with torch.no_grad(), torch.inference_mode(False):
            order = torch.tensor([*work.taken, *work.left], dtype=torch.int64, device="cpu").argsort()
            return torch.cat([rows, others]).index_select(0, order)


# --- lists of tensors in the library's form: `task` and `layouts` of native.c --------------------------------------------


NO_LAYOUTS = 0


def empty_tasks(n: int) -> array:
    """Tasks of n rows without operands."""
    tasks = array("q", bytes(8 * _TASK * n))
    tasks[2 * _OPERANDS :: _TASK] = array("q", [_GAP]) * n
    return tasks


def addresses(tasks: array, operand: int) -> array:
    """The addresses of an operand, one a row."""
    return tasks[operand::_TASK]


def set_addresses(tasks: array, operand: int, pointers: array) -> None:
    """Write the addresses of an operand, one a row."""
    tasks[operand::_TASK] = pointers


def types(tasks: array, operand: int) -> array:
    """The codes of an operand's types, one a row."""
    return tasks[_OPERANDS + operand :: _TASK]


def copy_operand(tasks: array, operand: int, others: array, other: int) -> None:
    """Copy an operand from some tasks to others."""
    others[other::_TASK] = tasks[operand::_TASK]
    others[_OPERANDS + other :: _TASK] = tasks[_OPERANDS + operand :: _TASK]


def total(tasks: array) -> int:
    """The number of entries in all rows together."""
    return sum(tasks[2 * _OPERANDS :: _TASK])


def own_memory(rooms: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether none of these rooms shares its storage with another tensor of the call."""
    mine = _storages(rooms)
    return len(mine) == sum(room.numel() > 0 for room in rooms) and mine.isdisjoint(_storages(others))


def threads_for(entries: int) -> int:
    """How many threads a call that reads so many entries takes."""
    return torch.get_num_threads() if entries >= THREADED else 1


def modes_are_active() -> bool:
    """Whether a mode is active in which new tensors are not ordinary ones."""
    return bool(_dispatching()) or _transforming() is not None


class _Work:
    """The tasks of a call, and which rows are `taken`; what is `left` is not plain."""

    def __init__(self, columns: Sequence[Column], introspector: Introspector | None = None) -> None:
        n = next(len(column) for column in columns if column is not None)
        self._columns = [None if column is None else reference.check_lengths("a list", column, n) for column in columns]
        self._introspector = introspector
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
        tasks = (
            _tasks(part, stop - start)
            if self._introspector is None
            else _introspected(part, stop - start, self._introspector)
        )
        if tasks is None and stop - start > 1:
            middle = (start + stop) // 2
            self._take(start, middle)
            self._take(middle, stop)
            return
        if tasks is None:
            tasks = self._strided_task([None if column is None else column[0] for column in part])
        if tasks is None:
            self.left.append(start)
        else:
            self.taken.extend(range(start, stop))
            self.tasks.extend(tasks)

    def _strided_task(self, row: Sequence[Tensor | None]) -> array | None:
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


def _introspected(columns: Sequence[Column], n: int, introspector: Introspector) -> array | None:
    """As `_tasks`, of contiguous tensors."""
    tasks = empty_tasks(n)
    known: list[tuple[int, Sequence[Any]]] = []
    for operand, column in enumerate(columns):
        if column is None:
            continue
        twin = next((at for at, earlier in known if earlier is column or all(map(is_, earlier, column))), None)
        if twin is not None:
            tasks[operand::_TASK] = tasks[twin::_TASK]
            tasks[_OPERANDS + operand :: _TASK] = tasks[_OPERANDS + twin :: _TASK]
        elif isinstance(column, StableTensors) and column.facts is not None:
            if not _fits(column.facts, tasks, operand):
                return None
        elif not introspector.fill(column, tasks, operand):
            return None
        elif isinstance(column, StableTensors):
            starts = operand, _OPERANDS + operand, 2 * _OPERANDS
            pointers, codes, counts = (tasks[start::_TASK].tolist() for start in starts)
            column.facts = pointers, codes, counts
        known.append((operand, column))
    return tasks


def _fits(facts: _Facts, tasks: array, operand: int) -> bool:
    """Writes an operand of known facts, if its tensors are as large as the operands before them."""
    pointers, codes, counts = facts
    before = tasks[2 * _OPERANDS :: _TASK].tolist()
    if before != counts and any(a not in (b, _GAP) for a, b in zip(before, counts, strict=True)):
        return False
    tasks[operand::_TASK] = array("q", pointers)
    tasks[_OPERANDS + operand :: _TASK] = array("q", codes)
    tasks[2 * _OPERANDS :: _TASK] = array("q", counts)
    return True


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
    if isinstance(column, StableTensors) and straight:
        if column.facts is None:
            column.facts = _facts(list(column), straight)
        return column.facts
    kinds = set(map(type, column))
    if type(None) in kinds:
        return _spread(column, _facts([tensor for tensor in column if tensor is not None], straight))
    tensors: Any = column
    if not kinds <= PLAIN:
        return None
    types = list(map(_TYPE, tensors))
    distinct = set(types)
    if not _CODES.keys() >= distinct:
        return None
    one = len(distinct) == 1  # of one type, as models mostly are: not looked up for each
    try:
        if any(map(Tensor.is_neg, tensors)) or not all(map(_ON_CPU, tensors)):
            return None
        if straight and not all(map(Tensor.is_contiguous, tensors)):
            return None
        counts = list(map(Tensor.numel, tensors))
        ends = map(add, map(Tensor.storage_offset, tensors), counts) if straight else map(_end, tensors)
        there = map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors))
        sizes = repeat(_BYTES[types[0]]) if one else map(_BYTES.__getitem__, types)
        if not all(map(ge, there, map(mul, ends, sizes))):
            return None
        pointers = list(map(Tensor.data_ptr, tensors))
    except RuntimeError:  # no storage at all: sparse, opaque, or inside a transform
        return None
    if 0 in pointers:
        pointers = [pointer or (0 if count else _NOWHERE) for pointer, count in zip(pointers, counts, strict=True)]
        if 0 in pointers:
            return None  # a storage without memory
    return pointers, [_CODES[types[0]]] * len(types) if one else list(map(_CODES.__getitem__, types)), counts


def plain_facts(tensor: Tensor) -> tuple[int, int, int] | None:
    """Address, type and entries of a plain contiguous tensor; None of any other."""
    facts = _facts([tensor], straight=True)
    return None if facts is None else (facts[0][0], facts[1][0], facts[2][0])


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
    local = tensor if type(tensor) in PLAIN else local_part(tensor)
    return tensor if local is tensor else local.detach()


def _disjoint(columns: Sequence[Column], keep: OptionalTensors, work: _Work) -> bool:
    """Whether no tensor to be overwritten lies in the memory of one that the other backend reads, or the other way round."""
    if not work.left:
        return True  # the library looks at its own
    rows = {True: work.taken, False: work.left}
    written = {mine: _storages(keep[i] for i in rows[mine]) for mine in rows}
    read = {mine: _storages(column[i] for column in columns if column is not None for i in rows[mine]) for mine in rows}
    return written[True].isdisjoint(read[False]) and written[False].isdisjoint(read[True])


def _storages(tensors: Iterable[Tensor | None]) -> set[int]:
    """Where their storages begin."""
    strided = (tensor for tensor in tensors if tensor is not None and tensor.layout == torch.strided)
    return {tensor.untyped_storage().data_ptr() for tensor in map(_local_part, strided) if tensor.is_cpu} - {0}
