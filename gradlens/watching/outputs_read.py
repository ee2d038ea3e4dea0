"""Reads one output of a module for its sums: apart from the user's computing, and not while a CUDA graph is captured."""

from __future__ import annotations

from torch import Tensor

from gradlens import kernels
from gradlens.watching.isolation import capturing_cuda_graph, isolated_compute


def read_output(made: Tensor, axis: int, low: float, high: float) -> list[float] | Tensor | None:
    """The sums, in the order of `activations.SUMS`; None of what has no such numbers, or cannot be read now."""
    if capturing_cuda_graph():
        return None
    with isolated_compute():
        return kernels.output_sums(made, axis, low, high)
