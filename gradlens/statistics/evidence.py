"""Evidence for the direction of each weight: how its partials vary over gradients, and what follows from that.

Two situations, which must not be mixed:

- *At fixed weights* (the batches of a survey, the micro-batches of one step) the partials of a weight are repeated
  measurements of one expected partial. `Moments` keeps their mean and spread (Welford 1962, West 1979), and `test_means`
  tests each mean against 0: verdicts with t, p and q.
- *Over steps* the weights move, and with them what is measured. `Evidence` then gives only descriptions, exponentially
  decayed: how often the sign agreed, how often it flipped, and the gradient's signal-to-noise ratio, mean^2 / variance
  (Liu et al. 2020). No p, no q, no verdict.

All sums are float64. Nothing here waits for the device; reading does. On the CPU the native kernel adds in one pass, on
a GPU one launch of a Triton program a type; the torch operations here say what they do, and stand in for them elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gradlens import kernels
from gradlens.errors import ArgumentError, choice
from gradlens.records import Verdict
from gradlens.statistics.significance import METHODS, p_values, q_values

VERDICTS = (Verdict.UNDECIDED.value, Verdict.INCREASE.value, Verdict.DECREASE.value)  #: words of `TestResults.verdict`
#: Words of `TestResults.reason`: nothing to add; no variance, so the sign is certain; and why a weight is undecided.
REASONS = ("", "constant", "weak", "sparse", "always_zero", "nonfinite")
CONSTANT, WEAK, SPARSE, ALWAYS_ZERO, NONFINITE = range(1, 6)
SEEN = 5  #: non-zero gradients that a t test wants at least; all of them where there are fewer


BLOCK = 1 << 20  #: entries of small parameters that are worked on together: an operation costs microseconds by itself
#: Entries that are worked on at once, which bounds the temporaries: on one core 16 ns a weight (1 MiB stays in the cache; 66
#: ns with 8 million at once), elsewhere a few launches for the largest parameters.
CHUNK, CHUNK_ELSEWHERE = 1 << 17, 1 << 22


class Moments:
    """Mean, squared deviations and signs of each weight's partials over gradients at the same weights.

    `like`: one real tensor a parameter, for sizes and devices. `indices`: the flat entries to keep of each, None for all.
    Parameters lie one after another in blocks; `mean`, `squares`, `positive` and `negative` have one tensor a block.
    """

    BYTES = 24  #: a weight: mean, squared deviations, two counts

    def __init__(self, like: Sequence[Tensor], indices: Sequence[Tensor | None] | None = None) -> None:
        self.indices = list(indices) if indices is not None else [None] * len(like)
        self.sizes = [tensor.numel() if at is None else at.numel() for tensor, at in zip(like, self.indices, strict=True)]
        self.blocks = _blocks(self.sizes, [tensor.device for tensor in like])
        lengths = [(sum(self.sizes[block]), like[block.start].device) for block in self.blocks]
        self.mean, self.squares = ([torch.zeros(n, dtype=torch.float64, device=d) for n, d in lengths] for _ in range(2))
        self.positive, self.negative = ([torch.zeros(n, dtype=torch.int32, device=d) for n, d in lengths] for _ in range(2))
        self.count = 0
        self.weight = self._latest = 0.0

    def update(self, gradients: Sequence[Tensor | None], weight: float = 1.0) -> None:
        """Add one gradient: a tensor a parameter, None for zeros. `weight`: the size of its batch, where they differ."""
        self.begin(weight)
        self.add(dict(enumerate(gradients)))

    def begin(self, weight: float = 1.0) -> None:
        """Start one more gradient, which `add` gives in parts: each parameter in exactly one of them."""
        self.count += 1
        self.weight += weight
        self._latest = weight

    @torch.no_grad()
    def add(self, part: Mapping[int, Tensor | None], divisor: float | Tensor = 1.0) -> None:
        """Some parameters' partials of the gradient that `begin` started, still to be divided by `divisor`."""
        if self.mean and kernels.changes_together(self.mean[0]):
            part = self._add_together(part, divisor)
        for i, block in enumerate(self.blocks):
            members = [n for n in range(block.start, block.stop) if n in part]
            if len(members) == block.stop - block.start:
                self._add(i, 0, self._joined([part[n] for n in members], block, self.mean[i]), divisor)
                continue
            for n in members:
                of = slice(n, n + 1)
                self._add(i, self.place(n)[1].start, self._joined([part[n]], of, self.mean[i]), divisor)

    def _add_together(self, part: Mapping[int, Tensor | None], divisor: float | Tensor) -> dict[int, Tensor | None]:
        """Add the partials of all parameters at once; gives those that are still to be added."""
        members, gradients, kept = [], [], []
        for i, block in enumerate(self.blocks):
            first = 0
            for n in range(block.start, block.stop):
                if n in part:
                    members.append(n)
                    gradients.append(self._joined([part[n]], slice(n, n + 1), self.mean[i]))
                    kept.append([tensors[i][first : first + self.sizes[n]] for tensors in self._parts()])
                first += self.sizes[n]
        left = kernels.add_all_moments(gradients, kept, divisor, self._latest / self.weight, self._latest)
        return {members[i]: part[members[i]] for i in left}

    def _add(self, i: int, first: int, gradient: Tensor, divisor: float | Tensor) -> None:
        """The entries of a block from `first` on."""
        stop, share = first + gradient.numel(), self._latest / self.weight
        kept = [tensors[i][first:stop] for tensors in self._parts()]
        if kernels.add_moments(gradient, kept, divisor, share, self._latest):
            return
        for part in chunks(gradient):
            g, at = gradient[part].double(), slice(first + part.start, first + part.stop)
            if isinstance(divisor, Tensor) or divisor != 1.0:
                g = g / divisor
            mean = self.mean[i][at]
            step = g - mean
            mean.add_(step, alpha=share)
            self.squares[i][at].addcmul_(step, g - mean, value=self._latest)
            self.positive[i][at] += g > 0
            self.negative[i][at] += g < 0

    def leave_out(self, parameter: int) -> None:
        """Drop the evidence on this parameter until `clear`, as after a partial that is not finite."""
        block, entries = self.place(parameter)
        self.mean[block][entries] = math.nan

    def grow(self, like: Sequence[Tensor]) -> None:
        """Add parameters. Their partials so far count as 0."""
        more = Moments(like)
        shift = len(self.sizes)
        self.indices += more.indices
        self.sizes += more.sizes
        self.blocks += [slice(block.start + shift, block.stop + shift) for block in more.blocks]
        for mine, theirs in zip(self._parts(), more._parts(), strict=True):
            mine += theirs

    def _parts(self) -> tuple[list[Tensor], ...]:
        return self.mean, self.squares, self.positive, self.negative

    def _joined(self, gradients: Sequence[Tensor | None], block: slice, like: Tensor) -> Tensor:
        """The gradients of a block as one tensor, in their own type; it may be a view of the gradient itself."""
        of = zip(gradients, self.indices[block], self.sizes[block], strict=True)
        parts = [like.new_zeros(1).expand(n) if g is None else reals(g, at) for g, at, n in of]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def place(self, parameter: int) -> tuple[int, slice]:
        """Where the weights of one parameter lie: the block, and the entries in it."""
        block = next(i for i, block in enumerate(self.blocks) if parameter < block.stop)
        start = sum(self.sizes[self.blocks[block].start : parameter])
        return block, slice(start, start + self.sizes[parameter])

    def clear(self) -> None:
        """Forget everything."""
        for tensors in self._parts():
            for tensor in tensors:
                tensor.zero_()
        self.count, self.weight = 0, 0.0


def _blocks(sizes: Sequence[int], devices: Sequence[torch.device]) -> list[slice]:
    """Ranges of parameters that follow each other on one device and fit into a block together."""
    blocks: list[slice] = []
    length = 0
    for i, size in enumerate(sizes):
        if blocks and devices[i] == devices[i - 1] and length + size <= BLOCK:
            blocks[-1] = slice(blocks[-1].start, i + 1)
            length += size
        else:
            blocks.append(slice(i, i + 1))
            length = size
    return blocks


def chunks(tensor: Tensor) -> Iterator[slice]:
    """Ranges of entries, each small enough to work on at once."""
    size = CHUNK if tensor.device.type == "cpu" else CHUNK_ELSEWHERE
    for start in range(0, tensor.numel(), size):
        yield slice(start, min(start + size, tensor.numel()))


def reals(gradient: Tensor, index: Tensor | None = None) -> Tensor:
    """A gradient in one dimension, row-major; a complex one as two reals an entry."""
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    gradient = gradient.reshape(-1)
    return gradient if index is None else gradient[index]


def flat(gradient: Tensor, index: Tensor | None = None) -> Tensor:
    """As `reals`, in float64."""
    return reals(gradient, index).double()


@dataclass(frozen=True, eq=False)
class TestResults:
    """What a test of each weight says, one entry a weight, parameters one after another, on the host."""

    __test__: ClassVar[bool] = False  #: pytest, this is no test class
    mean: np.ndarray
    t: np.ndarray  #: +-inf where the partial never varied, NaN where nothing was tested
    p: np.ndarray
    q: np.ndarray
    agree: np.ndarray  #: of the gradients where the partial was not 0, the share with the sign of the mean
    verdict: np.ndarray  #: int8, into VERDICTS
    reason: np.ndarray  #: int8, into REASONS

    def __len__(self) -> int:
        return len(self.mean)


def test_means(
    moments: Moments,
    q: float = 0.1,  # noqa: PT028 - no pytest function
    method: str = "bh",  # noqa: PT028
    constant_p: float | None = None,  # noqa: PT028
) -> TestResults:
    """Test each weight's mean against 0 with K - 1 degrees of freedom, and keep what false discovery control at q lets pass.

    Gradients of unequal weight n are taken to vary with 1 / n: then t is exact for normal noise. Not tested, and not counted
    among the tests: weights whose partial was always 0, not 0 fewer than five times (fewer than K times if K < 5), ever not
    finite, or constant (those keep their sign; with `constant_p` they take part with that p value).
    """
    check_level(q, method)
    if moments.count < 2:
        raise ArgumentError(f"a verdict needs at least 2 gradients at the same weights, not {moments.count}")
    t, p, reason = (torch.cat(parts) for parts in zip(*(_test(moments, i) for i in range(len(moments.mean))), strict=True))
    if constant_p is not None:
        p = p.masked_fill(reason == CONSTANT, constant_p)
    adjusted = p.clone()
    tested = reason == 0 if constant_p is None else reason <= CONSTANT
    adjusted[tested] = q_values(p[tested], method)
    kept = adjusted <= q  # NaN is not
    reason[tested & ~kept & (reason == 0)] = WEAK
    mean, positive, negative = (_host(x) for x in (moments.mean, moments.positive, moments.negative))
    verdict = torch.where(kept, torch.where(mean < 0, 1, 2), 0).to(torch.int8)
    agree = torch.where(mean > 0, positive, torch.where(mean < 0, negative, 0)).double() / (positive + negative)
    return TestResults(*(x.numpy() for x in (mean, t, p, adjusted, agree, verdict, reason)))


test_means.__test__ = False  # type: ignore[attr-defined]  # pytest, this is no test


def check_level(q: float, method: str) -> None:
    """Raise if `q` is not between 0 and 1, or the method is unknown."""
    if not isinstance(q, Real) or not 0 < q < 1:
        raise ArgumentError(f"q is the share of wrong verdicts to allow among those kept, between 0 and 1, not {q!r}")
    if method not in METHODS:
        raise choice("method", method, METHODS)


def _test(moments: Moments, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """t, p and what is known of the reason, for one parameter."""
    mean, squares, k = moments.mean[i], moments.squares[i], moments.count
    seen = moments.positive[i] + moments.negative[i]
    finite = mean.isfinite() & squares.isfinite()
    t = mean / (squares / (k - 1) / moments.weight).sqrt()
    reason = torch.zeros_like(seen, dtype=torch.int8)
    reason[(squares == 0) & (mean != 0)] = CONSTANT
    reason[seen < min(SEEN, k)] = SPARSE
    reason[seen == 0] = ALWAYS_ZERO
    reason[~finite] = NONFINITE
    untested = reason > CONSTANT
    p = p_values(t, k - 1) if not untested.any() else t.masked_scatter(~untested, p_values(t[~untested], k - 1))
    return t.masked_fill(untested, math.nan).cpu(), p.masked_fill(untested, math.nan).cpu(), reason.cpu()


def _host(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.cpu() for part in parts])


@dataclass(frozen=True, eq=False)
class OverTime:
    """How the step gradients of one parameter's weights behaved while they moved; no tests, since it is no sample."""

    agree: np.ndarray  #: of the steps where the partial was not 0, the share with the more frequent sign; NaN: none
    flips: np.ndarray  #: of the steps where the partial was not 0, the share whose sign differs from the last such step
    gsnr: np.ndarray  #: mean^2 / variance; NaN before the second step


class Evidence:
    """The accumulator of the feature `evidence`: `update` for each backward of a step, `step_done` when it ends.

    Verdicts rest on the backwards of the last step, `over_time` on the steps, a step's weight falling by `decay` with each
    one after it. A partial that was not finite leaves that weight's record over time as it was.
    """

    BYTES = Moments.BYTES + 37  #: a weight: two float64, four float32, one int32 and one int8 more

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
        self.begin()
        self.moments.add(dict(enumerate(gradients)))

    def begin(self) -> None:
        """One more backward, whose partials `moments.add` takes."""
        if self._ended:
            self.clear()
        self.moments.begin()

    def clear(self) -> None:
        """Forget the open step."""
        self.moments.clear()
        self._ended = False

    def grow(self, like: Sequence[Tensor]) -> None:
        """Add parameters, as `Moments.grow`."""
        self.moments.grow(like)
        self._steps += [_Decayed(mean) for mean in self.moments.mean[len(self._steps) :]]

    def step_done(self) -> None:
        """The step is over: fold its mean gradient into the record over time. Verdicts of it can be read until the next."""
        if self._ended or not self.moments.count:
            return
        self._ended = True
        left: Iterable[int] = range(len(self._steps))
        if self._steps and kernels.changes_together(self.moments.mean[0]):
            left = kernels.fold_all_decayed(self.moments.mean, [steps.kept for steps in self._steps], 1 - self.decay)
        for i in left:
            self._steps[i].fold(self.moments.mean[i], 1 - self.decay)

    def verdicts(self, q: float = 0.1, method: str = "bh") -> TestResults | None:
        """Verdicts over the backwards of the last step; None where it had fewer than two."""
        return test_means(self.moments, q, method) if self.moments.count > 1 else None

    def over_time(self, parameter: int) -> OverTime:
        """The record over steps of one parameter's weights."""
        block, entries = self.moments.place(parameter)
        return self._steps[block].read(entries, self.decay)


class _Decayed:
    """Exponentially decayed means over steps, for the weights of one block."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)
        self.sign, self.seen, self.flips, self.moving = (torch.zeros_like(like, dtype=torch.float32) for _ in range(4))
        self.steps = torch.zeros_like(like, dtype=torch.int32)
        self.last = torch.zeros_like(like, dtype=torch.int8)  # the sign of the last partial that was not 0

    @property
    def kept(self) -> list[Tensor]:
        """All of it, in the kernels' order."""
        return [self.mean, self.square, self.sign, self.seen, self.flips, self.moving, self.steps, self.last]

    @torch.no_grad()
    def fold(self, gradient: Tensor, share: float) -> None:
        if kernels.fold_decayed(gradient, self.kept, share):
            return
        for at in chunks(gradient):
            g, last = gradient[at], self.last[at]
            finite = g.isfinite()
            share_of = share * finite.double()
            g = torch.where(finite, g, 0.0)
            sign = g.sign()
            both = sign * last  # 1: the same sign as before, -1: another, 0: one of them is 0
            self.mean[at].lerp_(g, share_of)
            self.square[at].lerp_(g * g, share_of)
            narrow = share_of.float()
            self.sign[at].lerp_(sign.float(), narrow)
            self.seen[at].lerp_(sign.abs().float(), narrow)
            self.flips[at].lerp_((both < 0).float(), narrow)
            self.moving[at].lerp_(both.abs().float(), narrow)
            self.steps[at] += finite
            last.copy_(torch.where(sign != 0, sign.to(torch.int8), last))

    def read(self, entries: slice, decay: float) -> OverTime:
        weight = 1 - decay ** self.steps[entries].double()
        mean, square = self.mean[entries] / weight, self.square[entries] / weight
        # Two shares that add up to 1 and differ by |sign| / seen.
        agree = (1 + self.sign[entries].double().abs() / self.seen[entries]) / 2
        flips = self.flips[entries].double() / self.moving[entries]
        spread = (square - mean**2).clamp(min=0).masked_fill(self.steps[entries] < 2, math.nan)  # one step has none
        gsnr = mean**2 / spread
        return OverTime(*(x.cpu().numpy() for x in (agree, flips, gsnr)))
