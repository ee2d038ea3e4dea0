"""The native kernel, called through `ctypes`: addresses and lengths go in, rows of float64 come out.

The library knows nothing of Python and torch, so that one build serves every version of both. It takes plain tensors only:
of the exact class `Tensor` or `Parameter`, strided, on the CPU, float32, float64, bfloat16 or float16, without lazy bits, in
memory that is really there. Everything else goes to the reference, row by row. All tensors of a call are one call.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

_PLAIN = {Tensor, torch.nn.Parameter}
_TYPES = {torch.float32: (0, 4), torch.float64: (1, 8), torch.bfloat16: (2, 2), torch.float16: (3, 2)}  # code, bytes
_AXES = 8  # tensors of more are left to the reference
_NOWHERE = 1  # stands for the address of an empty tensor, which is never read: 0 says that there is no tensor

Holes = Sequence[Tensor | None]
Column = Sequence[Any] | None


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
        call.restype = None
    return Native(library, library.gradlens_variant())


def _columns() -> str:
    summary, updates = (" ".join(field.name for field in group) for group in (fields.SUMMARY, fields.UPDATES))
    return f"{summary} histogram {fields.EXPONENT_MIN} {fields.EXPONENT_MAX} top {fields.TOP} | {updates}"


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
        return self._rows(self.library.gradlens_summarize, reference.summarize, columns, fields.WIDTH)

    def compare(self, used: Holes, before: Sequence[Tensor], after: Sequence[Tensor], loss: Holes | None = None) -> Tensor:
        """As `reference.compare`."""
        columns = [used, before, after, loss]
        return self._rows(self.library.gradlens_compare, reference.compare, columns, len(fields.UPDATES))

    def sample(self, tensors: Sequence[Tensor]) -> Tensor:
        """As `reference.sample`."""
        return self._rows(self.library.gradlens_sample, reference.sample, [tensors], reference.SAMPLES)

    def _rows(self, call: Callable, honest: Callable, columns: Sequence[Column], width: int) -> Tensor:
        work = _Work(columns, keeps=width == fields.WIDTH)
        if not work.taken or torch._C._len_torch_dispatch_stack():
            return honest(*columns)
        with torch.inference_mode(False):
            rows = torch.empty(len(work.taken), width, dtype=torch.float64, device="cpu")
        threads = torch.get_num_threads() if work.entries >= THREADED else 1
        tasks, layouts = work.tasks.buffer_info()[0], work.layouts.buffer_info()[0]
        call(tasks, len(work.taken), layouts, rows.data_ptr(), threads, self.variant)
        if not work.left:
            return rows
        others = honest(*(None if column is None else [column[i] for i in work.left] for column in columns))
        with torch.no_grad(), torch.inference_mode(False):
            order = torch.tensor(work.taken + work.left, dtype=torch.int64, device="cpu").argsort()
            return torch.cat([rows, others]).index_select(0, order)


class _Work:
    """A list of tensors in the library's form: `task` and `layouts` of native.c."""

    def __init__(self, columns: Sequence[Column], keeps: bool = False) -> None:
        self.tasks, self.layouts = array("q"), array("q", [0])
        self.taken: list[int] = []
        self.left: list[int] = []
        self.entries = 0
        self._local: list[Tensor] = []  # parts of distributed tensors, alive while their addresses are in use
        n = next(len(column) for column in columns if column is not None)
        lists = [reference.holes("a list", column, n) for column in columns]
        self._keeps = len(lists) == 4 and keeps
        lists += [[None] * n] * (4 - len(lists))
        for i, group in enumerate(zip(*lists, strict=True)):
            (self.taken if self._take(group) else self.left).append(i)

    def _take(self, group: Sequence[Tensor | None]) -> bool:
        """Add a task, unless one of its tensors is not plain."""
        try:
            operands = [None if tensor is None else self._operand(tensor) for tensor in group]
        except (RuntimeError, _NotPlainError):  # no storage at all: sparse, opaque, or inside a transform
            return False
        tensors = [tensor for tensor in operands if tensor is not None]
        first, keep = tensors[0], operands[3] if self._keeps else None
        straight = all(tensor.is_contiguous() for tensor in tensors)
        if any(t.numel() != first.numel() or (not straight and t.shape != first.shape) for t in tensors):
            return False
        if first.ndim > _AXES or (keep is not None and not _may_keep(keep, operands)):
            return False
        types = layout = 0
        for i, tensor in enumerate(operands):
            self.tasks.append(0 if tensor is None else tensor.data_ptr() or _NOWHERE)
            types |= 0 if tensor is None else _TYPES[tensor.dtype][0] << 4 * i
        layout = -1 if straight else len(self.layouts)
        if not straight:
            self.layouts.extend([first.ndim, *first.shape])
            for tensor in operands:
                self.layouts.extend([0] * first.ndim if tensor is None else tensor.stride())
        self.tasks.extend([types, first.numel(), layout])
        self.entries += first.numel()
        return True

    def _operand(self, tensor: Tensor) -> Tensor:
        if type(tensor) not in _PLAIN:
            local = getattr(tensor, "to_local", None)
            if local is None:
                raise _NotPlainError
            tensor = local().detach()
            self._local.append(tensor)
        fits = (
            type(tensor) in _PLAIN
            and tensor.layout == torch.strided
            and tensor.is_cpu
            and tensor.dtype in _TYPES
            and not (tensor.is_conj() or tensor.is_neg() or tensor._is_zerotensor())
            and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        )
        if not fits or tensor.untyped_storage().nbytes() < _end(tensor):
            raise _NotPlainError
        return tensor


class _NotPlainError(Exception):
    pass


def _end(tensor: Tensor) -> int:
    """The bytes that its storage needs."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


def _may_keep(keep: Tensor, operands: Sequence[Tensor | None]) -> bool:
    """Whether the gradient can be written there in blocks: bits as they are, over no tensor but the very previous one."""
    gradient, weight, previous, _ = operands
    if gradient is None or keep.dtype != gradient.dtype or not keep.is_contiguous():
        return False
    home = keep.untyped_storage().data_ptr()
    if any(t is not None and t.untyped_storage().data_ptr() == home for t in (gradient, weight)):
        return False
    if previous is None or previous.untyped_storage().data_ptr() != home:
        return True
    same = previous.data_ptr() == keep.data_ptr() and previous.dtype == keep.dtype
    return same and previous.is_contiguous()
