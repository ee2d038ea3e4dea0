"""What evidence adds up for each weight, in one pass of the native kernel: a mean, squared deviations and signs.

Both functions say whether they did it. They do not where there is no native kernel, on another device, and for gradients
that are not plain: `statistics.evidence` has the same in torch operations, which is the definition.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from gradlens.kernels import native


class _Moments(ctypes.Structure):
    _fields_ = (
        ("gradient", ctypes.c_void_p),
        ("type", ctypes.c_int),
        *((name, ctypes.c_double) for name in ("divisor", "share", "weight")),
        *((name, ctypes.c_void_p) for name in ("mean", "squares", "positive", "negative")),
    )


class _Decayed(ctypes.Structure):
    _fields_ = (
        ("gradient", ctypes.c_void_p),
        ("share", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("mean", "square", "sign", "seen", "flips", "moving", "steps", "last")),
    )


def add_moments(
    kernel: native.Native | None,
    gradient: Tensor,
    kept: Sequence[Tensor],
    divisor: float | Tensor,
    share: float,
    weight: float,
) -> bool:
    """Add a gradient to `mean, squares, positive, negative`, contiguous and as long as it is.

    step = gradient / divisor - mean;  mean += share * step;  squares += weight * step * (gradient / divisor - mean)
    """
    facts = _plain(kernel, gradient)
    if kernel is None or facts is None or (isinstance(divisor, Tensor) and not divisor.is_cpu):
        return False
    pointer, code, n = facts
    numbers = _Moments(pointer, code, float(divisor), share, weight, *map(Tensor.data_ptr, kept))
    kernel.library.gradlens_add_moments(ctypes.byref(numbers), n, native.threads_for(n), kernel.variant)
    return True


def fold_decayed(kernel: native.Native | None, gradient: Tensor, kept: Sequence[Tensor], share: float) -> bool:
    """Let `mean, square, sign, seen, flips, moving` decay towards a float64 gradient's; count `steps`, store `last`."""
    facts = _plain(kernel, gradient)
    if kernel is None or facts is None or gradient.dtype != torch.float64 or not 0 < share < 0.5:
        return False
    pointer, _, n = facts
    numbers = _Decayed(pointer, share, *map(Tensor.data_ptr, kept))
    kernel.library.gradlens_fold_decayed(ctypes.byref(numbers), n, native.threads_for(n), kernel.variant)
    return True


def _plain(kernel: native.Native | None, gradient: Tensor) -> tuple[int, int, int] | None:
    """Address, type and entries of a plain gradient."""
    if kernel is None or native.modes_are_active():
        return None
    with torch._C.DisableTorchFunction():
        return native.plain_facts(gradient)
