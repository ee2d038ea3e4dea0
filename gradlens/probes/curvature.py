"""Curvature: how the partials themselves change as the weights move.

    H_ij = d^2 L / dw_i dw_j,   H v = d/dw (g.v)

- The *diagonal* `H_ii` says how fast the partial of one weight changes with that weight. Estimated by `mean of v * (H v)`
  over random signs v (Hutchinson; Bekas et al. 2007), with its standard error: the off-diagonal entries are its noise.
- The *Newton move* of one weight, `-g_i / H_ii`, is where its own parabola has its minimum, all others held fixed. It is
  given where the curvature is above twice its noise. To make all of them at once is not Newton's method.
- The *top eigenvalue* is the sharpest curvature in any direction, by Lanczos iterations. Plain gradient descent with
  learning rate lr is stable along it while it is below 2 / lr; momentum b moves that to 2 (1 + b) / lr, and Adam measures
  in other units, so that the comparison does not hold there.

All of it is for one batch and one draw of dropout. Curvature over the data is the mean over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradlens.errors import ArgumentError, nearest
from gradlens.probes import second_order
from gradlens.probes.isolated_loss import IsolatedLoss
from gradlens.probes.loss import Target
from gradlens.probes.per_weight import PerWeight
from gradlens.probes.progress import tracked
from gradlens.selection import Select
from gradlens.statistics.evidence import Moments, flat

ITERATIONS = 100  #: of Lanczos, at most; a few dozen do on networks
CONVERGED = 1e-3  #: residual of the top eigenvalue, as a share of it


@dataclass(frozen=True, eq=False)
class Curvature(PerWeight):
    """The curvature of one batch's loss.

    One row a weight in `frame`: `parameter, index, value, partial, curvature, noise, newton`; `weights(top=)` takes those of
    the largest |curvature|.
    """

    partial: np.ndarray
    curvature: np.ndarray  #: the diagonal of the Hessian, estimated
    noise: np.ndarray  #: its standard error
    top: float  #: the largest eigenvalue
    bottom: float  #: the smallest: below 0 at a saddle
    residual: float  #: how far `top` may be from an eigenvalue; the rounding of 16-bit models (half a percent) comes on top
    lr: float | None
    loss: float

    @property
    def newton(self) -> np.ndarray:
        """-g / H_ii where the curvature is clearly above 0, else NaN."""
        clear = self.curvature > 2 * self.noise
        return np.divide(-self.partial, self.curvature, out=np.full(len(self), np.nan), where=clear & (self.curvature > 0))

    @property
    def limit(self) -> float | None:
        """2 / lr: the curvature above which plain gradient descent at this learning rate is unstable."""
        return None if self.lr is None else 2 / self.lr

    @property
    def stable(self) -> bool | None:
        """Whether the top eigenvalue is below 2 / lr; None without a learning rate."""
        return None if self.limit is None else self.top < self.limit

    def strength(self, chosen: np.ndarray) -> np.ndarray:
        """|curvature|."""
        return np.abs(self.curvature[chosen])

    def columns(self, chosen: np.ndarray) -> dict[str, object]:
        """The curvature and what follows from it."""
        named = ("partial", "curvature", "noise", "newton")
        return {name: getattr(self, name)[chosen] for name in named}

    def __str__(self) -> str:
        clear = np.abs(self.curvature) > 2 * self.noise
        lines = [
            f"curvature of the loss ({self.loss:.6g}) over {len(self):,} weights: eigenvalues from {self.bottom:.4g} to "
            f"{self.top:.4g} (± {self.residual:.1g})",
            f"  along single weights: {np.mean(clear & (self.curvature > 0)):.0%} curve up, "
            f"{np.mean(clear & (self.curvature < 0)):.0%} down, of the others it is not clear from this many samples",
        ]
        if self.limit is not None:
            side = "below: stable" if self.stable else "ABOVE: unstable"
            lines.append(
                f"  2 / lr = {self.limit:.4g} at lr = {self.lr:g}; the top eigenvalue is {side} for plain gradient descent"
            )
        return "\n".join(lines)


def curvature(
    model: Target,
    loss_fn: Callable[[Any], Tensor],
    *,
    samples: int = 32,
    lr: float | None = None,
    select: Select = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Curvature:
    """The curvature of `loss_fn(model)`: its diagonal, the Newton move of each weight, and the extreme eigenvalues.

    `samples` vectors of random signs estimate the diagonal (its noise falls with their root); `lr` is compared with the
    top eigenvalue; `select` takes the Hessian block of some parameters. Costs a Hessian-vector product, about two backward
    passes, for each sample and for each of a few dozen Lanczos iterations, in the precision of the model, and memory for
    the graph of two backward passes.
    """
    if samples < 2:
        raise ArgumentError(f"samples must be at least 2, to say how noisy the diagonal is, not {samples}")
    if lr is not None and not lr > 0:
        raise ArgumentError(f"lr is the learning rate to compare with, above 0, not {lr!r}")
    with IsolatedLoss(model, loss_fn, select=select) as isolated:
        random = torch.Generator().manual_seed(seed)

        def measure(loss: Tensor, gradient: list[Tensor]) -> tuple[float, np.ndarray, Moments, Spectrum]:
            moments = hutchinson(isolated, gradient, tracked(range(samples), "Hessian diagonal", samples, progress), random)
            return loss.item(), _host(gradient), moments, lanczos(isolated, gradient, random)

        loss, partial, moments, spectrum = second_order.differentiated(isolated, measure)
        diagonal, squares = _host(moments.mean), _host(moments.squares)
        return Curvature(
            parameters=isolated.parameters,
            index=(None,) * len(isolated.weights),
            value=_host(isolated.weights),
            partial=partial,
            curvature=diagonal,
            noise=np.sqrt(squares / (samples - 1) / samples),
            top=spectrum.top,
            bottom=spectrum.bottom,
            residual=spectrum.residual,
            lr=lr,
            loss=loss,
        )


def hessian_product(
    model: Target, loss_fn: Callable[[Any], Tensor], vector: Mapping[str, Tensor], *, select: Select = None
) -> dict[str, Tensor]:
    """H v for one vector, given and returned as tensors by parameter name; what `vector` leaves out counts as 0."""
    with IsolatedLoss(model, loss_fn, select=select) as isolated:
        names = isolated.parameters.names
        for name in vector:
            if name not in names:
                raise ArgumentError(
                    f"the vector has an entry for {name!r}, which is no parameter here{nearest(name, names)}"
                )
        given = [vector.get(name, torch.zeros_like(w)) for name, w in zip(names, isolated.weights, strict=True)]
        v = [x.to(w.device, w.dtype).reshape(w.shape) for x, w in zip(given, isolated.weights, strict=True)]
        found = second_order.differentiated(isolated, lambda loss, gradient: second_order.product(isolated, gradient, v))
        return {name: x.detach() for name, x in zip(names, found, strict=True)}


def hutchinson(
    isolated: IsolatedLoss, gradient: Sequence[Tensor], samples: Iterable[int], random: torch.Generator
) -> Moments:
    """Moments of v * (H v) over vectors v of random signs: their mean estimates the diagonal."""
    moments = Moments(isolated.weights)
    for _ in samples:
        v = [(torch.randint(0, 2, w.shape, generator=random) * 2 - 1).to(w) for w in isolated.weights]
        moments.update([x * y for x, y in zip(v, second_order.product(isolated, gradient, v), strict=True)])
    return moments


@dataclass(frozen=True)
class Spectrum:
    """The extreme eigenvalues, and how far the largest may be from a true one."""

    top: float
    bottom: float
    residual: float


def lanczos(isolated: IsolatedLoss, gradient: Sequence[Tensor], random: torch.Generator) -> Spectrum:
    """Extreme eigenvalues by the three-term recurrence: memory for three vectors, whatever the number of iterations.

    Without reorthogonalisation eigenvalues come twice, which does not touch the extreme ones (Paige 1980).
    """
    v = [torch.randn(w.shape, generator=random, dtype=torch.float64).to(w) for w in isolated.weights]
    v = [x / second_order.norm(v) for x in v]
    last, beta = [torch.zeros_like(x) for x in v], 0.0
    alphas: list[float] = []
    betas: list[float] = []
    while True:
        product = second_order.product(isolated, gradient, v)
        alpha = second_order.dot(product, v).item()
        rest = [hv - alpha * x - beta * y for hv, x, y in zip(product, v, last, strict=True)]
        beta = second_order.norm(rest).item()
        alphas.append(alpha)
        values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))
        residual = abs(beta * vectors[-1, -1])
        scale = max(abs(values[0]), abs(values[-1]))
        if residual <= CONVERGED * scale or len(alphas) == min(ITERATIONS, sum(x.numel() for x in v)) or beta == 0:
            return Spectrum(float(values[-1]), float(values[0]), float(residual))
        betas.append(beta)
        last, v = v, [x / beta for x in rest]


def _host(parts: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([flat(part.detach()).cpu().numpy() for part in parts])
