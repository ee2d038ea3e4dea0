"""Both ends of a symmetric matrix's spectrum, from products with it alone (Lanczos 1950).

    H V_m = V_m T_m + beta_m v_(m+1) e_m',   T_m s = theta s   ->   |H (V s) - theta (V s)| = beta_m |s_m|

So each end has a residual: some eigenvalue lies within it. The iteration ends when both residuals are small, or says which
is not. The measure is the *spread* of the spectrum, not its size: a matrix close to a multiple of the identity (weight
decay) has a large size and little to tell by. A start vector may have next to nothing of an eigenvector in it, so a second
start, from another vector, must agree; if not, a third and a fourth are made. The vectors are kept and made orthogonal again
where they fit; without that, copies of eigenvalues come, which does not touch the ends (Paige 1980).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ITERATIONS = 128  #: of one start, at most
STARTS = 4
TOP, BOTTOM = 1e-3, 2e-2  #: residuals that will do: of the larger end by the spread, of the smaller by itself
LEAST = 1e-6  #: of the spread: what is below that is rounding
BASIS = 1 << 29  #: bytes that kept vectors may take


@dataclass(frozen=True)
class End:
    """One end of a spectrum. Some eigenvalue is within `residual` of `value`."""

    value: float
    residual: float
    converged: bool


@dataclass(frozen=True)
class Spectrum:
    """Both ends, and what it took."""

    bottom: End
    top: End
    iterations: int
    starts: int


def extremes(
    multiply: Callable[[Tensor], Tensor], like: Tensor, random: torch.Generator, most: int = ITERATIONS
) -> Spectrum:
    """Both ends of the spectrum; starts again from other vectors until two agree."""
    found: list[Spectrum] = []
    while len(found) < STARTS:
        start = torch.randn(like.numel(), generator=random, dtype=torch.float64).to(like.device, like.dtype)
        found.append(_one(multiply, start, most))
        if like.numel() == 1 or (len(found) > 1 and _agree(found)):
            break
    top = max((one.top for one in found), key=lambda end: end.value)
    bottom = min((one.bottom for one in found), key=lambda end: end.value)
    return Spectrum(bottom, top, sum(one.iterations for one in found), len(found))


def _agree(found: list[Spectrum]) -> bool:
    """Whether the best of all starts was found twice."""
    spread = max(one.top.value for one in found) - min(one.bottom.value for one in found)
    tops = sorted((one.top for one in found), key=lambda end: -end.value)[:2]
    bottoms = sorted((one.bottom for one in found), key=lambda end: end.value)[:2]
    return all(abs(a.value - b.value) <= a.residual + b.residual + LEAST * spread for a, b in (tuple(tops), tuple(bottoms)))


def _one(multiply: Callable[[Tensor], Tensor], start: Tensor, most: int) -> Spectrum:
    n = start.numel()
    most = min(most, n)
    kept = n * start.element_size() * most <= BASIS
    v, last, beta = start / start.norm(), torch.zeros_like(start), 0.0
    basis: list[Tensor] = []
    alphas: list[float] = []
    betas: list[float] = []
    while True:
        basis += [v] if kept else []
        w = multiply(v)
        alpha = torch.dot(w, v).item()
        w = w.sub(v, alpha=alpha).sub_(last, alpha=beta)
        if kept and len(basis) > 1:
            q = torch.stack(basis)
            for _ in range(2):  # twice is enough (Parlett 1980)
                w -= q.T @ (q @ w)
        beta = w.norm().item()
        alphas.append(alpha)
        exact = len(alphas) == n or not beta > _rounding(start) * max(map(abs, alphas))
        if exact or len(alphas) >= most or len(alphas) % 4 == 0:
            bottom, top = _ends(alphas, betas, 0.0 if exact else beta, start)
            if exact or len(alphas) >= most or (top.converged and bottom.converged):
                return Spectrum(bottom, top, len(alphas), 1)
        betas.append(beta)
        last, v = v, w / beta


def _rounding(like: Tensor) -> float:
    return 8 * torch.finfo(like.dtype).eps


def _ends(alphas: list[float], betas: list[float], beta: float, like: Tensor) -> tuple[End, End]:
    values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))
    low, high = float(values[0]), float(values[-1])
    spread = high - low
    rounding = _rounding(like) * max(abs(low), abs(high))  # of the products themselves
    floor = max(LEAST * spread, rounding)
    ends = []
    for value, vector in ((low, vectors[:, 0]), (high, vectors[:, -1])):
        residual = abs(beta * float(vector[-1])) + rounding
        larger = abs(value) >= 0.5 * spread
        ends.append(End(value, residual, residual <= max(TOP * spread if larger else BOTTOM * abs(value), 2 * floor)))
    return ends[0], ends[1]
