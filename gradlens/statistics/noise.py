"""The gradient noise scale: the batch size above which larger batches bring little (McCandlish et al. 2018,
arXiv:1812.06162).

    B_noise = tr(Sigma) / |G|^2,   G the true gradient, Sigma the covariance of one micro-batch's

From the squared norms of K micro-batches' gradients g_k (or of K ranks' local ones) and of their mean alone, no gradient
stored: since E|g_k|^2 = |G|^2 + tr(Sigma) and E|mean|^2 = |G|^2 + tr(Sigma) / K,

    tr(Sigma) ~ (avg |g_k|^2 - |mean|^2) K / (K - 1),        |G|^2 ~ (K |mean|^2 - avg |g_k|^2) / (K - 1)

Both are unbiased, and they equal what the stored gradients would give. Their ratio is not, and |G|^2 may come out negative,
so each is smoothed over steps by itself before the ratio is taken. Norms must be of unclipped gradients of one scale. The
unit is micro-batches; times the examples of one it is examples. It speaks of the loss's gradient in its own coordinates:
an adaptive optimizer's critical batch size may differ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradlens.errors import ArgumentError


@dataclass(frozen=True)
class Noise:
    """Estimates from one step: numbers, or an array with an entry a parameter. NaN where there was one micro-batch."""

    signal: Any  #: |G|^2; may be negative
    trace: Any  #: tr(Sigma) of one micro-batch's gradient


def estimate(squares: Any, *, summed: Any = None, averaged: Any = None) -> Noise:
    """Signal and noise of one step.

    `squares`: [K] or [K, parameters], the squared norms of the K gradients. Of the squared norm of all K together give one:
    `summed`, of their sum (accumulated in `.grad`), or `averaged`, of their mean (as DDP leaves it). Parameters add up.
    """
    squares = np.asarray(squares, np.float64)
    k = squares.shape[0] if squares.ndim else 0
    if k == 0 or (summed is None) == (averaged is None):
        raise ArgumentError("estimate needs each gradient's squared norm, and either that of their sum or of their mean")
    together = np.asarray(averaged, np.float64) if summed is None else np.asarray(summed, np.float64) / k**2
    if k == 1:
        return Noise(np.full_like(together, np.nan)[()], np.full_like(together, np.nan)[()])
    alone = squares.mean(axis=0)
    return Noise(((k * together - alone) / (k - 1))[()], ((alone - together) * k / (k - 1))[()])


@dataclass(frozen=True)
class NoiseScale:
    """Noise and signal smoothed over steps, each by itself; a step's weight falls by `decay` with each one after it."""

    decay: float = 0.95
    signal: Any = 0.0
    trace: Any = 0.0
    weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ArgumentError(f"decay is the weight of a step against the one after it, in [0, 1), not {self.decay!r}")

    def after(self, noise: Noise) -> NoiseScale:
        """With one more step; one that tells nothing (K = 1, or not finite) changes nothing."""
        if not (np.isfinite(noise.signal).all() and np.isfinite(noise.trace).all()):
            return self
        keep, add = self.decay, 1 - self.decay
        return replace(
            self,
            signal=keep * self.signal + add * noise.signal,
            trace=keep * self.trace + add * noise.trace,
            weight=keep * self.weight + add,
        )

    def scale(self, examples: float = 1.0) -> Any:
        """The noise scale, in micro-batches or, given the examples of one, in examples; NaN where |G|^2 is not above 0."""
        signal, trace = np.asarray(self.signal, np.float64), np.asarray(self.trace, np.float64)
        return np.divide(examples * trace, signal, out=np.full_like(signal, np.nan), where=signal > 0)[()]
