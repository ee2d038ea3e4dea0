"""Derivatives of derivatives: the Hessian, `H_ij = d^2 L / dw_i dw_j`, by differentiating the gradient again.

Nothing here forms H. A product with one vector costs about two backward passes (Pearlmutter 1994): `H v = d/dw (g.v)`.
Attention runs in torch's plain-math kernel meanwhile, since the fused ones cannot be differentiated twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradlens.errors import ProbeError
from gradlens.probes.isolated_loss import IsolatedLoss
from gradlens.probes.loss import nodes

T = TypeVar("T")
_MISSING = re.compile(r"derivative for '?([\w:.]+)'? is not implemented")


def differentiated(isolated: IsolatedLoss, then: Callable[[Tensor, list[Tensor]], T], *batch: Any) -> T:
    """`then(loss, gradient)`, where the gradient can itself be differentiated; zeros where the loss does not depend."""

    def gradient(loss: Tensor) -> T:
        # Autograd takes a backward that is `once_differentiable` for a linear one, in silence. With a seed that requires a
        # gradient it puts a node that would raise into the graph, though off the way to the weights: so look for it.
        partials = isolated.grad(loss, torch.ones_like(loss).requires_grad_(), create_graph=True)
        if "torch::autograd::Error" in nodes(*(g for g in partials if g is not None)):
            raise _no_second_derivative("a custom autograd.Function marked once_differentiable")
        return then(loss, [torch.zeros_like(w) if g is None else g for g, w in zip(partials, isolated.weights, strict=True)])

    with sdpa_kernel(SDPBackend.MATH), _twice():
        return isolated.evaluate(gradient, *batch)


def product(isolated: IsolatedLoss, gradient: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
    """H v, one tensor a weight tensor; within `differentiated`."""
    return again(isolated, dot(gradient, vector))


def again(isolated: IsolatedLoss, output: Tensor) -> list[Tensor]:
    """Partials of something made from the gradient; 0 where it does not depend on a weight."""
    partials = isolated.grad(output, retain_graph=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(partials, isolated.weights, strict=True)]


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The sum of all entrywise products."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def norm(a: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm over all entries."""
    return dot(a, a).sqrt()


@contextmanager
def _twice() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        found = _MISSING.search(str(error))
        if found is None:
            raise
        raise _no_second_derivative(found[1]) from error


def _no_second_derivative(operator: str) -> ProbeError:
    return ProbeError(
        f"{operator} has no second derivative in torch, so there is no curvature to be had through it: compute the loss "
        f"without it for this probe (F.scaled_dot_product_attention and nn.MultiheadAttention are switched to their plain "
        f"form by themselves), or use check_partials, which needs none"
    )
