"""Lists of tensors in, rows of numbers out: the one place where gradients are read.

`reference` is the definition in plain torch; the other backends equal it and are faster. The backend is picked here, by
device: `native` on the CPU where it was built, `triton` on CUDA where it is installed and works, `batched`, in plain torch,
elsewhere. What a backend cannot read goes to the reference, tensor by tensor. All tensors of a call live on one device; the
rows are float64 there, and nothing waits for the device. Gradients may be of any floating or complex type, strided or
sparse.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gradlens.errors import ArgumentError, GradlensWarning
from gradlens.kernels import accumulate, batched, native, outputs
from gradlens.kernels.native import StableTensors
from gradlens.kernels.prepared import GeneralPrepared, NativePrepared, Prepared, RowCall, RowRooms

__all__ = [
    "summarize",
    "compare",
    "sample",
    "prepare",
    "prepare_row",
    "add_moments",
    "fold_decayed",
    "changes_together",
    "add_all_moments",
    "fold_all_decayed",
    "output_sums",
    "Prepared",
    "RowCall",
    "RowRooms",
    "StableTensors",
]

OptionalTensors = Sequence[Tensor | None]  #: one entry a tensor, None where there is none


class Backend(Protocol):
    """One way to read tensors: what this package offers."""

    def summarize(
        self,
        gradients: Sequence[Tensor],
        weights: OptionalTensors | None,
        previous: OptionalTensors | None,
        keep: OptionalTensors | None,
        detail: bool = True,
        /,
    ) -> Tensor: ...

    def compare(
        self, used: OptionalTensors, before: Sequence[Tensor], after: Sequence[Tensor], loss: OptionalTensors | None, /
    ) -> Tensor: ...

    def sample(self, tensors: Sequence[Tensor], /) -> Tensor: ...


def _backend(tensors: Sequence[Tensor]) -> Backend:
    """What reads tensors of their device."""
    with torch._C.DisableTorchFunctionSubclass():
        kind = tensors[0].device.type if tensors else "cpu"
    if kind == "cuda":
        return _triton()
    return (_native() if kind == "cpu" else None) or batched


def _note(text: str) -> None:
    with contextlib.suppress(Exception):  # warnings may be turned into errors; not in a training step
        warnings.warn(GradlensWarning(f"{text}; torch operations stand in for it, many times slower"), stacklevel=3)


@functools.cache
def _triton() -> Backend:
    """The GPU kernels, or what stands in for them."""
    try:
        from gradlens.kernels import triton  # imports a compiler: only where there is a GPU
    except ImportError as error:
        _note(f"there is no GPU kernel without Triton ({error}): pip install 'torch-gradlens[triton]'")
        return batched
    return Standby(triton.Triton(), batched)


class Standby:
    """A backend that another replaces at its first failure: Triton needs a C compiler, and a GPU that it supports."""

    def __init__(self, first: Backend, second: Backend) -> None:
        self._first: Backend | None = first
        self._second = second

    def _call(self, name: str, *columns: Sequence[Tensor | None] | bool | None) -> Tensor:
        if self._first is not None:
            try:
                return getattr(self._first, name)(*columns)
            except ArgumentError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, there is another way
                self._give_up(error)
        return getattr(self._second, name)(*columns)

    def _give_up(self, error: Exception) -> None:
        self._first = None
        _note(f"the GPU kernel does not run here ({type(error).__name__}: {str(error)[:200]})")

    def summarize(
        self,
        gradients: Sequence[Tensor],
        weights: OptionalTensors | None,
        previous: OptionalTensors | None,
        keep: OptionalTensors | None,
        detail: bool = True,
        /,
    ) -> Tensor:
        """As `kernels.summarize`."""
        return self._call("summarize", gradients, weights, previous, keep, detail)

    def compare(
        self, used: OptionalTensors, before: Sequence[Tensor], after: Sequence[Tensor], loss: OptionalTensors | None, /
    ) -> Tensor:
        """As `kernels.compare`."""
        return self._call("compare", used, before, after, loss)

    def sample(self, tensors: Sequence[Tensor], /) -> Tensor:
        """As `kernels.sample`."""
        return self._call("sample", tensors)

    def change(self, name: str, left: set[int], *columns: Any) -> None:
        """Let the first backend change tensors in place; `left` are those that it has not, also where it fails."""
        if self._first is not None and hasattr(self._first, name):
            try:
                getattr(self._first, name)(*columns, left)
            except Exception as error:  # noqa: BLE001 - as above
                self._give_up(error)


@functools.cache
def _native() -> Backend | None:
    """The native kernel; or none, and a note, once, on how to get it."""
    try:
        return native.load()
    except native.UnavailableError as error:
        _note(str(error))
        return None


def summarize(
    gradients: Sequence[Tensor],
    weights: OptionalTensors | None = None,
    previous: OptionalTensors | None = None,
    keep: OptionalTensors | None = None,
    detail: bool = True,
) -> Tensor:
    """Every number of `fields` about each gradient: `[n, fields.WIDTH]`, without detail `[n, fields.LIGHT_WIDTH]`.

    Columns: `fields.SUMMARY`, then `QUANTILE`, `TOP_PARTIAL`, `TOP_INDEX`, `TOP_VALUE`, and with detail `HISTOGRAM`. Indices
    count real entries of the flattened tensor. Top entries are finite, by falling |g| and then rising index, padded with
    index -1 and NaN. Extremes over nothing are NaN. Without detail, quantiles of large tensors rest on a sample (`fields`).

    Args:
        weights: The parameters. Without one its `WEIGHTS` columns and `TOP_VALUE` are NaN.
        previous: Gradients to compare with, of as many entries. Without one the counts of `FLIPS` are 0, its sums NaN.
        keep: Tensors that are overwritten with the gradients afterwards; each may be the one given as previous.

    Raises:
        ArgumentError: Sequences or tensors whose sizes do not match.
    """
    return _backend(gradients).summarize(gradients, weights, previous, keep, detail)


def compare(
    used: OptionalTensors, before: Sequence[Tensor], after: Sequence[Tensor], loss: OptionalTensors | None = None
) -> Tensor:
    """What an update did, `dw = after - before`: `[n, len(fields.UPDATES)]`.

    Args:
        used: The gradients that the optimizer consumed. Without one, counts of its columns are 0 and sums NaN.
        before, after: The weights, of as many entries each.
        loss: The gradients of the loss. Without one `update_loss_dot` and `update_loss_exact` are NaN; with one exact is 1.

    Raises:
        ArgumentError: Sequences or tensors whose sizes do not match.
    """
    return _backend(before).compare(used, before, after, loss)


def sample(tensors: Sequence[Tensor]) -> Tensor:
    """The values at 16 fixed, evenly spread places of each tensor, first and last included, padded with 0: `[n, 16]`.

    Two tensors of one size whose samples are bit-equal are taken to be unchanged.
    """
    return _backend(tensors).sample(tensors)


def prepare(
    weights: Sequence[Tensor],
    previous: StableTensors | None = None,
    before: StableTensors | None = None,
    loss: StableTensors | None = None,
) -> Prepared:
    """The calls for parameters that are read step after step. See `prepared`.

    Args:
        weights: The parameters themselves.
        previous: Gradlens' own copies of their last gradients: compared with, and overwritten.
        before: Gradlens' own room for the weights before the step: `read` copies the weights there.
        loss: Gradlens' own copies of the loss's gradients, where `compare` is to rest on these too.
    """
    with torch._C.DisableTorchFunctionSubclass():
        on_cpu = all(weight.device.type == "cpu" for weight in weights)
    kernel = _native() if on_cpu else None
    if isinstance(kernel, native.Native):
        fast = NativePrepared.of(kernel, weights, previous, before, loss)
        if fast is not None:
            return fast
    return GeneralPrepared(_backend(weights), weights, previous, before, loss)


def prepare_row(weight: Tensor, previous: Tensor | None, rooms: RowRooms) -> RowCall | None:
    """The call for a parameter whose gradients are read one by one; None where only `summarize` reads them.

    Args:
        weight: The parameter, or one like it.
        previous: Gradlens' own copy of its last gradient: compared with, and overwritten.
        rooms: Memory for the rows.
    """
    kernel = _native() if weight.is_cpu else None
    return RowCall.of(kernel, previous, rooms) if isinstance(kernel, native.Native) else None


def add_moments(gradient: Tensor, kept: Sequence[Tensor], divisor: float | Tensor, share: float, weight: float) -> bool:
    """As `accumulate.add_moments`; False, and nothing done, where the native kernel cannot."""
    return accumulate.add_moments(_kernel_for(kept[0]), gradient, kept, divisor, share, weight)


def fold_decayed(gradient: Tensor, kept: Sequence[Tensor], share: float) -> bool:
    """As `accumulate.fold_decayed`; False, and nothing done, where the native kernel cannot."""
    return accumulate.fold_decayed(_kernel_for(kept[0]), gradient, kept, share)


def changes_together(tensor: Tensor) -> bool:
    """Whether the two functions below serve tensors of this device: one launch for all beats one each."""
    return tensor.is_cuda and isinstance(_triton(), Standby)


def add_all_moments(
    gradients: Sequence[Tensor], kept: Sequence[Sequence[Tensor]], divisor: float | Tensor, share: float, weight: float
) -> set[int]:
    """`accumulate.add_moments` for many gradients on a GPU, in one launch a type. Gives the places of those left out."""
    return _changed("add_moments", gradients, kept, divisor, share, weight)


def fold_all_decayed(gradients: Sequence[Tensor], kept: Sequence[Sequence[Tensor]], share: float) -> set[int]:
    """`accumulate.fold_decayed` for many gradients on a GPU, in one launch. Gives the places of those left out."""
    return _changed("fold_decayed", gradients, kept, share)


def _changed(name: str, gradients: Sequence[Tensor], *columns: Any) -> set[int]:
    left, backend = set(range(len(gradients))), _triton()
    if left and isinstance(backend, Standby):
        backend.change(name, left, gradients, *columns)
    return left


def output_sums(made: Tensor, axis: int = 0, low: float = -math.inf, high: float = math.inf) -> list[float] | None:
    """As `outputs.sums_of`, without any operation of torch. None without a kernel that reads this tensor."""
    return outputs.sums_of(_kernel_for(made), made, axis, low, high)


def _kernel_for(tensor: Tensor) -> native.Native | None:
    kernel = _native() if tensor.is_cpu else None
    return kernel if isinstance(kernel, native.Native) else None
