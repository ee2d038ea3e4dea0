"""Evidence for the direction of each weight: how its partials vary over gradients, and what follows from that.

Two situations, which must not be mixed:

- *At fixed weights* (the batches of a survey, the micro-batches of one step) the partials of a weight are repeated
  measurements of one expected partial. `Moments` keeps their mean and spread (Welford 1962, West 1979), and `judge` tests
  each mean against 0: verdicts with t, p and q.
- *Over steps* the weights move, and with them what is measured. `Evidence` then gives only descriptions, exponentially
  decayed: how often the sign agreed, how often it flipped, and the gradient's signal-to-noise ratio, mean^2 / variance
  (Liu et al. 2020). No p, no q, no verdict.

All sums are float64. Nothing here waits for the device; reading does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradlens.errors import ArgumentError, choice
from gradlens.records import Verdict
from gradlens.statistics.significance import METHODS, p_values, q_values

VERDICTS = (Verdict.UNDECIDED.value, Verdict.INCREASE.value, Verdict.DECREASE.value)  #: words of `Judged.verdict`
#: Words of `Judged.reason`: nothing to add; no variance, so the sign is certain; and why a weight is undecided.
REASONS = ("", "constant", "weak", "sparse", "always_zero", "nonfinite")
CONSTANT, WEAK, SPARSE, ALWAYS_ZERO, NONFINITE = range(1, 6)
SEEN = 5  #: non-zero gradients that a t test wants at least; all of them where there are fewer


class Moments:
    """Mean, squared deviations and signs of each weight's partials over gradients at the same weights.

    `like`: one real tensor a parameter, for sizes and devices. `indices`: the flat entries to keep of each, None for all.
    """

    BYTES = 24  #: a weight: mean, squared deviations, two counts

    def __init__(self, like: Sequence[Tensor], indices: Sequence[Tensor | None] | None = None) -> None:
        self.indices = list(indices) if indices is not None else [None] * len(like)
        sizes = [tensor.numel() if at is None else at.numel() for tensor, at in zip(like, self.indices, strict=True)]
        on = [tensor.device for tensor in like]
        self.mean, self.squares = (
            [torch.zeros(n, dtype=torch.float64, device=d) for n, d in zip(sizes, on, strict=True)] for _ in range(2)
        )
        self.positive, self.negative = (
            [torch.zeros(n, dtype=torch.int32, device=d) for n, d in zip(sizes, on, strict=True)] for _ in range(2)
        )
        self.count = 0
        self.weight = 0.0

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor | None], weight: float = 1.0) -> None:
        """Add one gradient: a tensor a parameter, None for zeros. `weight`: the size of its batch, where they differ."""
        self.count += 1
        self.weight += weight
        for i, gradient in enumerate(gradients):
            self._add(i, None if gradient is None else flat(gradient, self.indices[i]), weight)

    def _add(self, i: int, g: Tensor | None, weight: float) -> None:
        mean = self.mean[i]
        step = -mean if g is None else g - mean
        mean += step * (weight / self.weight)
        self.squares[i] += weight * step * ((-mean) if g is None else (g - mean))
        if g is not None:
            self.positive[i] += g > 0
            self.negative[i] += g < 0

    def clear(self) -> None:
        """Forget everything."""
        for tensors in (self.mean, self.squares, self.positive, self.negative):
            for tensor in tensors:
                tensor.zero_()
        self.count, self.weight = 0, 0.0


def flat(gradient: Tensor, index: Tensor | None = None) -> Tensor:
    """A gradient as float64, one dimension, row-major; a complex one as two reals an entry."""
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    gradient = gradient.reshape(-1)
    return (gradient if index is None else gradient[index]).double()


@dataclass(frozen=True, eq=False)
class Judged:
    """What a test of each weight says, one entry a weight, parameters one after another, on the host."""

    mean: np.ndarray
    t: np.ndarray  #: +-inf where the partial never varied, NaN where nothing was tested
    p: np.ndarray
    q: np.ndarray
    agree: np.ndarray  #: of the gradients where the partial was not 0, the share with the sign of the mean
    verdict: np.ndarray  #: int8, into VERDICTS
    reason: np.ndarray  #: int8, into REASONS

    def __len__(self) -> int:
        return len(self.mean)


def judge(moments: Moments, q: float = 0.1, method: str = "bh") -> Judged:
    """Test each weight's mean against 0 with K - 1 degrees of freedom, and keep what false discovery control at q lets pass.

    Gradients of unequal weight n are taken to vary with 1 / n: then t is exact for normal noise. Not tested, and not counted
    among the tests: weights whose partial was always 0, not 0 fewer than five times (fewer than K times if K < 5), ever not
    finite, or constant (those keep their sign).
    """
    check_level(q, method)
    if moments.count < 2:
        raise ArgumentError(f"a verdict needs at least 2 gradients at the same weights, not {moments.count}")
    t, p, reason = (torch.cat(parts) for parts in zip(*(_test(moments, i) for i in range(len(moments.mean))), strict=True))
    adjusted = p.clone()
    tested = reason == 0
    adjusted[tested] = q_values(p[tested], method)
    kept = adjusted <= q  # NaN is not
    reason[tested & ~kept] = WEAK
    mean, positive, negative = (_host(x) for x in (moments.mean, moments.positive, moments.negative))
    verdict = torch.where(kept, torch.where(mean < 0, 1, 2), 0).to(torch.int8)
    agree = torch.where(mean > 0, positive, torch.where(mean < 0, negative, 0)).double() / (positive + negative)
    return Judged(*(x.numpy() for x in (mean, t, p, adjusted, agree, verdict, reason)))


def check_level(q: float, method: str) -> None:
    """Raise for a level of control that is none, or an unknown method."""
    if not isinstance(q, int | float) or not 0 < q < 1:
        raise ArgumentError(f"q is the share of wrong verdicts to allow among those kept, between 0 and 1, not {q!r}")
    if method not in METHODS:
        raise choice("method", method, METHODS)


def _test(moments: Moments, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """t, p and what is known of the reason, for one parameter."""
    mean, squares, k = moments.mean[i], moments.squares[i], moments.count
    seen = moments.positive[i] + moments.negative[i]
    finite = mean.isfinite() & squares.isfinite()
    t = mean / (squares / (k - 1) / moments.weight).sqrt()
    p = p_values(t, k - 1)
    reason = torch.zeros_like(seen, dtype=torch.int8)
    reason[(squares == 0) & (mean != 0)] = CONSTANT
    reason[seen < min(SEEN, k)] = SPARSE
    reason[seen == 0] = ALWAYS_ZERO
    reason[~finite] = NONFINITE
    untested = reason > CONSTANT
    return t.masked_fill(untested, math.nan).cpu(), p.masked_fill(untested, math.nan).cpu(), reason.cpu()


def _host(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.cpu() for part in parts])


@dataclass(frozen=True, eq=False)
class OverTime:
    """How the step gradients of one parameter's weights behaved while they moved; no tests, since it is no sample."""

    agree: np.ndarray  #: of the steps where the partial was not 0, the share with the more frequent sign; NaN: none
    flips: np.ndarray  #: of the steps where the partial was not 0, the share whose sign differs from the last such step
    gsnr: np.ndarray  #: mean^2 / variance


class Evidence:
    """The accumulator of the feature `evidence`: `update` for each backward of a step, `step_done` when it ends.

    Verdicts rest on the backwards of the last step, `over_time` on the steps, a step's weight falling by `decay` with each
    one after it. A step whose gradient was not finite in a parameter leaves that parameter's record as it was.
    """

    BYTES = Moments.BYTES + 33  #: a weight: two float64, four float32 and one int8 more

    def __init__(
        self, like: Sequence[Tensor], indices: Sequence[Tensor | None] | None = None, *, decay: float = 0.98
    ) -> None:
        if not 0 < decay < 1:
            raise ArgumentError(f"decay is the weight of a step against the one after it, between 0 and 1, not {decay!r}")
        self.decay = decay
        self.moments = Moments(like, indices)
        self._ended = False
        self._steps = [_Decayed(mean) for mean in self.moments.mean]

    def update(self, gradients: Sequence[Tensor | None]) -> None:
        """Add the own partials of one backward; None stands for zeros."""
        if self._ended:
            self.moments.clear()
            self._ended = False
        self.moments.update(gradients)

    def step_done(self) -> None:
        """The step is over: fold its mean gradient into the record over time. Verdicts of it can be read until the next."""
        if self._ended or not self.moments.count:
            return
        self._ended = True
        for steps, mean in zip(self._steps, self.moments.mean, strict=True):
            steps.fold(mean, self.decay)

    def verdicts(self, q: float = 0.1, method: str = "bh") -> Judged | None:
        """Verdicts over the backwards of the last step; None where it had fewer than two."""
        return judge(self.moments, q, method) if self.moments.count > 1 else None

    def over_time(self, parameter: int) -> OverTime:
        """The record over steps of one parameter's weights."""
        return self._steps[parameter].read()


class _Decayed:
    """Exponentially decayed sums over steps, for the weights of one parameter."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)
        self.sign, self.seen, self.flips, self.moving = (torch.zeros_like(like, dtype=torch.float32) for _ in range(4))
        self.last = torch.zeros_like(like, dtype=torch.int8)
        self.weight = torch.zeros((), dtype=torch.float64, device=like.device)

    @torch.no_grad()
    def fold(self, g: Tensor, decay: float) -> None:
        finite = g.isfinite().all()  # on the device: nobody waits for it
        add = (1 - decay) * finite.double()
        keep = 1 - add
        g = g.masked_fill(~finite, 0)
        sign = g.sign().to(torch.int8)
        both = (sign * self.last) != 0
        for total, new in (
            (self.mean, g),
            (self.square, g * g),
            (self.sign, sign),
            (self.seen, sign != 0),
            (self.flips, both & (sign != self.last)),
            (self.moving, both),
            (self.weight, 1.0),
        ):
            total *= keep
            total += add * new
        self.last = torch.where((sign != 0) & finite, sign, self.last)

    def read(self) -> OverTime:
        mean, square = self.mean / self.weight, self.square / self.weight
        agree = (1 + self.sign.double().abs() / self.seen) / 2  # of two shares that add up to 1 and differ by |sign| / seen
        flips = self.flips.double() / self.moving
        gsnr = mean**2 / (square - mean**2).clamp(min=0)
        return OverTime(*(x.cpu().numpy() for x in (agree, flips, gsnr)))
