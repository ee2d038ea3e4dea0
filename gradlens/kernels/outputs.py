"""What a module made of a batch, as a row of sums: one pass of the native kernel, or the same in torch operations.

    made [rows, ...]  ->  entries, nonfinite, norm, deviation, units, dead, saturated

The first axis is the batch; a *unit* is an entry of one example, at the same place in each. `norm` is the root of the sum of
squares of the finite entries. `deviation` is the root of the sum of squared distances from each unit's mean over the batch:
NaN where it has no meaning, as of one example, or where something is not finite. A unit is *dead* where it is 0 for every
example. *Saturated* are the entries at or beyond `low` or `high`, NaN where the range has no ends. Sums of several calls add
up to those of all their entries (`activations.added`).

The native kernel reads plain tensors on the CPU, whose examples lie one behind the other in memory, in any order within
each. `sums_by_torch` is the definition, and reads the others: float64 too large or too small for its squares among them.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from gradlens._torch import local_part, modes_are_active
from gradlens.kernels import native
from gradlens.kernels.tensors import PLAIN

#: Sizes of float64 entries, beyond which they are scaled before they are squared.
SMALLEST, LARGEST = 1e-130, 1e130

_READ = ("nonfinite", "square_sum", "deviation", "dead", "saturated")  # as the library has them


class _Output(ctypes.Structure):
    _fields_ = (
        ("made", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("type", "rows", "columns")),
        ("low", ctypes.c_double),
        ("high", ctypes.c_double),
        ("sums", ctypes.c_void_p),
    )


def readable(made: Tensor) -> bool:
    """Whether these sums are defined for it."""
    return (
        not made.is_nested
        and made.is_floating_point()
        and made.dim() > 0
        and made.numel() > 0
        and made.layout == torch.strided
        and not made.is_meta
    )


def sums_of(
    kernel: native.Native | None, made: Tensor, axis: int = 0, low: float = -math.inf, high: float = math.inf
) -> list[float] | None:
    """The sums, in the order of `activations.SUMS`, by the native kernel; None of a tensor that it does not read.

    Args:
        made: What `readable` says yes to.
        axis: Which one is the batch.
        low, high: The ends of the module's range, where it has one.
    """
    return None if kernel is None else _by_library(kernel, local_part(made), axis, low, high)


def sums_by_torch(made: Tensor, axis: int = 0, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """The definition. Waits for no device."""
    x = local_part(made).detach().movedim(axis, 0)
    x = x.reshape(len(x), -1).double()
    finite = torch.isfinite(x)
    kept = torch.where(finite, x, 0.0)
    unit = _unit(kept) if made.dtype == torch.float64 else torch.ones_like(kept[0, 0])
    kept = kept / unit
    nonfinite = (~finite).sum().double()
    deviation = (kept - kept.mean(0)).square().sum().sqrt() * unit
    deviation = torch.where(nonfinite > 0, math.nan, deviation) if len(x) > 1 else torch.full_like(deviation, math.nan)
    saturated = (finite & ((x <= low) | (x >= high))).sum().double()
    if not _has_ends(low, high):
        saturated = torch.full_like(saturated, math.nan)
    entries, units = (torch.full_like(nonfinite, float(n)) for n in (x.numel(), x.shape[1]))
    dead = (x == 0).all(0).sum().double()
    return torch.stack([entries, nonfinite, kept.square().sum().sqrt() * unit, deviation, units, dead, saturated])


def _unit(kept: Tensor) -> Tensor:
    """What entries are divided by before they are squared: their largest, where squares would leave the range of float64."""
    largest = kept.abs().amax()
    return torch.where((largest > LARGEST) | ((largest < SMALLEST) & (largest > 0)), largest, 1.0)


def _by_library(kernel: native.Native, made: Tensor, axis: int, low: float, high: float) -> list[float] | None:
    """None of a tensor that the library does not read."""
    if modes_are_active():
        return None
    rows, entries = made.shape[axis], made.numel()
    columns = entries // rows
    pointer = _address(made, entries) if _by_example(made, axis, columns) else 0
    if not pointer:
        return None
    read = (ctypes.c_double * len(_READ))()
    threads = native.threads_for(entries)
    output = _Output(pointer, native._CODES[made.dtype], rows, columns, low, high, ctypes.addressof(read))
    kernel.library_for(entries).gradlens_output(ctypes.byref(output), threads, kernel.variant)
    nonfinite, square_sum, deviation, dead, saturated = read
    if made.dtype == torch.float64 and not SMALLEST**2 < square_sum < LARGEST**2 and (square_sum or dead < columns):
        return None
    deviation = math.sqrt(deviation) if rows > 1 and not nonfinite else math.nan
    saturated = saturated if _has_ends(low, high) else math.nan
    return [entries, nonfinite, math.sqrt(square_sum), deviation, columns, dead, saturated]


def _has_ends(low: float, high: float) -> bool:
    return math.isfinite(low) or math.isfinite(high)


def _address(made: Tensor, entries: int) -> int:
    """Where so many entries in a row begin; 0 where they are not simply there."""
    try:
        end = (made.storage_offset() + entries) * made.element_size()
        if made.is_neg() or made.untyped_storage().nbytes() < end:
            return 0
        pointer = made.data_ptr()
    except RuntimeError:  # no storage at all, or inside a transform
        return 0
    return 0 if pointer % made.element_size() else pointer


def _by_example(made: Tensor, axis: int, columns: int) -> bool:
    """Whether one example lies behind the other in memory, each without gaps, in whatever order of its axes."""
    if type(made) not in PLAIN or made.dtype not in native._CODES or not made.is_cpu:
        return False
    if axis == 0 and made.is_contiguous():
        return True
    sizes, strides = list(made.shape), list(made.stride())
    rows, step = sizes.pop(axis), strides.pop(axis)
    if rows > 1 and step != columns:
        return False
    expected = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
