"""From a mean and its spread to a verdict: Student's t, its p value, and the control of false discoveries.

    t = mean / (s / sqrt(K)),   p = P(|T| >= |t|) with K - 1 degrees of freedom,   q by Benjamini and Hochberg over all

One test a weight, of the hypothesis that its expected partial is 0. With so many tests some small p values are luck, so the
one that decides is q: among all weights with `q <= 0.1`, at most a tenth is expected to be wrong, on average over surveys,
if the tests are independent or positively dependent (Benjamini and Hochberg 1995, Benjamini and Yekutieli 2001).
`method="by"` bounds it under any dependence and keeps fewer weights. A single survey may do worse than the average.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gradlens.errors import choice

METHODS = ("bh", "by")
#: Entries that are worked on at once: what stays in the cache; elsewhere a workspace of a few dozen MiB.
CHUNK, CHUNK_ELSEWHERE = 1 << 16, 1 << 20


def p_values(t: Tensor, freedom: int) -> Tensor:
    """P(|T| >= |t|) for Student's t with `freedom` degrees: to a relative 1e-10, also far out in the tail.

    With u = t^2 / freedom this is the regularised incomplete beta function I_x(freedom / 2, 1 / 2) at x = 1 / (1 + u), by
    its continued fraction on whichever side of it converges (Press et al., Numerical Recipes, 6.4).
    """
    return torch.cat([_p_values(part, freedom) for part in t.split(CHUNK if t.device.type == "cpu" else CHUNK_ELSEWHERE)])


def _p_values(t: Tensor, freedom: int) -> Tensor:
    a, b = freedom / 2, 0.5
    u = t.double().abs().clamp(max=1e150).square() / freedom
    x = 1 / (1 + u)
    power = torch.exp(-a * torch.log1p(u)) * torch.sqrt(u * x) * (_gamma_ratio(a) / math.sqrt(math.pi))
    far = x < (a + 1) / (a + b + 2)
    p = torch.empty_like(u)
    p[far] = power[far] * _fraction(x[far], a, b) / a
    p[~far] = 1 - power[~far] * _fraction((u * x)[~far], b, a) / b
    return torch.where(t.isinf(), 0.0, p).clamp(0, 1).where(~t.isnan(), math.nan)


def _gamma_ratio(a: float) -> float:
    """Gamma(a + 1/2) / Gamma(a), whose logarithms cancel too many digits when a is large."""
    if a < 100:
        return math.exp(math.lgamma(a + 0.5) - math.lgamma(a))
    return math.sqrt(a) * (1 - 1 / (8 * a) + 1 / (128 * a**2) + 5 / (1024 * a**3) - 21 / (32768 * a**4))


def _fraction(x: Tensor, a: float, b: float) -> Tensor:
    """The continued fraction of the incomplete beta function, from its last term backwards: three operations a term."""
    r = torch.ones_like(x)
    for term in reversed(_terms(a, b)):
        torch.div(x, r, out=r)
        r.mul_(term).add_(1)
    return r.reciprocal_()


def _terms(a: float, b: float) -> list[float]:
    """As many of its terms as it takes where it is slowest, at `x = (a + 1) / (a + b + 2)`; by the modified Lentz method."""
    x = (a + 1) / (a + b + 2)
    terms = [-(a + b) / (a + 1)]
    c, d = 1.0, 1 / (1 + terms[0] * x)
    for m in range(1, 10_000):
        before = c * d
        for term in (
            m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            terms.append(term)
            d = 1 / (1 + term * x * d)
            c = 1 + term * x / c
        if m > 1 and abs(before - 1) <= 1e-15 and abs(c * d - 1) <= 1e-15:
            break
    return terms


def q_values(p: Tensor, method: str = "bh") -> Tensor:
    """The smallest level of false discovery control at which each of the tests is kept: `min_(j >= i) p_(j) m / j`.

    `method="by"` multiplies by 1 + 1/2 + ... + 1/m and holds under any dependence. All of `p` are tests: NaN is no p value.
    """
    if method not in METHODS:
        raise choice("method", method, METHODS)
    m = p.numel()
    if m == 0:
        return p.clone()
    order = torch.from_numpy(np.argsort(p.numpy())) if p.device.type == "cpu" else p.argsort()  # numpy's takes half the time
    ordered = p[order]
    ordered *= m / torch.arange(1, m + 1, dtype=p.dtype, device=p.device)
    if method == "by":
        ordered *= harmonic(m)
    kept = ordered.flip(0).cummin(0).values.flip(0).clamp_(max=1)
    return torch.empty_like(p).scatter_(0, order, kept)


def harmonic(m: int) -> float:
    """1 + 1/2 + ... + 1/m."""
    if m < 10_000:
        return math.fsum(1 / i for i in range(1, m + 1))
    return math.log(m) + 0.5772156649015329 + 1 / (2 * m) - 1 / (12 * m * m)


def detectable(freedom: int, p: float) -> float:
    """The |t| that has this p value: how far from 0 a mean must lie, in standard errors, to be kept at that level."""
    low, high = 0.0, 1e150
    while high - low > 1e-12 * high:
        middle = math.sqrt(max(low, 1e-9) * high)
        if p_values(torch.tensor([middle], dtype=torch.float64), freedom).item() > p:
            low = middle
        else:
            high = middle
    return high
