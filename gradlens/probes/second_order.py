"""Derivatives of derivatives: products with the Hessian, `H_ij = d^2 L / dw_i dw_j`, which is never formed.

Two ways to `H v`, which must agree:

    d/dw (g.v)                             differentiate the gradient again (Pearlmutter 1994): exact to rounding
    (g(w + h v) - g(w - h v)) / 2h         differences of the gradient, in float64: asks the gradient itself

The first differentiates the backward's own formula, and is blind to what that formula leaves out: an operation whose
backward saved a detached value, a compiled piece. So one product is always computed both ways (`self_test`); where they
disagree, or where an operation has no second derivative, all products are differences, and the result says so.
Attention runs in torch's plain-math kernel meanwhile, since the fused ones cannot be differentiated twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gradlens.errors import ProbeError
from gradlens.probes.isolated_loss import IsolatedLoss
from gradlens.probes.loss import Target, nodes
from gradlens.probes.memory import Need, compact_numel, in_float64, state_memory
from gradlens.probes.rows import Rows
from gradlens.probes.untouched import plain_attention
from gradlens.selection import Select

T = TypeVar("T")
Vectors = list[Tensor]
_MISSING = re.compile(r"derivative for '?([\w:.]+)'? is not implemented")
#: Moves in units of each parameter's own scale, the longer and the shorter: the error of one is told from the other.
STEPS = (1e-4, 1e-5)
COARSE_STEPS = (1e-1, 3e-2)  #: where an operation is computed in float32
FLOOR = 0.1  #: the least scale of a parameter: those that begin at 0 have one too
AGREE = 1e-4  #: how far the two ways may be apart, as a share of the product, beside the error of the differences


# --- differentiating twice ----------------------------------------------------------------------------------------------


def differentiated(isolated: IsolatedLoss, then: Callable[[Tensor, Vectors], T], *batch: Any) -> T:
    """`then(loss, gradient)`, where the gradient can itself be differentiated; zeros where the loss does not depend."""

    def gradient(loss: Tensor) -> T:
        check_finite(loss)
        # Autograd takes a backward that is `once_differentiable` for a linear one, in silence. With a seed that requires a
        # gradient it puts a node that would raise into the graph, though off the way to the weights: so look for it.
        partials = isolated.grad(loss, torch.ones_like(loss).requires_grad_(), create_graph=True)
        if all(g is None for g in partials):
            raise depends_on_none()
        if "torch::autograd::Error" in nodes(*(g for g in partials if g is not None)):
            raise NoSecondDerivativeError("a custom autograd.Function marked once_differentiable")
        return then(loss, [torch.zeros_like(w) if g is None else g for g, w in zip(partials, isolated.weights, strict=True)])

    plain_attention()
    with _twice():
        return isolated.evaluate(gradient, *batch)


def product(isolated: IsolatedLoss, gradient: Sequence[Tensor], vector: Sequence[Tensor]) -> Vectors:
    """H v, one tensor a weight tensor; within `differentiated`."""
    return again(isolated, gradient, vector)


def again(isolated: IsolatedLoss, of: Tensor | Sequence[Tensor], seeds: Sequence[Tensor] | None = None) -> Vectors:
    """Partials of something made from the gradient, or of a gradient times a vector; 0 where it depends on no weight."""
    partials = isolated.grad(of, seeds, retain_graph=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(partials, isolated.weights, strict=True)]


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The sum of all entrywise products."""
    parts = [torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def norm(a: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm over all entries."""
    return dot(a, a).sqrt()


def check_finite(loss: Tensor) -> None:
    """Raise where there is nothing to differentiate."""
    if not bool(torch.isfinite(loss)):
        raise ProbeError(
            f"the loss is {loss.item()}: it has no derivatives at this point; take a batch whose loss is finite, and "
            f"find the operation that makes it so with trace_nonfinite"
        )


def depends_on_none() -> ProbeError:
    """The error for a loss that is cut off from all weights."""
    return ProbeError(
        "the loss depends on none of these parameters: detach(), .item(), .data or no_grad() cuts the way, or it was "
        "computed without them"
    )


class NoSecondDerivativeError(ProbeError):
    """Torch cannot differentiate an operation twice."""

    def __init__(self, operator: str) -> None:
        super().__init__(
            f"{operator} has no second derivative in torch: compute the loss without it for this probe "
            f"(F.scaled_dot_product_attention and nn.MultiheadAttention are switched to their plain form by themselves), or "
            f"use hessian_product or curvature, which take differences of the gradient there, or check_partials, which "
            f"needs no second derivative"
        )
        self.operator = operator


@contextmanager
def _twice() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        found = _MISSING.search(str(error))
        if found is not None:
            raise NoSecondDerivativeError(found[1]) from error
        if "double backward" in str(error):
            raise NoSecondDerivativeError("a compiled piece") from error
        raise


# --- differences of the gradient ------------------------------------------------------------------------------------------


class Differences:
    """Gradients and losses on both sides of the weights, along directions; in float64.

    Directions are in units of each parameter's scale, `max(rms, 0.1) / sqrt(entries)`, so that a bias counts as much as a
    large matrix and no move is long. The same random numbers are drawn at each point. Of a table that the batch looks up in
    a few rows, those rows alone are moved, and all vectors are compact (`rows`).
    """

    def __init__(self, isolated: IsolatedLoss) -> None:
        self.isolated = isolated
        plain_attention()
        loss, gradient = isolated.gradient(sparse=True)
        check_finite(loss)
        if all(g is None for g in gradient):
            raise depends_on_none()
        isolated.draws.settle()
        self.loss = loss.item()
        self.rows = [Rows.of(g, w) for g, w in zip(gradient, isolated.weights, strict=True)]
        self.gradient = self._compact(gradient)
        self.start = [r.compact(w.detach()) for r, w in zip(self.rows, isolated.weights, strict=True)]
        self.start = [x.clone() if r.index is None else x for r, x in zip(self.rows, self.start, strict=True)]
        self.scales = [_scale(w) for w in self.start]
        self.steps = COARSE_STEPS if isolated.coarse else STEPS
        self._refuse_chance()

    def _compact(self, gradient: Sequence[Tensor | None]) -> Vectors:
        parts = zip(self.rows, gradient, self.isolated.weights, strict=True)
        return [rows.gradient(g, w) for rows, g, w in parts]

    def _refuse_chance(self) -> None:
        """Raise where the loss or its gradient is another one at the same weights."""
        loss, gradient = self.isolated.again(
            lambda: self.isolated.gradient(sparse=True), lambda found: found[0].item() == self.loss
        )
        again = self._compact(gradient)
        apart = norm([a - b for a, b in zip(again, self.gradient, strict=True)]).item()
        allowed = 1e-4 if self.isolated.coarse else 1e-9
        size = norm(self.gradient).item()
        if not abs(loss.item() - self.loss) <= allowed * max(abs(self.loss), 1e-300) or not apart <= allowed * size:
            raise not_repeatable(self.loss, loss.item())

    def random(self, generator: torch.Generator) -> Vectors:
        """A direction with standard normal entries, in the parameters' scales."""
        made = [
            torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w.device, w.dtype) * scale
            for w, scale in zip(self.start, self.scales, strict=True)
        ]
        owners = zip(made, self.rows, self.isolated.owners(), self.isolated.weights, strict=True)
        for direction, rows, owner, w in owners:
            declared = kept_at_zero(owner, w)
            if declared:
                direction.view(-1)[rows.without(declared)] = 0
        return made

    def at(self, direction: Sequence[Tensor], step: float) -> tuple[float, Vectors]:
        """The loss and its gradient after a move."""
        places = list(zip(self.rows, self.isolated.weights, self.start, strict=True))
        with torch.no_grad():
            for (rows, w, start), d in zip(places, direction, strict=True):
                if rows.index is None:
                    torch.add(start, d, alpha=step, out=w)
                else:
                    rows.write(w, torch.add(start, d, alpha=step))
        try:
            self.isolated.draws.rewind()
            loss, gradient = self.isolated.gradient(sparse=True)
            return loss.item(), self._compact(gradient)
        finally:
            for rows, w, start in places:
                rows.write(w, start)

    def product(self, direction: Sequence[Tensor], step: float) -> tuple[Vectors, float, float]:
        """H v along a direction that is in the parameters' scales, and the losses below and above."""
        above, up = self.at(direction, step)
        below, down = self.at(direction, -step)
        return [(a - b).div_(2 * step) for a, b in zip(up, down, strict=True)], below, above

    def along(self, vector: Sequence[Tensor]) -> Vectors:
        """H v for any vector, both compact."""
        size = max((x.double() / s).norm().item() / x.numel() ** 0.5 for x, s in zip(vector, self.scales, strict=True))
        if size == 0:
            return [torch.zeros_like(w) for w in self.start]
        found, *_ = self.product([x.to(w) / size for x, w in zip(vector, self.start, strict=True)], self.steps[0])
        return [x * size for x in found]

    def scaled_norm(self, vectors: Sequence[Tensor]) -> float:
        """The norm in the parameters' scales."""
        return float(np.sqrt(sum((s * x.norm().item()) ** 2 for x, s in zip(vectors, self.scales, strict=True))))


VECTORS = 12  #: float64 vectors, as long as the gradient, that differences hold at once beside the copy of the weights


def state_need(probe: str, isolated: IsolatedLoss, more: int = 0, progress: bool | None = None) -> None:
    """Say what differences of the gradient need, and `more` vectors."""
    weights = isolated.tensors()
    entries, largest = compact_numel(weights, isolated.owners())
    needs = [
        Need(in_float64(isolated.copied()), "a float64 copy of the weights"),
        Need(8 * ((VECTORS + more) * entries + largest), f"{VECTORS + more} gradients, those of sparse tables left out"),
    ]
    state_memory(probe, [], needs, weights, "take some parameters (select=)", progress)


def kept_at_zero(owner: torch.nn.Module | None, weight: Tensor) -> range:
    """The flat indices whose partials are 0 by declaration, whatever the loss does: the padding row of an embedding."""
    row = owner.padding_idx if isinstance(owner, torch.nn.Embedding | torch.nn.EmbeddingBag) else None
    return range(0) if row is None else range(row * weight.shape[1], (row + 1) * weight.shape[1])


def _scale(weight: Tensor) -> float:
    n = max(weight.numel(), 1)
    return max(weight.double().norm().item() / n**0.5, FLOOR) / n**0.5


def not_repeatable(first: float, second: float) -> ProbeError:
    """The error for a loss that is not the same at each call."""
    return ProbeError(
        f"loss_fn gives {first:.9g} and then {second:.9g}, or another gradient, at the same weights with the same random "
        f"numbers: fix the batch outside of it (no next(iterator)), draw from generators that a probe can set back, and "
        f"avoid operations that are not deterministic"
    )


# --- products, in the way that holds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How far the two ways to one product are apart. `ok`: no further than the differences' own error explains."""

    apart: float  #: as a share of the product; NaN where there is but one way
    allowed: float
    reason: str = ""  #: why it was not tested, or why there is but one way

    @property
    def ok(self) -> bool:
        """Whether autograd's second derivative may be used."""
        return not self.reason and self.apart <= self.allowed

    def __str__(self) -> str:
        if self.ok:
            return f"autograd's products agree with differences of the gradient (to {self.apart:.0e})"
        if self.reason:
            return f"products are differences of the gradient, in float64: {self.reason}"
        return (
            f"autograd's own second derivative is WRONG here (off by {self.apart:.0%} of a product): some backward uses "
            f"a value that it saved detached; products are differences of the gradient instead, in float64"
        )


@dataclass(frozen=True)
class Products:
    """A loss, its gradient, and the product of its Hessian with any vector; `block` restricts it to some of the weights.

    All vectors are compact: `rows` says which entries of the parameters they are for, `weights` has the values there.
    """

    isolated: IsolatedLoss
    loss: float
    gradient: Vectors
    rows: list[Rows]
    weights: Vectors
    multiply: Callable[[Sequence[Tensor]], Vectors]
    block: Callable[[Sequence[int], Sequence[Tensor]], Vectors]
    agreement: Agreement


def with_products(
    probe: str,
    model: Target,
    loss_fn: Callable[[Any], Tensor],
    select: Select,
    seed: int,
    then: Callable[[Products], T],
    more: int = 0,
    progress: bool | None = None,
) -> T:
    """`then(products)`: by autograd in the model's precision where it can be trusted, else by differences in float64."""
    state_need(probe, IsolatedLoss(model, loss_fn, select=select), more, progress)
    agreement = self_test(model, loss_fn, select, seed)
    if agreement.ok:
        with IsolatedLoss(model, loss_fn, select=select) as isolated:

            def measure(loss: Tensor, gradient: Vectors) -> T:
                def block(members: Sequence[int], vector: Sequence[Tensor]) -> Vectors:
                    by = [isolated.weights[i] for i in members]
                    found = isolated.grad([gradient[i] for i in members], vector, retain_graph=True, by=by)
                    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, by, strict=True)]

                multiply = lambda v: product(isolated, gradient, v)  # noqa: E731
                detached = [g.detach() for g in gradient]
                rows = [Rows(None, w.shape) for w in isolated.weights]
                return then(Products(isolated, loss.item(), detached, rows, isolated.weights, multiply, block, agreement))

            return differentiated(isolated, measure)
    with IsolatedLoss(model, loss_fn, select=select, wide=True) as isolated:
        differences = Differences(isolated)

        def block(members: Sequence[int], vector: Sequence[Tensor]) -> Vectors:
            padded = [torch.zeros_like(w) for w in differences.start]
            for i, v in zip(members, vector, strict=True):
                padded[i] = v.to(padded[i])
            found = differences.along(padded)
            return [found[i] for i in members]

        of, d = differences.rows, differences
        return then(Products(isolated, d.loss, d.gradient, of, d.start, d.along, block, agreement))


def self_test(model: Target, loss_fn: Callable[[Any], Tensor], select: Select, seed: int) -> Agreement:
    """One product both ways, in float64, along a random direction."""
    with IsolatedLoss(model, loss_fn, select=select, wide=True) as isolated:
        differences = Differences(isolated)
        if any(rows.index is not None for rows in differences.rows):
            return Agreement(float("nan"), 0.0, "a sparse gradient has no second derivative in torch")
        direction = differences.random(torch.Generator().manual_seed(seed))
        isolated.draws.rewind()
        try:
            twice = differentiated(isolated, lambda loss, gradient: product(isolated, gradient, direction))
        except NoSecondDerivativeError as error:
            return Agreement(float("nan"), 0.0, f"{error.operator} has no second derivative in torch")
        found = _apart(differences, direction, twice)
        return found if found.ok or not isolated.watch_operations() else _apart(differences, direction, twice)


def _apart(differences: Differences, direction: Vectors, twice: Vectors) -> Agreement:
    """How far a product by autograd is from differences of the gradient."""
    longer, shorter = (differences.product(direction, step)[0] for step in differences.steps)
    size = max(differences.scaled_norm(longer), differences.scaled_norm(twice))
    # what rounding alone makes of a product that is 0
    floor = 100 * 2.0 ** (-23 if differences.isolated.coarse else -52) * differences.scaled_norm(differences.gradient)
    unsure = 3 * differences.scaled_norm([a - b for a, b in zip(longer, shorter, strict=True)])
    apart = min(differences.scaled_norm([a - b for a, b in zip(found, twice, strict=True)]) for found in (longer, shorter))
    if size == 0:
        return Agreement(0.0, AGREE)
    return Agreement(apart / size, AGREE + min((unsure + floor / differences.steps[1]) / size, 0.5))


def flatten(vectors: Sequence[Tensor]) -> Tensor:
    """One vector of all entries."""
    return torch.cat([x.detach().reshape(-1).to(vectors[0].device) for x in vectors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> Vectors:
    """The parts of a vector, in the shapes, on the devices and of the types of the weights."""
    parts = vector.split([w.numel() for w in like])
    return [part.reshape(w.shape).to(w.device, w.dtype) for part, w in zip(parts, like, strict=True)]


def host(parts: Sequence[Tensor]) -> np.ndarray:
    """All entries as float64 on the host."""
    return np.concatenate([part.detach().reshape(-1).double().cpu().numpy() for part in parts])
