"""Reads one output of a module for its sums: apart from the user's computing, and not while a CUDA graph is captured."""

from __future__ import annotations

from torch import Tensor

from gradlens import kernels
from gradlens.kernels.outputs import readable, sums_by_torch
from gradlens.watching.isolation import capturing_cuda_graph, isolated_compute


def read_output(made: Tensor, axis: int, low: float, high: float) -> list[float] | Tensor | None:
    """The sums, in the order of `activations.SUMS`; None of what has no such numbers, or cannot be read now."""
    if not readable(made):
        return None
    sums = kernels.output_sums(made, axis, low, high)
    if sums is not None or capturing_cuda_graph():
        return sums
    with isolated_compute():
        return sums_by_torch(made, axis, low, high)
