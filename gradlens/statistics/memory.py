"""Buffers as large as the weights, under an allowance.

`updates` keeps the weights before the step, `flips` the last gradient of each stage. What does not fit works on a seeded
sample of each parameter: every stride-th entry of the flattened tensor from a random start, so that a sample is a view,
costs no index memory, and is the same at each step. The stride shares no factor with any axis, so that the sample walks
through rows and columns alike. The largest parameters are thinned first: their estimates suffer least.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.records import COMPLEX, Parameters

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 2**10, "M": 2**20, "G": 2**30}


def parse_bytes(given: int | str) -> int:
    """Bytes from a number or from text with a unit such as `256MiB`."""
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise ArgumentTypeError(f"memory is a number of bytes or text such as '256MiB', not {given!r}")
    if isinstance(given, int):
        amount: float = given
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", given)
        if match is None or match[2].upper() not in _UNITS:
            raise ArgumentError(f"memory={given!r} is not an amount of memory; write for example '256MiB', '1GB' or 4096")
        amount = float(match[1]) * _UNITS[match[2].upper()]
    if amount < 0:
        raise ArgumentError(f"memory must not be negative, not {given!r}")
    return int(amount)


@dataclass(frozen=True)
class Sample:
    """Which entries of one flattened tensor."""

    start: int
    stride: int
    count: int
    whole: bool

    def view(self, tensor: Tensor) -> Tensor:
        """The sampled entries; a view where the tensor is contiguous."""
        if self.whole:
            return tensor
        return tensor.reshape(-1)[self.start :: self.stride][: self.count]


def _stride(numel: int, wanted: int, shape: Sequence[int]) -> int:
    stride = max(-(-numel // max(wanted, 1)), 1)
    while stride > 1 and any(math.gcd(stride, axis) > 1 for axis in shape if axis > 1) and stride < numel:
        stride += 1
    return stride


class Plan:
    """How much of each parameter the buffers hold.

    `allowance` bytes are shared by `buffers` copies of the parameters, and by `more` bytes a number for `what` needs them. A
    common cap on entries per parameter is chosen by bisection, as large as the allowance permits, and chosen again when the
    model gets other parameters.
    """

    samples: list[Sample]

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        itemsizes: Sequence[int],
        allowance: int,
        buffers: int,
        seed: int = 0,
        *,
        more: int = 0,
        pairs: Sequence[bool] | bool = False,
        what: str = "updates and flips",
    ):
        self._allowance, self._buffers, self._seed, self._more = allowance, buffers, seed, more
        self.what = what
        self._choose(shapes, itemsizes, pairs)

    @classmethod
    def of(cls, parameters: Parameters, allowance: int, buffers: int, *, more: int, what: str) -> Plan:
        """For what this rank holds of a model's parameters."""
        shapes, itemsizes, pairs = _sizes(parameters)
        return cls(shapes, itemsizes, allowance, buffers, more=more, pairs=pairs, what=what)

    def samples_of(self, parameters: Parameters) -> list[Sample]:
        """The samples of these parameters, by row: those planned, or new ones if other parameters were planned for."""
        sizes = _sizes(parameters)
        if sizes[:2] != self._planned:
            self._choose(*sizes)
        return self.samples

    def _choose(self, shapes: Sequence[Sequence[int]], itemsizes: Sequence[int], pairs: Sequence[bool] | bool) -> None:
        """`pairs`: whether an entry is complex, two numbers."""
        self._planned = (shapes, itemsizes)
        numels = np.asarray([math.prod(shape) for shape in shapes], np.int64)
        cost = np.asarray(itemsizes, np.int64) * self._buffers + self._more * (1 + np.asarray(pairs, np.int64))
        self.needed = int((numels * cost).sum())
        cap = int(numels.max(initial=0)) if self.needed <= self._allowance else _cap(numels, cost, self._allowance)
        rng = np.random.default_rng(self._seed)
        self.samples = []
        for shape, numel in zip(shapes, numels.tolist(), strict=True):
            stride = _stride(numel, cap, shape) if numel > cap else 1
            start = int(rng.integers(stride)) if stride > 1 else 0
            count = min(-(-(numel - start) // stride), cap)
            self.samples.append(Sample(start, stride, count, whole=count == numel))
        self.taken = int((np.asarray([s.count for s in self.samples], np.int64) * cost).sum())
        self.share = float(sum(s.count for s in self.samples) / max(int(numels.sum()), 1))

    def describe(self) -> str:
        """One line for the start of a run."""
        if not self.needed:
            return "no buffers: memory is O(parameters)"
        if not self.taken:
            return f"memory= has no room for {self.what}: their columns are empty ({self.needed / 2**20:.1f} MiB hold all)"
        if self.share >= 1:
            return f"buffers for {self.what}: {self.taken / 2**20:.1f} MiB, every weight"
        return (
            f"buffers for {self.what}: {self.taken / 2**20:.1f} of {self.needed / 2**20:.1f} MiB allowed, "
            f"so they rest on a seeded sample of {self.share:.1%} of the weights (memory= raises it)"
        )


def _sizes(parameters: Parameters) -> tuple[list[tuple[int, ...]], list[int], list[bool]]:
    """Shapes and bytes an entry of what this rank holds, and whether it is complex; by row."""
    shapes = [parameters.local_shape(row) for row in range(len(parameters))]
    sizes = [getattr(torch, dtype).itemsize for dtype in parameters.dtypes]
    return shapes, sizes, [dtype in COMPLEX for dtype in parameters.dtypes]


def _cap(numels: np.ndarray, cost: np.ndarray, allowance: int) -> int:
    """The largest number of entries per parameter that fits."""
    low, high = 0, int(numels.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        if int((np.minimum(numels, middle) * cost).sum()) <= allowance:
            low = middle
        else:
            high = middle - 1
    return low
