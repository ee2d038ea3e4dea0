"""The columns of gradlens, each defined once.

A *row* describes one parameter's gradient by numbers. Kernels write rows, as one float64 matrix `[parameters, WIDTH]`
whose columns are laid out here:

    | SUMMARY: one number a field | QUANTILE: 5 | TOP: partial, index, value of the 16 largest | HISTOGRAM: 2 x 128 counts |

A row *without detail* ends before the histogram. Quantiles come from the histogram of all entries, but without detail, of a
contiguous gradient of more than LARGE entries, from that of an even sample: LINE entries that lie together out of each of at
most STRATA equal stretches, which is at most 16,384 entries.

Everything else is *derived* from those columns by the formulas below, on the host, with numpy alone. Tables, frames, the
store and the docs read this module; none of them defines a column of its own.

Conventions:

- Counts are exact up to 2**53. Moments run over the finite values only; a complex entry counts as two reals.
- NaN means *empty*: nothing to take the value over. It is the identity of the `min` and `max` merges.
- `merge` says how rows of disjoint pieces of one tensor (chunks, shards) become the row of the whole. Copies that *add*
  (micro-batches, replicas) must be added before their rows are taken: no merge rule does that.
- `power` is the power of the loss scale that a value carries: the value for `g / s` is the value for `g` over `s**power`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Columns = Mapping[str, np.ndarray]
Group = Literal["counts", "moments", "weights", "flips", "updates", "shape"]
Merge = Literal["sum", "min", "max"]


@dataclass(frozen=True)
class Field:
    """One column that a kernel writes and the store keeps."""

    name: str
    group: Group
    merge: Merge
    meaning: str
    dtype: str = "float64"
    power: int = 0
    shown: bool = True  #: whether frames have it; the others are the raw material of derived columns


@dataclass(frozen=True)
class Derived:
    """One column that is computed from others, on reading."""

    name: str
    group: Group
    meaning: str
    formula: Callable[[Columns], np.ndarray]
    dtype: str = "float64"
    power: int = 0


def _count(name: str, meaning: str, group: Group = "counts", shown: bool = True) -> Field:
    return Field(name, group, "sum", meaning, dtype="int64", shown=shown)


COUNTS = (
    _count("numel", "entries of the gradient"),
    _count("positive", "finite partials above 0: raising the weight raises the loss"),
    _count("negative", "finite partials below 0: raising the weight lowers the loss"),
    _count("zero", "partials equal to 0, of either sign bit"),
    _count("nan", "partials that are NaN"),
    _count("inf", "partials that are +inf or -inf"),
)

MOMENTS = (
    Field("sum", "moments", "sum", "sum of g", power=1),
    Field("abs_sum", "moments", "sum", "sum of |g|", power=1),
    Field("square_sum", "moments", "sum", "sum of g^2", power=2),
    Field("min", "moments", "min", "smallest g", power=1),
    Field("max", "moments", "max", "largest g", power=1),
    Field("abs_max", "moments", "max", "largest |g|", power=1),
    Field("abs_min_nonzero", "moments", "min", "smallest |g| that is not 0", power=1),
)

#: Over finite weights, `dot` over entries whose partial is finite too; empty when the kernel was given no weights.
WEIGHTS = (
    Field("weight_square_sum", "weights", "sum", "sum of w^2, w finite", shown=False),
    Field("weight_abs_max", "weights", "max", "largest finite |w|"),
    Field("dot", "weights", "sum", "w.g: how the loss answers to scaling the parameter", power=1),
    _count("weight_nonfinite", "weights that are NaN or infinite", "weights"),
)

#: Against the last observed gradient of the same stage, over entries where both are finite (of the sample, if sampled).
FLIPS = (
    _count("flip_compared", "entries compared with the last gradient", "flips", shown=False),
    _count("flip_moving", "of these, entries where neither is 0", "flips", shown=False),
    _count("flip_count", "of these, entries whose sign changed", "flips", shown=False),
    Field("flip_dot", "flips", "sum", "g.previous", shown=False),
    Field("flip_square_sum", "flips", "sum", "sum of g^2 over the entries compared", shown=False),
    Field("flip_previous_square_sum", "flips", "sum", "sum of previous^2 over the entries compared", shown=False),
)

SUMMARY = COUNTS + MOMENTS + WEIGHTS + FLIPS  #: what `kernels.summarize` writes, in this order

#: From the weights before and after the optimizer's step and the gradient it used, over finite entries (of the sample).
UPDATES = (
    _count("update_numel", "entries of the update looked at", "updates", shown=False),
    Field("update_square_sum", "updates", "sum", "sum of dw^2", shown=False),
    Field("update_before_square_sum", "updates", "sum", "sum of w^2 before the step", shown=False),
    Field("update_used_square_sum", "updates", "sum", "sum of g_used^2", shown=False),
    Field("update_dot", "updates", "sum", "g_used.dw", shown=False),
    _count("update_moving", "entries with g_used * dw not 0", "updates", shown=False),
    _count("update_against", "of these, entries that moved up their own gradient", "updates", shown=False),
    _count("update_stuck", "entries with g_used not 0 and dw exactly 0", "updates", shown=False),
    _count("update_nonfinite", "weights that are NaN or infinite after the step", "updates"),
    Field("update_loss_dot", "updates", "sum", "g.dw, g the unscaled and unclipped gradient of the loss", shown=False),
    Field("update_loss_exact", "updates", "min", "1 where update_loss_dot rests on that gradient itself", shown=False),
)

SCALARS: tuple[Field, ...] = SUMMARY + UPDATES  #: every stored scalar, in storage order
BY_NAME: dict[str, Field] = {field.name: field for field in SCALARS}

# --- the layout of a row --------------------------------------------------------------------------------------------

#: Buckets are base-2 exponents: bucket `e` of a sign counts 2**e <= |g| < 2**(e + 1). The range is the same for every
#: parameter and step, so histograms add and compare. What lies below or above falls into the first or last bucket.
EXPONENT_MIN, EXPONENT_MAX = -96, 31
BUCKETS = EXPONENT_MAX - EXPONENT_MIN + 1  # of each sign: 128
POWERS = np.ldexp(1.0, np.arange(EXPONENT_MIN, EXPONENT_MAX + 2))  #: the bounds of the buckets of one sign, rising
TOP = 16  #: weights kept of each parameter, by sensitivity
QUANTILES: dict[str, float] = {f"quantile_{round(100 * q):02d}": q for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
LARGE, STRATA, LINE = 2**16, 2**10, 16  #: see above; 16 entries of float32 are a cache line

#: Columns of a summary row. Negative buckets come first, by rising exponent, then the positive ones, the same way.
AT: dict[str, int] = {field.name: i for i, field in enumerate(SUMMARY)}
QUANTILE = slice(len(SUMMARY), len(SUMMARY) + len(QUANTILES))
TOP_PARTIAL = slice(QUANTILE.stop, QUANTILE.stop + TOP)
TOP_INDEX = slice(TOP_PARTIAL.stop, TOP_PARTIAL.stop + TOP)
TOP_VALUE = slice(TOP_INDEX.stop, TOP_INDEX.stop + TOP)
HISTOGRAM = slice(TOP_VALUE.stop, TOP_VALUE.stop + 2 * BUCKETS)
WIDTH = HISTOGRAM.stop
LIGHT_WIDTH = HISTOGRAM.start  #: of a row without detail


# --- derived columns ------------------------------------------------------------------------------------------------


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    top, bottom = np.asarray(top, np.float64), np.asarray(bottom, np.float64)
    return np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, np.nan), where=bottom != 0)


def finite(c: Columns) -> np.ndarray:
    """How many partials are finite."""
    return c["positive"] + c["negative"] + c["zero"]


def nothing_finite(c: Columns) -> np.ndarray:
    """Where every partial is NaN or infinite: nothing can be said of their size."""
    return np.asarray((finite(c) == 0) & (c["numel"] > 0))


def _known(c: Columns, values: np.ndarray) -> np.ndarray:
    """NaN where nothing is finite, and not the 0 that a sum over nothing is."""
    return np.where(nothing_finite(c), np.nan, np.asarray(values, np.float64))


def without_nothing(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same columns, with empty sums where nothing is finite."""
    empty = nothing_finite(columns)
    if not empty.any():
        return dict(columns)
    return {name: np.where(empty, np.nan, values) if name in _SUMS else values for name, values in columns.items()}


def unknown(columns: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """The same columns, with nothing known of the partials of some rows: none is counted, what rests on them is empty."""
    result = {}
    for name, values in columns.items():
        result[name] = values if name == "numel" else values.copy()
        if name in ("positive", "negative", "zero", "nan", "inf"):
            result[name][..., rows] = 0
        elif name in _OF_PARTIALS:
            result[name][..., rows] = np.nan
    return without_nothing(result)


_OF_PARTIALS = {"dot", *QUANTILES} | {field.name for field in MOMENTS}
_SUMS = ("sum", "abs_sum", "square_sum", "weight_square_sum", "dot")


def _share(c: Columns, name: str) -> np.ndarray:
    """Of all entries; empty where nothing is finite."""
    return np.where(nothing_finite(c), np.nan, _ratio(c[name], c["numel"]))


def _mean(c: Columns) -> np.ndarray:
    return _ratio(c["sum"], finite(c))


def _std(c: Columns) -> np.ndarray:
    return np.sqrt(np.maximum(_ratio(c["square_sum"], finite(c)) - _mean(c) ** 2, 0))


def _cosine(dot: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.clip(_ratio(dot, np.sqrt(a) * np.sqrt(b)), -1, 1)


def _whole(c: Columns, name: str) -> np.ndarray:
    """A sum over the sampled entries, blown up to the whole parameter."""
    return c[name] * _ratio(c["numel"], c["update_numel"])


def _rounded_away(c: Columns) -> np.ndarray:
    return np.rint(_whole(c, "update_stuck"))


def _sampled(c: Columns) -> np.ndarray:
    compared = np.fmin(_present(c["flip_compared"]), _present(c["update_numel"]))
    return np.where(np.isnan(compared), 1.0, np.minimum(_ratio(compared, c["numel"]), 1.0))


def _present(count: np.ndarray) -> np.ndarray:
    count = np.asarray(count, np.float64)
    return np.where(count > 0, count, np.nan)


DERIVED: tuple[Derived, ...] = (
    Derived("mean", "moments", "mean of g", _mean, power=1),
    Derived("std", "moments", "standard deviation of g within the parameter (divided by n)", _std, power=1),
    Derived("rms", "moments", "root mean square of g", lambda c: np.sqrt(_ratio(c["square_sum"], finite(c))), power=1),
    Derived("l1", "moments", "sum of |g|", lambda c: _known(c, c["abs_sum"]), power=1),
    Derived("l2", "moments", "Euclidean norm of g", lambda c: np.sqrt(_known(c, c["square_sum"])), power=1),
    Derived("increase_share", "counts", "share of all weights that should increase", lambda c: _share(c, "negative")),
    Derived("decrease_share", "counts", "share of all weights that should decrease", lambda c: _share(c, "positive")),
    Derived("hold_share", "counts", "share of all weights with partial 0", lambda c: _share(c, "zero")),
    Derived("weight_l2", "weights", "Euclidean norm of w", lambda c: np.sqrt(c["weight_square_sum"])),
    Derived(
        "cosine",
        "flips",
        "cosine between g and the last observed gradient of this stage",
        lambda c: _cosine(c["flip_dot"], c["flip_square_sum"], c["flip_previous_square_sum"]),
    ),
    Derived(
        "flip_share",
        "flips",
        "of the weights whose partials were not 0 both times, the share whose sign changed",
        lambda c: _ratio(c["flip_count"], c["flip_moving"]),
    ),
    Derived("update_l2", "updates", "|dw|", lambda c: np.sqrt(_whole(c, "update_square_sum"))),
    Derived(
        "update_ratio",
        "updates",
        "|dw| / |w|",
        lambda c: np.sqrt(_ratio(c["update_square_sum"], c["update_before_square_sum"])),
    ),
    Derived(
        "alignment",
        "updates",
        "cos(-g_used, dw): 1 when the update follows the gradient",
        lambda c: _cosine(-c["update_dot"], c["update_used_square_sum"], c["update_square_sum"]),
    ),
    Derived(
        "against_share",
        "updates",
        "of the weights with g * dw != 0, the share that moved against their own gradient",
        lambda c: _ratio(c["update_against"], c["update_moving"]),
    ),
    Derived(
        "rounded_away",
        "updates",
        "weights with a partial that did not move: rounded away by the storage type",
        _rounded_away,
    ),
    Derived("used_dot_dw", "updates", "g_used.dw", lambda c: _whole(c, "update_dot")),
    Derived("loss_change", "updates", "g.dw: the first-order change of the loss", lambda c: _whole(c, "update_loss_dot")),
    Derived(
        "loss_change_exact",
        "updates",
        "whether g was kept, or equals the used one; else it was inferred from uniform clipping",
        lambda c: np.asarray(c["update_loss_exact"] == 1),
        dtype="bool",
    ),
    Derived("sampled", "shape", "share of the weights that flips and updates rest on", _sampled),
)

DERIVED_BY_NAME: dict[str, Derived] = {field.name: field for field in DERIVED}

# --- quantiles, from a histogram ----------------------------------------------------------------------------------------


def ascending(histogram: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Counts by rising value, `[n, 2 * BUCKETS + 1]`: negatives, zeros, positives."""
    return np.concatenate([histogram[:, :BUCKETS][:, ::-1], zero[:, None], histogram[:, BUCKETS:]], axis=1)


def quantiles(histogram: np.ndarray, columns: Columns) -> dict[str, np.ndarray]:
    """Quantiles of the finite partials, `[n]` each: exact in rank, interpolated within a factor of two in value."""
    counts, low, high = _occupied(histogram, columns["zero"])
    n, k = counts.shape
    cumulated = np.concatenate([[0.0], counts.ravel().cumsum()])  # row behind row: rising over all of them, and exact
    first = k * np.arange(n)
    before = cumulated[first]
    total = cumulated[first + k] - before
    result = {}
    for name, q in QUANTILES.items():
        rank = np.floor(q * np.maximum(total - 1, 0))
        at = np.minimum(np.searchsorted(cumulated[1:], before + rank, side="right"), first + k - 1)
        inside, bucket = cumulated[at + 1] - cumulated[at], at - first
        share = (before + rank - cumulated[at] + 0.5) / np.maximum(inside, 1)
        value = low[bucket] + share * (high[bucket] - low[bucket])
        value = np.fmin(np.fmax(value, columns["min"]), columns["max"])
        result[name] = np.where(total > 0, value, np.nan)
    return result


def _occupied(histogram: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts by rising value without the buckets that are empty in every row, `[n, k]`, and the buckets' edges, `[k]` each.

    Gradients of a model spread over some 30 of the 256.
    """
    seen = np.flatnonzero(histogram.any(axis=0))
    negative, positive = seen[seen < BUCKETS][::-1], seen[seen >= BUCKETS]
    counts = np.empty((len(histogram), len(seen) + 1))
    counts[:, : len(negative)] = histogram[:, negative]
    counts[:, len(negative)] = zero
    counts[:, len(negative) + 1 :] = histogram[:, positive]
    up = positive - BUCKETS
    low = np.concatenate([-POWERS[negative + 1], [0.0], POWERS[up]])
    return counts, low, np.concatenate([-POWERS[negative], [0.0], POWERS[up + 1]])


# --- frames ---------------------------------------------------------------------------------------------------------

KEYS = ("step", "backward", "stage", "parameter", "status", "scale", "shape", "dtype")
VALUES: tuple[str, ...] = (
    *(field.name for field in SCALARS if field.shown),
    *(field.name for field in DERIVED),
    *QUANTILES,
)
#: What a person looks at first; pandas shows the ends of a wide table alone.
_FIRST = ("parameter", "status", "rms", "increase_share", "decrease_share", "update_ratio", "cosine", "loss_change")
_LAST = ("shape", "step", "backward", "stage")
FRAME = KEYS + VALUES  #: the columns of `history()`, in order
#: Those of `table()`: the same, what matters first.
TABLE = (*_FIRST, *(name for name in FRAME if name not in _FIRST + _LAST), *_LAST)


def meaning(name: str) -> str:
    """What a column says, in one line; for docs and tooltips."""
    if name in QUANTILES:
        return f"{QUANTILES[name]:.0%} quantile of g, within a factor of two"
    return (BY_NAME.get(name) or DERIVED_BY_NAME[name]).meaning


def empty(n: int) -> dict[str, np.ndarray]:
    """The stored scalars of `n` rows that nothing is known of: counts 0, all else empty."""
    return {field.name: np.zeros(n, np.int64) if field.dtype == "int64" else np.full(n, np.nan) for field in SCALARS}


def derive(name: str, columns: Columns) -> np.ndarray:
    """A stored or derived column, `[n]`."""
    if name in columns:
        return columns[name]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        return DERIVED_BY_NAME[name].formula(columns)


def unscale(columns: Columns, scale: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of `g / scale`, given those of `g`; where the scale is NaN (unknown) they stay as they are."""
    factor = np.where(np.isnan(scale), 1.0, scale)
    powers = {name: BY_NAME[name].power if name in BY_NAME else int(name in QUANTILES) for name in columns}
    return {name: values / factor ** powers[name] if powers[name] else values for name, values in columns.items()}


def shift(histogram: np.ndarray, exponent: int) -> np.ndarray:
    """The histogram of `g / 2**exponent`, given that of `g`; end buckets keep what is pushed over the edge."""
    at = np.clip(np.arange(BUCKETS) - exponent, 0, BUCKETS - 1)
    result = np.zeros_like(histogram)
    for sign in (slice(0, BUCKETS), slice(BUCKETS, 2 * BUCKETS)):
        moved = np.zeros_like(histogram[:, sign])
        for source, target in enumerate(at):
            moved[:, target] += histogram[:, sign][:, source]
        result[:, sign] = moved
    return result


def _sum(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """NaN is left out; of both infinities the sum is NaN, and no warning."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nansum(values, axis=axis))


_MERGE: dict[str, Callable[..., np.ndarray]] = {"sum": _sum, "min": np.fmin.reduce, "max": np.fmax.reduce}


def pool(columns: Columns) -> dict[str, np.ndarray]:
    """All `n` rows merged into one: `[n]` a stored column in, `[1]` out. No rows give an empty row."""
    result = empty(1)
    for name, values in columns.items():
        if name in BY_NAME and len(values) and not (values.dtype.kind == "f" and np.isnan(values).all()):
            result[name] = np.asarray(_MERGE[BY_NAME[name].merge](values)).astype(values.dtype).reshape(1)
    return result


def merge(pieces: Sequence[Columns]) -> dict[str, np.ndarray]:
    """The rows of whole tensors from the rows of their disjoint pieces: `[n]` a column in, `[n]` out."""
    result = {}
    for name in pieces[0]:
        if name not in BY_NAME:
            continue
        stacked = np.stack([piece[name] for piece in pieces])
        merged = _MERGE[BY_NAME[name].merge](stacked, axis=0)
        if stacked.dtype.kind == "f":  # a sum over nothing is empty, not 0
            merged = np.where(np.isnan(stacked).all(axis=0), np.nan, merged)
        result[name] = merged.astype(stacked.dtype)
    return result
