"""Both ends of a symmetric matrix's spectrum, from products with it alone (Lanczos 1950).

    H V_m = V_m T_m + beta_m v_(m+1) e_m',   T_m s = theta s   ->   |H (V s) - theta (V s)| = beta_m |s_m|

So each end has a residual: some eigenvalue lies within it. The iteration ends when both residuals are small, or says which
is not. The measure is the *spread* of the spectrum, not its size: a matrix close to a multiple of the identity (weight
decay) has a large size and little to tell by. A start vector may have next to nothing of an eigenvector in it, so a second
start, from another vector, must agree; if not, a third and a fourth are made. The vectors are kept where they fit,
and made orthogonal again when they must be; without that, copies of eigenvalues come, which does not touch the ends (Paige
1980).
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
ROWS = 16  #: vectors that room is made for at once


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
    v, last, beta = start / start.norm(), torch.zeros_like(start), 0.0
    basis = _Basis(start, most)
    alphas: list[float] = []
    betas: list[float] = []
    while True:
        basis.add(v)
        w = multiply(v)
        alpha = torch.dot(w, v).item()
        w = w.sub(v, alpha=alpha).sub_(last, alpha=beta)
        alphas.append(alpha)
        beta = basis.orthogonalise(w, alphas, betas, w.norm().item())
        exact = len(alphas) == n or not beta > _rounding(start) * max(map(abs, alphas))
        if exact or len(alphas) >= most or len(alphas) % 4 == 0:
            bottom, top = _ends(alphas, betas, 0.0 if exact else beta, basis.noise)
            if exact or len(alphas) >= most or (top.converged and bottom.converged):
                return Spectrum(bottom, top, len(alphas), 1)
        betas.append(beta)
        last, v = v, w / beta


class _Basis:
    """The vectors so far, and how far the next one is from being orthogonal to each of them.

    That is estimated from the coefficients alone (Simon 1984): in `beta_m omega_(m+1) = T omega_m - alpha_m omega_m -
    beta_(m-1) omega_(m-1) + rounding` every term is known. Only when it passes the root of the rounding are the next two
    vectors made orthogonal to all: until then the ends of the spectrum are those of exact arithmetic.
    """

    def __init__(self, like: Tensor, most: int) -> None:
        self._like, self._blocks, self._count = like, list[Tensor](), 0
        self._kept = like.numel() * like.element_size() * most <= BASIS
        self.noise = _rounding(like) * (1 if self._kept else 4)  # copies of eigenvalues bring more of it
        self._now, self._before = np.zeros(0), np.zeros(0)  # v_m . v_j, and of the one before
        self._once_more = False

    def add(self, v: Tensor) -> None:
        """One more vector, of length 1."""
        if not self._kept:
            return
        if self._count % ROWS == 0:
            self._blocks.append(self._like.new_empty(ROWS, self._like.numel()))
        self._blocks[-1][self._count % ROWS] = v
        self._count += 1

    def orthogonalise(self, w: Tensor, alphas: list[float], betas: list[float], beta: float) -> float:
        """Make w, the next vector but for its length, orthogonal to all where it must be; its length."""
        m = len(alphas)
        if not self._kept or m == 1 or beta == 0:
            self._now, self._before = np.full(m, self.noise), self._now
            return beta
        estimate = self._estimate(np.array(alphas), np.array(betas), beta)
        if self._once_more or np.abs(estimate).max() > self.noise**0.5:
            self._once_more = not self._once_more
            beta = self._against_all(w, beta)
            estimate = np.full(m, self.noise)
        self._before, self._now = self._now, estimate
        return beta

    def _against_all(self, w: Tensor, beta: float) -> float:
        for _ in range(2):  # twice is enough, and needed only where much was taken away (Parlett 1980)
            for block in self._filled():
                w -= block.T @ (block @ w)
            before, beta = beta, w.norm().item()
            if beta > 0.7 * before:
                break
        return beta

    def _filled(self) -> list[Tensor]:
        used = self._count - ROWS * (len(self._blocks) - 1)
        return [*self._blocks[:-1], self._blocks[-1][:used]]

    def _estimate(self, alphas: np.ndarray, betas: np.ndarray, beta: float) -> np.ndarray:
        m = len(alphas)
        now = np.append(self._now, 1.0)  # v_m is the last of those that are kept
        before = np.append(self._before, 1.0)
        found = (alphas[:-1] - alphas[-1]) * now[: m - 1] + betas * now[1:] - betas[-1] * before[: m - 1]
        found[1:] += betas[:-1] * now[: m - 2]
        rounding = self.noise * (np.abs(alphas).max() + betas.max())
        return np.append(found + np.copysign(rounding, found), rounding) / beta


def _rounding(like: Tensor) -> float:
    return 8 * torch.finfo(like.dtype).eps


def _ends(alphas: list[float], betas: list[float], beta: float, noise: float) -> tuple[End, End]:
    values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))
    low, high = float(values[0]), float(values[-1])
    spread = high - low
    rounding = noise * max(abs(low), abs(high))  # of the products themselves
    floor = max(LEAST * spread, rounding)
    ends = []
    for value, vector in ((low, vectors[:, 0]), (high, vectors[:, -1])):
        residual = abs(beta * float(vector[-1])) + rounding
        larger = abs(value) >= 0.5 * spread
        ends.append(End(value, residual, residual <= max(TOP * spread if larger else BOTTOM * abs(value), 2 * floor)))
    return ends[0], ends[1]
