"""Mixed partials are equal: the test that a gradient is the gradient of a function, and of this one.

    H v = (g(w + h v) - g(w - h v)) / 2h,      u.(H v) == v.(H u)       for random directions u, v
    g.v == (L(w + h v) - L(w - h v)) / 2h

H is taken from differences of the gradient, in float64. Differentiating a wrong backward again would be symmetric again, and
prove nothing. The second line is had for nothing from the same evaluations: a gradient that is wrong by one common factor is
the gradient of a function, though not of this loss.

All is done with two sizes of h. By how much they differ says what curvature, rounding and kinks (ReLU) do to a difference,
and that, three times, is added to what is allowed. With M the Hessian in the units of the directions, u.(M v) - v.(M u)
has the variance |M - M'|^2, so the asymmetry |M - M'| / (sqrt(2) |M|) is 0 for a gradient, 1 where M and its transpose
have nothing to do with each other. What would have been found with a probability of 99 % is stated: for the worst case,
one pair of directions in which all of the asymmetry lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradlens import markup
from gradlens.errors import ArgumentError
from gradlens.probes import second_order
from gradlens.probes.allowed import Allowed, parse_allowed
from gradlens.probes.interrupts import leaves_no_trace
from gradlens.probes.isolated_loss import IsolatedLoss
from gradlens.probes.loss import Target
from gradlens.selection import Select

if TYPE_CHECKING:
    import pandas as pd

MARGIN = 3  #: times the difference between the two steps is allowed
SURE = 0.99
_EPS = 2.0**-52


@dataclass(frozen=True, eq=False, repr=False)
class Symmetry(markup.Shown):
    """What `check_symmetry` found. `ok`: mixed partials are equal and slopes are right, as far as the directions tell."""

    pairs: dict[str, np.ndarray]  #: the columns of `frame`
    directions: dict[str, np.ndarray]  #: the columns of `slopes`
    tolerance: float
    detectable: float  #: the asymmetry that would have been found with a probability of 99 %; inf where none would
    steps: tuple[float, float]
    seed: int
    narrow: tuple[str, ...]  #: operations that could not be computed in float64
    held: tuple[str, ...] = ()  #: what `allow` was given

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row a pair: `u_Hv, v_Hu, difference, scale, asymmetry, allowed`."""
        import pandas as pd

        return pd.DataFrame(self.pairs)

    @cached_property
    def slopes(self) -> pd.DataFrame:
        """A row a direction: `partial` (g.v), `difference` (of the loss), `scale, error, allowed`."""
        import pandas as pd

        return pd.DataFrame(self.directions)

    @property
    def asymmetry(self) -> float:
        """The asymmetry of the Hessian, |M - M'| / (sqrt(2) |M|): the root mean square over pairs."""
        return float(np.sqrt(np.mean(self.pairs["asymmetry"] ** 2)))

    @property
    def symmetric(self) -> bool:
        """Whether no pair differs by more than is allowed."""
        return bool((self.pairs["asymmetry"] <= self.pairs["allowed"]).all())

    @property
    def slopes_right(self) -> bool:
        """Whether the gradient says how the loss changes along each direction."""
        return bool((self.directions["error"] <= self.directions["allowed"]).all())

    @property
    def ok(self) -> bool:
        """Whether this is a gradient, and that of the loss, as far as the directions tried tell."""
        return self.symmetric and self.slopes_right

    @property
    def flat(self) -> bool:
        """Whether the Hessian is 0 as far as rounding tells, so that nothing was put to test but slopes."""
        return not self.pairs["scale"].any()

    def __str__(self) -> str:
        lines = [self._first()]
        if not self.ok:
            lines.append(
                "  look at custom autograd.Functions, detach(), .data, no_grad() and in-place writes, and at what writes "
                "into its own weights in forward (spectral_norm, max_norm); what is meant is left out by allow='detach' or "
                "allow='encoder.*'"
            )
        pairs, directions = len(self.pairs["scale"]), len(self.directions["scale"])
        power = "none" if np.isinf(self.detectable) else f"{self.detectable:.1e}"
        lines.append(
            f"  {directions} directions, {pairs} pairs: asymmetry {self.asymmetry:.1e} (0: equal, 1: unrelated); one of "
            f"{power} would be found with a probability of {SURE:.0%}; slopes off by {self.slopes['error'].max():.1e} "
            f"at most"
        )
        lines.append(f"  steps {self.steps[0]:g} and {self.steps[1]:g}, tolerance {self.tolerance:g}, seed {self.seed}")
        if self.detectable > 0.05 and not self.flat:
            lines.append(
                "  little power: the two steps disagree (kinks such as ReLU, or rounding); take a smaller or smoother batch"
            )
        if self.held:
            lines.append(f"  allowed: {', '.join(self.held)}")
        if self.narrow:
            lines.append(f"  less than float64: {', '.join(self.narrow)}")
        return "\n".join(lines)

    def _first(self) -> str:
        if not self.symmetric:
            share = f"{min(self.asymmetry, 9.99):.0%}" if self.asymmetry > 0.005 else f"{self.asymmetry:.1e}"
            return (
                f"mixed partials are NOT equal (asymmetry {share}): this gradient is the gradient of no function, so some "
                f"backward is wrong, or something is cut off on purpose; check_partials names the weights"
            )
        if not self.slopes_right:
            return (
                f"mixed partials are equal, but the gradient is NOT that of this loss (slopes are off by "
                f"{self.slopes['error'].max():.0%}): a backward that is wrong by a factor, or a value cut off; "
                f"check_partials names the weights"
            )
        if self.flat:
            return (
                "the Hessian is 0 along all directions: equal, but nothing was put to test besides slopes, which are right"
            )
        return "mixed partials are equal, and slopes are right: no backward is wrong, as far as random directions tell"


@leaves_no_trace
def check_symmetry(
    model: Target,
    loss_fn: Callable[[Any], Tensor],
    k: int = 4,
    *,
    tolerance: float = 1e-6,
    allow: str | Sequence[str] | None = None,
    select: Select = None,
    seed: int = 0,
) -> Symmetry:
    """Whether mixed partials are equal: `u.(H v) == v.(H u)` for all pairs of `2 k` random directions, in float64.

    H is taken from central differences of the gradient, with two step sizes; slopes of the loss are compared with the
    gradient along the same directions. `tolerance` is the share of the Hessian's size that is allowed beside what the
    steps say of their own error. Costs `8 k` gradients, and the memory of `2 k + 12` of them beside a copy of the weights,
    all in float64. `allow="detach"` holds what the loss cuts off on purpose
    (`detach()`, `no_grad()`) at its value, so that a straight-through estimator is judged as it is meant; patterns
    (`allow="encoder.*"`) leave parameters out. `select` restricts the test to the Hessian block of some parameters.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ArgumentError(f"k is half the number of directions, at least 1, not {k!r}")
    allowed = parse_allowed(allow)
    with IsolatedLoss(model, loss_fn, select=allowed.left_out(select), wide=True, hold_cuts=allowed.cuts) as isolated:
        allowed.check(isolated.all_names)
        second_order.state_need("check_symmetry", isolated, 2 * k)
        differences = second_order.Differences(isolated)
        random = torch.Generator().manual_seed(seed)
        directions = [differences.random(random) for _ in range(2 * k)]
        while True:
            measured = [_measure(differences, directions, v) for v in directions]
            found = _result(differences, measured, tolerance, seed, allowed)
            if found.ok or not isolated.watch_operations():
                return found


@dataclass(frozen=True)
class _Measured:
    """Along one direction, with the longer and the shorter step."""

    rows: tuple[np.ndarray, np.ndarray]  #: u.(H v) for each direction u
    sizes: tuple[float, float]  #: |H v|, in the directions' units
    losses: tuple[tuple[float, float], tuple[float, float]]  #: below and above
    slope: float  #: g.v


def _measure(
    differences: second_order.Differences, directions: Sequence[Sequence[Tensor]], v: Sequence[Tensor]
) -> _Measured:
    rows, sizes, losses = [], [], []
    for step in differences.steps:
        product, below, above = differences.product(v, step)
        rows.append(np.array([second_order.dot(u, product).item() for u in directions]))
        sizes.append(differences.scaled_norm(product))
        losses.append((below, above))
    slope = second_order.dot(differences.gradient, v).item()
    return _Measured((rows[0], rows[1]), (sizes[0], sizes[1]), (losses[0], losses[1]), slope)


def _result(
    differences: second_order.Differences, measured: Sequence[_Measured], tolerance: float, seed: int, allowed: Allowed
) -> Symmetry:
    gradient = differences.scaled_norm(differences.gradient)
    coarse = 2.0**-23 if differences.isolated.coarse else _EPS
    size = float(np.sqrt(np.mean([m.sizes[1] ** 2 for m in measured])))
    rounding = 50 * coarse * gradient / differences.steps[0]  # of a product, by the rounding of the gradient
    pairs = _pairs(measured, 0.0 if size <= rounding else size, tolerance)
    typical = float(np.median(pairs["allowed"]))
    alone = 1 - (1 - SURE) ** (1 / max(len(measured) - 1, 1))  # of one pair to be found
    return Symmetry(
        pairs=pairs,
        directions=_slopes(differences, measured, gradient, tolerance),
        tolerance=tolerance,
        # |M - M'| of rank two: the entries are Laplace distributed, P(|x| > t) = exp(-sqrt(2) t / deviation)
        detectable=2**0.5 * typical / -np.log(alone) if pairs["scale"].any() else float("inf"),
        steps=differences.steps,
        seed=seed,
        narrow=differences.isolated.narrow,
        held=allowed.given,
    )


def _pairs(measured: Sequence[_Measured], size: float, tolerance: float) -> dict[str, np.ndarray]:
    longer, shorter = (np.array([m.rows[s] for m in measured]).T for s in (0, 1))  # [u, v]: u.(H v)
    pairs = list(combinations(range(len(measured)), 2))
    a, b = (np.array(side) for side in zip(*pairs, strict=True))
    difference = shorter[a, b] - shorter[b, a]
    apart = np.abs(difference - (longer[a, b] - longer[b, a]))
    scale = 2**0.5 * size
    share = (lambda x: np.abs(x) / scale) if scale else np.zeros_like
    # of the two steps take the one that is nearer to symmetric: where they disagree, the other has met a kink
    least = np.minimum(np.abs(difference), np.abs(longer[a, b] - longer[b, a]))
    return {
        "u_Hv": shorter[a, b],
        "v_Hu": shorter[b, a],
        "difference": difference,
        "scale": np.full(len(pairs), scale),
        "asymmetry": share(least),
        "allowed": tolerance + MARGIN * share(apart),
    }


def _slopes(
    differences: second_order.Differences, measured: Sequence[_Measured], gradient: float, tolerance: float
) -> dict[str, np.ndarray]:
    """The gradient against the loss itself; between the slopes of a kink anything is right."""
    rows = []
    at, coarse = differences.loss, 2.0**-23 if differences.isolated.coarse else _EPS
    for m in measured:
        found = []
        for (below, above), step in zip(m.losses, differences.steps, strict=True):
            left, right = sorted(((at - below) / step, (above - at) / step))
            rounding = 20 * coarse * max(abs(at), abs(below), abs(above)) / step
            middle = (above - below) / (2 * step)
            found.append((abs(m.slope - min(max(m.slope, left), right)), middle, rounding, abs(m.slope - middle)))
        (_, longer, _, _), (outside, shorter, rounding, _) = found
        scale = max(gradient, abs(shorter))
        error = min(outside, found[0][0])
        allowed = MARGIN * abs(longer - shorter) + rounding
        rows.append(
            (m.slope, shorter, scale, error / scale if scale else 0.0, tolerance + (allowed / scale if scale else 0.0))
        )
    return dict(zip(("partial", "difference", "scale", "error", "allowed"), np.array(rows, np.float64).T, strict=True))
