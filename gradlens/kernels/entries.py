"""The numbers that every kernel computes from some entries, in torch operations.

Entries are the last axis of float64 tensors: `[..., L]` in, `[...]` out, by field name. The reference asks for a piece of a
tensor at a time, `batched` for many pieces, one a row.

    sums, counts   run over the finite entries; numel, nan and inf count the others too
    pairs (w.g)    run over the places where both entries are finite; dw = after - before must be finite as well
    order          of the largest: by falling |g|, equal ones by rising index

So a row that is padded with NaN has the numbers of its entries, except for the counts of `PADDED`. An extreme over nothing
is +-inf until it is `closed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradlens import fields

Numbers = dict[str, Tensor]  #: float64, by field name

HISTOGRAM = "histogram"  #: `[..., 2 * fields.BUCKETS]`, among the numbers of a gradient
COUNTED_ZERO = "counted zero"  #: zeros among the entries that the histogram counts
GRADIENT = [field.name for field in fields.COUNTS + fields.MOMENTS] + [HISTOGRAM, COUNTED_ZERO]
WEIGHTS = [field.name for field in fields.WEIGHTS]
FLIPS = [field.name for field in fields.FLIPS]
MOTION = ["update_numel", "update_square_sum", "update_before_square_sum", "update_nonfinite"]
USED = ["update_used_square_sum", "update_dot", "update_moving", "update_against", "update_stuck"]
LOSS = ["update_loss_dot"]
PADDED = ("nan", "weight_nonfinite", "update_nonfinite")  #: counts that take the NaN of a padding for entries

_MERGE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}
_NEUTRAL = {"sum": 0.0, "min": torch.inf, "max": -torch.inf}


def summary(g: Tensor, w: Tensor | None, p: Tensor | None, counted: Tensor | bool = True) -> Numbers:
    """Of a gradient, with its weights and the previous gradient where there are some.

    `counted`: the entries that the histogram counts.
    """
    numbers = gradient(g, counted)
    if w is not None:
        numbers |= weights(w) | {"dot": _sum(g * w, torch.isfinite(g) & torch.isfinite(w))}
    return numbers if p is None else numbers | _flips(g, p)


def update(used: Tensor | None, before: Tensor, after: Tensor, loss: Tensor | None) -> Numbers:
    """Of an update, with the gradient that the optimizer used and that of the loss where there are some."""
    dw = after - before
    finite = torch.isfinite(dw)
    numbers = {
        "update_numel": torch.full_like(dw[..., 0], dw.shape[-1]),
        "update_square_sum": _sum(dw * dw, finite),
        "update_before_square_sum": _sum(before * before, finite),
        "update_nonfinite": _count(~torch.isfinite(after)),
    }
    if used is not None:
        numbers |= _used(used, dw, finite & torch.isfinite(used))
    if loss is not None:
        numbers["update_loss_dot"] = _sum(loss * dw, finite & torch.isfinite(loss))
    return numbers


def gradient(g: Tensor, counted: Tensor | bool = True) -> Numbers:
    """Of a gradient alone."""
    g = g + 0.0  # -0.0 is 0.0 in every number
    finite, magnitude = torch.isfinite(g), g.abs()
    return {
        "numel": torch.full_like(g[..., 0], g.shape[-1]),
        "positive": _count(finite & (g > 0)),
        "negative": _count(finite & (g < 0)),
        "zero": _count(g == 0),
        "nan": _count(torch.isnan(g)),
        "inf": _count(torch.isinf(g)),
        "sum": _sum(g, finite),
        "abs_sum": _sum(magnitude, finite),
        "square_sum": _sum(g * g, finite),
        "min": _least(g, finite),
        "max": _largest(g, finite),
        "abs_max": _largest(magnitude, finite),
        "abs_min_nonzero": _least(magnitude, finite & (g != 0)),
        HISTOGRAM: _histogram(g, finite & (g != 0) & counted),
        COUNTED_ZERO: _count((g == 0) & counted),
    }


def weights(w: Tensor) -> Numbers:
    """Of weights alone."""
    finite = torch.isfinite(w)
    return {
        "weight_square_sum": _sum(w * w, finite),
        "weight_abs_max": _largest(w.abs(), finite),
        "weight_nonfinite": _count(~finite),
    }


def _flips(g: Tensor, p: Tensor) -> Numbers:
    compared = torch.isfinite(g) & torch.isfinite(p)
    moving = compared & (g != 0) & (p != 0)
    return {
        "flip_compared": _count(compared),
        "flip_moving": _count(moving),
        "flip_count": _count(moving & ((g < 0) != (p < 0))),
        "flip_dot": _sum(g * p, compared),
        "flip_square_sum": _sum(g * g, compared),
        "flip_previous_square_sum": _sum(p * p, compared),
    }


def _used(g: Tensor, dw: Tensor, finite: Tensor) -> Numbers:
    moving = finite & (g != 0) & (dw != 0)
    return {
        "update_used_square_sum": _sum(g * g, finite),
        "update_dot": _sum(g * dw, finite),
        "update_moving": _count(moving),
        "update_against": _count(moving & ((g > 0) == (dw > 0))),
        "update_stuck": _count(finite & (g != 0) & (dw == 0)),
    }


def _sum(terms: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, terms, 0.0).sum(-1)


def _count(where: Tensor) -> Tensor:
    return where.sum(-1).to(torch.float64)


def _least(terms: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, terms, torch.inf).amin(-1)


def _largest(terms: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, terms, -torch.inf).amax(-1)


def _histogram(g: Tensor, where: Tensor) -> Tensor:
    """Counts by exponent, negative ones first. The exponent is read off the bits of a float64, so it is exact."""
    exponent = ((g.view(torch.int64) >> 52) & 0x7FF) - 1023
    bucket = exponent.clamp(fields.EXPONENT_MIN, fields.EXPONENT_MAX) - fields.EXPONENT_MIN
    bucket = torch.where(where, bucket + fields.BUCKETS * (g > 0), 2 * fields.BUCKETS)  # the last one is thrown away
    counts = torch.zeros(*g.shape[:-1], 2 * fields.BUCKETS + 1, dtype=torch.int64, device=g.device)
    return counts.scatter_add_(-1, bucket, torch.ones_like(bucket))[..., :-1].to(torch.float64)


def stride(entries: int, contiguous: bool, detail: bool) -> int:
    """How many cache lines make one stratum of the sample behind the quantiles; 1 where every entry counts."""
    lines = -(-entries // fields.LINE)
    return 1 if detail or not contiguous or entries <= fields.LARGE else -(-lines // fields.STRATA)


def sampled(start: Tensor | int, length: int, stride: Tensor | int, device: torch.device) -> Tensor:
    """Which of `length` entries from `start` on are in the sample: a line a stratum.

    Which of a stratum's lines that is looks random, so that no pattern of the tensor goes with it.
    """
    line = torch.div(start + torch.arange(length, device=device), fields.LINE, rounding_mode="floor")
    stratum = torch.div(line, stride, rounding_mode="floor")
    return line == stratum * stride + (((stratum * 2654435761) & 0xFFFFFFFF) >> 8) % stride


def quantiles(numbers: Numbers) -> Tensor:
    """`[..., len(fields.QUANTILES)]`, as `fields.quantiles`, from the histogram."""
    histogram, zero = numbers[HISTOGRAM], numbers[COUNTED_ZERO][..., None]
    counts = torch.cat([histogram[..., : fields.BUCKETS].flip(-1), zero, histogram[..., fields.BUCKETS :]], -1)
    cumulated = counts.cumsum(-1)
    powers = 2.0 ** torch.arange(fields.EXPONENT_MIN, fields.EXPONENT_MAX + 2, dtype=torch.float64, device=counts.device)
    low = torch.cat([-powers[1:].flip(0), powers.new_zeros(1), powers[:-1]])
    width = torch.cat([powers[:-1].flip(0), powers.new_zeros(1), powers[:-1]])
    total = cumulated[..., -1:]
    shares = torch.stack([powers.new_full((), q) for q in fields.QUANTILES.values()])  # a list's copy would be waited for
    rank = torch.floor(shares * (total - 1).clamp(min=0))
    at = (cumulated[..., None, :] <= rank[..., None]).sum(-1).clamp(max=counts.shape[-1] - 1)
    after, inside = cumulated.gather(-1, at), counts.gather(-1, at)
    share = (rank - (after - inside) + 0.5) / inside
    value = low.take(at) + share * width.take(at)
    value = torch.minimum(torch.maximum(value, numbers["min"][..., None]), numbers["max"][..., None])
    return torch.where(total > 0, value, torch.nan)


def row(numbers: Numbers, top: Tensor, detail: bool) -> Tensor:
    """Rows of `fields`, from the numbers of tensors and their largest entries."""
    parts = [closed(numbers, fields.SUMMARY), quantiles(numbers), *top[1:]]
    return torch.cat([*parts, numbers[HISTOGRAM]] if detail else parts, -1)


# --- how they merge ---------------------------------------------------------------------------------------------------


def rule(name: str) -> str:
    """How numbers of pieces become that of the whole: `sum`, `min` or `max`."""
    return "sum" if name in (HISTOGRAM, COUNTED_ZERO) else fields.BY_NAME[name].merge


def identity(names: Sequence[str], device: torch.device, *rows: int) -> Numbers:
    """The numbers of no entries, `[*rows]`: merged with others they change nothing."""
    shapes = {name: (*rows, 2 * fields.BUCKETS) if name == HISTOGRAM else rows for name in names}
    return {
        name: torch.full(shape, _NEUTRAL[rule(name)], dtype=torch.float64, device=device) for name, shape in shapes.items()
    }


def merge(numbers: Numbers, more: Numbers) -> None:
    """Merge with the numbers of other entries of the same tensors."""
    for name, value in more.items():
        numbers[name] = _MERGE[rule(name)](numbers[name], value)


def closed(numbers: Numbers, columns: Sequence[fields.Field]) -> Tensor:
    """Rows of the columns. A count not taken is 0; a value not taken, or an extreme of no entries, is NaN."""
    like = next(iter(numbers.values()))
    row = []
    for field in columns:
        value = numbers.get(field.name)
        if value is None:
            value = torch.full_like(like, 0.0 if field.dtype == "int64" else torch.nan)
        elif field.merge != "sum":
            value = torch.where(torch.isfinite(value), value, torch.nan)
        row.append(value)
    return torch.stack(row, -1)


# --- the largest ------------------------------------------------------------------------------------------------------

# Candidates are `[4, ..., m]`: |g|, g, index, w. Room that is not filled has |g| = -1 and index -1.


def nobody(device: torch.device, *rows: int) -> Tensor:
    """Room for the largest, `[4, *rows, TOP]`."""
    nothing = torch.full((4, *rows, fields.TOP), torch.nan, dtype=torch.float64, device=device)
    nothing[::2] = -1.0
    return nothing


def largest(g: Tensor, w: Tensor | None, start: Tensor | int) -> Tensor:
    """The largest of entries of which the first has index `start`: at most `TOP`, and of equal ones the first."""
    length = g.shape[-1]
    count = min(fields.TOP, length)
    magnitude = torch.where(torch.isfinite(g), g.abs(), -1.0)
    last = torch.topk(magnitude, count).values[..., -1:]
    at = torch.arange(length, device=g.device, dtype=torch.int64)
    rank = torch.where(magnitude > last, -1, torch.where(magnitude == last, at, length))
    at = torch.topk(rank, count, largest=False).indices
    g = g.gather(-1, at)
    return candidates(g, at + start, torch.full_like(g, torch.nan) if w is None else w.gather(-1, at))


def candidates(g: Tensor, index: Tensor, w: Tensor) -> Tensor:
    """Entries at the given indices as candidates for the largest; those that are not finite never win."""
    nothing = torch.arange(4, device=g.device).view(4, *(1 for _ in g.shape)) % 2 == 0
    matrix = torch.stack([g.abs(), g + 0.0, index.to(torch.float64), w])
    return torch.where(torch.isfinite(g), matrix, torch.where(nothing, -1.0, torch.nan))


def best(lot: Tensor) -> Tensor:
    """The first `TOP` of at least so many candidates, `[4, m]`."""
    lot = lot[:, torch.argsort(lot[2], stable=True)]
    return lot[:, torch.argsort(lot[0], stable=True, descending=True)[: fields.TOP]]
