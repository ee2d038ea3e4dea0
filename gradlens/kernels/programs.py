"""The programs that `triton` launches: `reference` said again in Triton's language.

A *group* is a list of tensors whose operands have the same types. The host lays it out as a table of 64-bit integers, one
entry a tensor (`triton.Group`), and cuts every tensor into chunks of `length` entries. Three launches then serve them all:

    scan    one program a chunk     -> a partial row: counts, sums, extremes, histogram
    top     sixteen a tensor        -> the largest of the chunks that can hold one of the tensor's largest
    close   one a tensor            -> its row, from its partial rows and those candidates

The largest 16 of a tensor lie in the 16 chunks that come first by falling `abs_max` and then by rising index, for any entry
of another chunk has 16 before it. So only those chunks are read twice, and in them only what reaches the least of their
extremes is looked at closely.

Whether an entry is zero, finite or negative, and its exponent, are read off its bits, so that a device that flushes
denormals counts them all the same. All sums are float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradlens import fields
from gradlens.kernels import reference

HEAD = 10  #: integers of a table's entry before its layout: the addresses of four operands, the next five, and room
#: Entries, the first of its chunks, how many they are, the row of the result, the lines of a stratum (`entries.stride`).
NUMEL, FIRST, COUNT, ROW, STRIDE = 4, 5, 6, 7, 8
PADDED = 32  #: columns of a partial row before its histogram: `fields.SUMMARY`, zeros that the histogram counts, and room
PARTIAL = PADDED + 2 * fields.BUCKETS
MOVED = 16  #: columns of a partial row of an update: `fields.UPDATES`, and room

_HEAD, _NUMEL, _FIRST, _COUNT, _ROW, _STRIDE = map(tl.constexpr, (HEAD, NUMEL, FIRST, COUNT, ROW, STRIDE))
_PADDED, _PARTIAL, _COUNTED_ZERO = map(tl.constexpr, (PADDED, PARTIAL, len(fields.SUMMARY)))
_LINE = tl.constexpr(fields.LINE)
_POSITIVE, _NEGATIVE, _ZERO, _NANS, _INFS = (
    tl.constexpr(fields.AT[name]) for name in ("positive", "negative", "zero", "nan", "inf")
)
_ENTRIES, _SUM, _ABS_SUM, _SQUARE_SUM = (tl.constexpr(fields.AT[name]) for name in ("numel", "sum", "abs_sum", "square_sum"))
_MIN, _MAX, _ABS_MAX, _ABS_MIN = (tl.constexpr(fields.AT[name]) for name in ("min", "max", "abs_max", "abs_min_nonzero"))
_W_SQUARE, _W_MAX, _DOT, _W_NONFINITE = (tl.constexpr(fields.AT[field.name]) for field in fields.WEIGHTS)
_COMPARED, _MOVING, _FLIPPED, _P_DOT, _G_SQUARE, _P_SQUARE = (tl.constexpr(fields.AT[field.name]) for field in fields.FLIPS)
_SUMMARY, _TOP = tl.constexpr(len(fields.SUMMARY)), tl.constexpr(fields.TOP)
_WIDTH, _LIGHT_WIDTH, _HISTOGRAM = (tl.constexpr(at) for at in (fields.WIDTH, fields.LIGHT_WIDTH, fields.HISTOGRAM.start))
_QUANTILE = tl.constexpr(fields.QUANTILE.start)
_Q05, _Q25, _Q50, _Q75, _Q95 = map(tl.constexpr, fields.QUANTILES.values())
_BUCKETS, _BINS = tl.constexpr(fields.BUCKETS), tl.constexpr(2 * fields.BUCKETS)
_LOWEST, _HIGHEST = tl.constexpr(fields.EXPONENT_MIN), tl.constexpr(fields.EXPONENT_MAX)
_PARTIALS, _INDICES, _VALUES = (
    tl.constexpr(part.start) for part in (fields.TOP_PARTIAL, fields.TOP_INDEX, fields.TOP_VALUE)
)
(
    _MOVE_ENTRIES,
    _MOVE_SQUARE,
    _BEFORE_SQUARE,
    _USED_SQUARE,
    _MOVE_DOT,
    _GOING,
    _AGAINST,
    _STUCK,
    _NONFINITE,
    _LOSS_DOT,
    _EXACT,
) = (tl.constexpr(at) for at in range(len(fields.UPDATES)))
_MOVED, _UPDATES, _SAMPLES = tl.constexpr(MOVED), tl.constexpr(len(fields.UPDATES)), tl.constexpr(reference.SAMPLES)
_INF = tl.constexpr(float("inf"))  # no NaN beside it: Triton refuses a global that differs from itself
_LATE = tl.constexpr(2**62)  # an index after every real one


# --- entries ----------------------------------------------------------------------------------------------------------


@triton.jit
def _field(table, tensor, at: tl.constexpr, AXES: tl.constexpr):
    """An integer of a tensor's entry."""
    return tl.load(table + tensor.to(tl.int64) * (_HEAD + 5 * AXES) + at)


@triton.jit
def _address(table, tensor, operand: tl.constexpr, TYPE: tl.constexpr, AXES: tl.constexpr, ALIGNED: tl.constexpr):
    """Where an operand lies."""
    pointer = _field(table, tensor, operand, AXES).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _place(table, tensor, operand: tl.constexpr, at, AXES: tl.constexpr):
    """How many entries after its address an operand has those that are `at` in logical order."""
    place = at
    if AXES > 0:
        place, rest = at * 0, at.to(tl.int32)  # the host takes none with more entries: division is slow enough
        for axis in tl.static_range(AXES):  # the last one first
            size = _field(table, tensor, _HEAD + axis, AXES).to(tl.int32)
            place += (rest % size) * _field(table, tensor, _HEAD + (operand + 1) * AXES + axis, AXES)
            rest = rest // size
    return place


@triton.jit
def _read(pointer, place, inside, whole):
    """Entries, 0 where there are none. Without a mask where all are there: loads are wide then."""
    if whole:
        x = tl.load(pointer + place)
    else:
        x = tl.load(pointer + place, mask=inside, other=0.0)
    return x


@triton.jit
def _bits(x):
    """The bits of float64 entries, of any others as float32: that is exact, and keeps their order."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
    elif x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def _wide(x):
    """The entries as float64."""
    if x.dtype == tl.bfloat16:
        wide = _bits(x).to(tl.float32, bitcast=True).to(tl.float64)
    else:
        wide = x.to(tl.float64)
    return wide


@triton.jit
def _limit(bits):
    """The bits of infinity; NaN lies above."""
    if bits.dtype == tl.int64:
        limit: tl.constexpr = 0x7FF0000000000000
    else:
        limit: tl.constexpr = 0x7F800000
    return limit


@triton.jit
def _magnitude(bits):
    """The bits without the sign: ordered as the magnitudes are."""
    if bits.dtype == tl.int64:
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
    else:
        magnitude = bits & 0x7FFFFFFF
    return magnitude


@triton.jit
def _value(magnitude):
    """A magnitude from its bits, float64."""
    if magnitude.dtype == tl.int64:
        value = magnitude.to(tl.float64, bitcast=True)
    else:
        value = magnitude.to(tl.float32, bitcast=True).to(tl.float64)
    return value


@triton.jit
def _signed(key):
    """The number of a signed magnitude."""
    value = _value(tl.abs(key))
    return tl.where(key < 0, -value, value)


@triton.jit
def _bucket(bits):
    """The bucket of the histogram."""
    if bits.dtype == tl.int64:
        exponent = ((bits >> 52) & 0x7FF).to(tl.int32) - 1023
    else:
        exponent = ((bits >> 23) & 0xFF) - 127
    return tl.minimum(tl.maximum(exponent, _LOWEST), _HIGHEST) - _LOWEST + tl.where(bits > 0, _BUCKETS, 0)


# --- gradients --------------------------------------------------------------------------------------------------------


@triton.jit
def _sampled(at, stride):
    """Whether entries are in the sample: see `entries.sampled`."""
    line = at // _LINE
    stratum = line // stride
    return line == stratum * stride + (((stratum * 2654435761) & 0xFFFFFFFF) >> 8) % stride


@triton.jit
def scan(
    table, owners, partials, length,
    G: tl.constexpr, W: tl.constexpr, P: tl.constexpr, KEEP: tl.constexpr,
    AXES: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The partial row of a chunk. `W` and `P` are None where there are no weights and no previous gradients."""
    chunk = tl.program_id(0)
    tensor = tl.load(owners + chunk)
    start = (chunk - _field(table, tensor, _FIRST, AXES)) * length
    stop = tl.minimum(start + length, _field(table, tensor, _NUMEL, AXES))
    lanes = tl.arange(0, TILE).to(tl.int64)

    gradient = _address(table, tensor, 0, G, AXES, ALIGNED)
    none = _bits(tl.zeros([TILE], G))
    limit: tl.constexpr = _limit(none)
    zeros = tl.zeros([TILE], tl.int32)
    odd = zeros  # NaN, and infinities in the upper half
    total = tl.zeros([TILE], tl.float64)
    abs_total, square_total = total, total
    least, most, smallest = none + limit, none - limit, none + limit
    histogram = tl.zeros([_BINS], tl.int32)
    stride = _field(table, tensor, _STRIDE, AXES)
    negatives, positives, counted, counted_zeros = zeros, zeros, zeros, zeros
    if W is not None:
        weight = _address(table, tensor, 1, W, AXES, ALIGNED)
        w_none = _bits(tl.zeros([TILE], W))
        w_limit: tl.constexpr = _limit(w_none)
        w_square, w_largest, dot, w_odd = total, w_none - 1, total, zeros
    if P is not None:
        previous = _address(table, tensor, 2, P, AXES, ALIGNED)
        p_limit: tl.constexpr = _limit(_bits(tl.zeros([1], P)))
        compared, moving, flipped = zeros, zeros, zeros
        p_dot, g_square, p_square = total, total, total
    if KEEP:
        room = _address(table, tensor, 3, G, AXES, ALIGNED)

    for first in range(start, stop, TILE):
        at, whole = first + lanes, first + TILE <= stop
        inside = at < stop
        x = _read(gradient, _place(table, tensor, 0, at, AXES), inside, whole)
        bits = _bits(x)
        magnitude = _magnitude(bits)
        fine = (magnitude < limit) & inside
        there = fine & (magnitude > 0)
        key = tl.where(bits < 0, -magnitude, magnitude)
        zeros += ((magnitude == 0) & inside).to(tl.int32)
        odd += tl.where(magnitude > limit, 1, tl.where(magnitude == limit, 1 << 16, 0))
        least = tl.minimum(least, tl.where(fine, key, limit))
        most = tl.maximum(most, tl.where(fine, key, -limit))
        smallest = tl.minimum(smallest, tl.where(there, magnitude, limit))
        negatives += (there & (bits < 0)).to(tl.int32)
        positives += (there & (bits > 0)).to(tl.int32)
        taken = _sampled(at, stride) & inside
        chosen = there & taken
        counted_zeros += ((magnitude == 0) & taken).to(tl.int32)
        counted += chosen.to(tl.int32)
        if tl.max(chosen.to(tl.int32)) > 0:
            # What has no bucket is counted in the first one, and taken out of it in the end.
            histogram += tl.histogram(tl.where(chosen, _bucket(bits), 0), _BINS)
        g = tl.where(fine, _wide(x), 0.0)
        total += g
        abs_total += tl.abs(g)
        square_total += g * g
        if W is not None:
            y = _read(weight, _place(table, tensor, 1, at, AXES), inside, whole)
            w_magnitude = _magnitude(_bits(y))
            w_fine = (w_magnitude < w_limit) & inside
            w = tl.where(w_fine, _wide(y), 0.0)
            w_square += w * w
            w_largest = tl.maximum(w_largest, tl.where(w_fine, w_magnitude, -1))
            dot += g * w
            w_odd += (w_magnitude >= w_limit).to(tl.int32)
        if P is not None:
            z = _read(previous, _place(table, tensor, 2, at, AXES), inside, whole)
            p_bits = _bits(z)
            p_magnitude = _magnitude(p_bits)
            both = fine & (p_magnitude < p_limit)
            going = both & there & (p_magnitude > 0)
            p = tl.where(both, _wide(z), 0.0)
            h = tl.where(both, g, 0.0)
            compared += both.to(tl.int32)
            moving += going.to(tl.int32)
            flipped += (going & ((bits < 0) != (p_bits < 0))).to(tl.int32)
            p_dot += h * p
            g_square += h * h
            p_square += p * p
        if KEEP:
            tl.store(room + _place(table, tensor, 3, at, AXES), x, mask=inside)

    row = partials + chunk.to(tl.int64) * _PARTIAL
    bins = tl.arange(0, _BINS)
    zero, nan, inf = tl.sum(zeros), tl.sum(odd & 0xFFFF), tl.sum(odd >> 16)
    bucketless = tl.sum(histogram) - tl.sum(counted)
    histogram -= tl.where(bins == 0, bucketless, 0).to(tl.int32)
    tl.store(row + _PADDED + bins, histogram.to(tl.float64))
    tl.store(row + _COUNTED_ZERO, tl.sum(counted_zeros).to(tl.float64))
    tl.store(row + _NEGATIVE, tl.sum(negatives).to(tl.float64))
    tl.store(row + _POSITIVE, tl.sum(positives).to(tl.float64))
    tl.store(row + _ZERO, zero.to(tl.float64))
    tl.store(row + _NANS, nan.to(tl.float64))
    tl.store(row + _INFS, inf.to(tl.float64))
    tl.store(row + _SUM, tl.sum(total))
    tl.store(row + _ABS_SUM, tl.sum(abs_total))
    tl.store(row + _SQUARE_SUM, tl.sum(square_total))
    low, high = tl.min(least), tl.max(most)
    tl.store(row + _MIN, _signed(low))
    tl.store(row + _MAX, _signed(high))
    tl.store(row + _ABS_MAX, tl.where(low > high, -1.0, _value(tl.maximum(high, -low))))
    tl.store(row + _ABS_MIN, _value(tl.min(smallest)))
    if W is not None:
        w_top = tl.max(w_largest)
        tl.store(row + _W_SQUARE, tl.sum(w_square))
        tl.store(row + _W_MAX, tl.where(w_top < 0, -1.0, _value(tl.maximum(w_top, 0))))
        tl.store(row + _DOT, tl.sum(dot))
        tl.store(row + _W_NONFINITE, tl.sum(w_odd).to(tl.float64))
    if P is not None:
        tl.store(row + _COMPARED, tl.sum(compared).to(tl.float64))
        tl.store(row + _MOVING, tl.sum(moving).to(tl.float64))
        tl.store(row + _FLIPPED, tl.sum(flipped).to(tl.float64))
        tl.store(row + _P_DOT, tl.sum(p_dot))
        tl.store(row + _G_SQUARE, tl.sum(g_square))
        tl.store(row + _P_SQUARE, tl.sum(p_square))


@triton.jit
def _nobody():
    """Room for the largest, by magnitude and index, that is filled from the first place on: nothing has magnitude -1."""
    return tl.full([_TOP], -1.0, tl.float64), -tl.arange(0, _TOP).to(tl.int64) + _LATE


@triton.jit
def _take(best, place, magnitude, index):
    """The largest of two lots, of equal ones the first. Magnitudes below 0 are nothing."""
    most, floor = tl.max(magnitude), tl.min(best)
    while most > floor:  # an equal one with a lower index would have come before
        first = tl.min(tl.where(magnitude == most, index, _LATE))
        last = tl.max(tl.where(best == floor, place, -1))
        gone = (best == floor) & (place == last)
        best, place = tl.where(gone, most, best), tl.where(gone, first, place)
        magnitude = tl.where(index == first, -1.0, magnitude)
        most, floor = tl.max(magnitude), tl.min(best)
    return best, place


@triton.jit
def top(
    table, partials, magnitudes, indices, length,
    G: tl.constexpr, AXES: tl.constexpr, ALIGNED: tl.constexpr, PEAKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The largest of one of the chunks that a tensor's largest lie in: `[tensors, slots, TOP]` of magnitudes and indices."""
    tensor, slot = tl.program_id(0), tl.program_id(1)
    chunks = _field(table, tensor, _FIRST, AXES)
    count = _field(table, tensor, _COUNT, AXES)
    peaks, chosen = _nobody()
    for first in range(0, count, PEAKS):
        at = first + tl.arange(0, PEAKS).to(tl.int64)
        peak = tl.load(partials + (chunks + at) * _PARTIAL + _ABS_MAX, mask=at < count, other=-1.0)
        peaks, chosen = _take(peaks, chosen, peak, at)
    lanes = tl.arange(0, _TOP)
    floor = tl.min(peaks)
    best, place = _nobody()
    if tl.max(tl.where(lanes == slot, peaks, -1.0)) >= 0:
        start = tl.sum(tl.where(lanes == slot, chosen, 0)) * length
        stop = tl.minimum(start + length, _field(table, tensor, _NUMEL, AXES))
        gradient = _address(table, tensor, 0, G, AXES, ALIGNED)
        for first in range(start, stop, TILE):
            at = first + tl.arange(0, TILE).to(tl.int64)
            inside = at < stop
            x = _read(gradient, _place(table, tensor, 0, at, AXES), inside, first + TILE <= stop)
            bits = _magnitude(_bits(x))
            fine = (bits < _limit(bits)) & inside
            magnitude = tl.where(fine, tl.abs(_wide(x)), -1.0)
            best, place = _take(best, place, tl.where(magnitude >= floor, magnitude, -1.0), at)
    out = (tensor.to(tl.int64) * tl.num_programs(1) + slot) * _TOP + lanes
    tl.store(magnitudes + out, best)
    tl.store(indices + out, place)


@triton.jit
def _quantile(histogram, zero, low, high, q: tl.constexpr):
    """As `fields.quantiles`: the one bucket that holds the rank, and the place in it. Negative buckets rise by magnitude."""
    bins = tl.arange(0, _BINS)
    passed = tl.cumsum(histogram, axis=0)
    negatives = tl.sum(tl.where(bins < _BUCKETS, histogram, 0.0))
    after = tl.where(bins < _BUCKETS, negatives - passed + histogram, zero + passed)
    total = tl.sum(histogram) + zero
    rank = (tl.maximum(total - 1, 0.0) * q).to(tl.int64).to(tl.float64)
    here = (after > rank) & (after - histogram <= rank)
    exponent = (bins % _BUCKETS + _LOWEST).to(tl.int64)
    power = ((exponent + 1023) << 52).to(tl.float64, bitcast=True)
    start = tl.where(bins < _BUCKETS, -2 * power, power)
    share = (rank - (after - histogram) + 0.5) / tl.maximum(histogram, 1.0)
    value = tl.sum(tl.where(here, start + share * power, 0.0))  # 0 where no bucket is: the rank is that of a zero
    return tl.where(total > 0, tl.minimum(tl.maximum(value, low), high), float("nan"))


@triton.jit
def close(
    table, partials, magnitudes, indices, slots, rows,
    G: tl.constexpr, W: tl.constexpr, P: tl.constexpr, DETAIL: tl.constexpr, AXES: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """The row of a tensor."""
    tensor = tl.program_id(0)
    chunks = _field(table, tensor, _FIRST, AXES)
    count = _field(table, tensor, _COUNT, AXES)
    row = rows + _field(table, tensor, _ROW, AXES) * (_WIDTH if DETAIL else _LIGHT_WIDTH)
    columns, bins = tl.arange(0, _PADDED), tl.arange(0, _BINS)
    total, histogram = tl.zeros([_PADDED], tl.float64), tl.zeros([_BINS], tl.float64)
    least, most = total + _INF, total - _INF
    for first in range(0, count, MERGED):
        at = first + tl.arange(0, MERGED).to(tl.int64)[:, None]
        line = partials + (chunks + at) * _PARTIAL
        there = (at < count) & (columns <= _COUNTED_ZERO)[None, :]
        part = tl.load(line + columns[None, :], mask=there, other=0.0)
        total += tl.sum(part, axis=0)
        least = tl.minimum(least, tl.min(tl.where(there, part, _INF), axis=0))
        most = tl.maximum(most, tl.max(tl.where(there, part, -_INF), axis=0))
        counts = tl.load(line + _PADDED + bins[None, :], mask=at < count, other=0.0)
        histogram += tl.sum(counts, axis=0)
    lower = (columns == _MIN) | (columns == _ABS_MIN)
    upper = (columns == _MAX) | (columns == _ABS_MAX) | (columns == _W_MAX)
    magnitude = (columns == _ABS_MAX) | (columns == _W_MAX)
    value = tl.where(lower, least, tl.where(upper, most, total))
    nothing = ((lower | upper) & (tl.abs(value) == _INF)) | (magnitude & (value < 0))
    value = tl.where(columns == _ENTRIES, _field(table, tensor, _NUMEL, AXES).to(tl.float64), value)
    if W is None:
        nothing = nothing | ((columns >= _W_SQUARE) & (columns <= _DOT))
        value = tl.where(columns == _W_NONFINITE, 0.0, value)
    if P is None:
        nothing = nothing | ((columns >= _P_DOT) & (columns <= _P_SQUARE))
        value = tl.where((columns >= _COMPARED) & (columns <= _FLIPPED), 0.0, value)
    tl.store(row + columns, tl.where(nothing, float("nan"), value), mask=columns < _SUMMARY)
    zero = tl.sum(tl.where(columns == _COUNTED_ZERO, total, 0.0))
    low = tl.min(tl.where(columns == _MIN, least, _INF))
    high = tl.max(tl.where(columns == _MAX, most, -_INF))
    tl.store(row + _QUANTILE, _quantile(histogram, zero, low, high, _Q05))
    tl.store(row + _QUANTILE + 1, _quantile(histogram, zero, low, high, _Q25))
    tl.store(row + _QUANTILE + 2, _quantile(histogram, zero, low, high, _Q50))
    tl.store(row + _QUANTILE + 3, _quantile(histogram, zero, low, high, _Q75))
    tl.store(row + _QUANTILE + 4, _quantile(histogram, zero, low, high, _Q95))
    if DETAIL:
        tl.store(row + _HISTOGRAM + bins, histogram)

    lanes = tl.arange(0, _TOP * _TOP)
    there = lanes < slots * _TOP
    candidates = tensor.to(tl.int64) * slots * _TOP + lanes
    best, place = _nobody()
    found = tl.load(magnitudes + candidates, mask=there, other=-1.0)
    best, place = _take(best, place, found, tl.load(indices + candidates, mask=there, other=0))
    before = (best[None, :] > best[:, None]) | ((best[None, :] == best[:, None]) & (place[None, :] < place[:, None]))
    rank = tl.sum(before.to(tl.int32), axis=1)
    real = best >= 0
    gradient = _address(table, tensor, 0, G, AXES, False)
    g = tl.load(gradient + _place(table, tensor, 0, place, AXES), mask=real, other=0.0)
    tl.store(row + _PARTIALS + rank, tl.where(real, _wide(g), float("nan")))
    tl.store(row + _INDICES + rank, tl.where(real, place, -1).to(tl.float64))
    if W is not None:
        weight = _address(table, tensor, 1, W, AXES, False)
        w = tl.load(weight + _place(table, tensor, 1, place, AXES), mask=real, other=0.0)
        tl.store(row + _VALUES + rank, tl.where(real, _wide(w), float("nan")))
    else:
        tl.store(row + _VALUES + rank, tl.full([_TOP], float("nan"), tl.float64))


# --- updates and samples ----------------------------------------------------------------------------------------------


@triton.jit
def move(
    table, owners, partials, length,
    U: tl.constexpr, B: tl.constexpr, A: tl.constexpr, L: tl.constexpr,
    AXES: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The partial row of a chunk of an update. `U` and `L` are None where the used and the loss's gradient are not there."""
    chunk = tl.program_id(0)
    tensor = tl.load(owners + chunk)
    start = (chunk - _field(table, tensor, _FIRST, AXES)) * length
    stop = tl.minimum(start + length, _field(table, tensor, _NUMEL, AXES))
    lanes = tl.arange(0, TILE).to(tl.int64)
    before, after = _address(table, tensor, 1, B, AXES, ALIGNED), _address(table, tensor, 2, A, AXES, ALIGNED)
    square, before_square = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64)
    used_square, dot, loss_dot = square, square, square
    moving = tl.zeros([TILE], tl.int32)
    against, stuck, nonfinite = moving, moving, moving
    if U is not None:
        used = _address(table, tensor, 0, U, AXES, ALIGNED)
    if L is not None:
        loss = _address(table, tensor, 3, L, AXES, ALIGNED)

    for first in range(start, stop, TILE):
        at, whole = first + lanes, first + TILE <= stop
        inside = at < stop
        w = _wide(_read(before, _place(table, tensor, 1, at, AXES), inside, whole))
        new = _wide(_read(after, _place(table, tensor, 2, at, AXES), inside, whole))
        nonfinite += (inside & ~(tl.abs(new) < _INF)).to(tl.int32)
        dw = new - w
        finite = (tl.abs(dw) < _INF) & inside
        dw = tl.where(finite, dw, 0.0)
        w = tl.where(finite, w, 0.0)
        square += dw * dw
        before_square += w * w
        if U is not None:
            x = _read(used, _place(table, tensor, 0, at, AXES), inside, whole)
            bits = _bits(x)
            magnitude = _magnitude(bits)
            fine = finite & (magnitude < _limit(bits))
            g = tl.where(fine, _wide(x), 0.0)
            going = fine & (magnitude > 0)
            moved = going & (dw != 0)
            used_square += g * g
            dot += g * dw
            moving += moved.to(tl.int32)
            against += (moved & ((bits > 0) == (dw > 0))).to(tl.int32)
            stuck += (going & (dw == 0)).to(tl.int32)
        if L is not None:
            x = _wide(_read(loss, _place(table, tensor, 3, at, AXES), inside, whole))
            loss_dot += tl.where(finite & (tl.abs(x) < _INF), x, 0.0) * dw

    row = partials + chunk.to(tl.int64) * _MOVED
    tl.store(row + _MOVE_SQUARE, tl.sum(square))
    tl.store(row + _BEFORE_SQUARE, tl.sum(before_square))
    tl.store(row + _USED_SQUARE, tl.sum(used_square))
    tl.store(row + _MOVE_DOT, tl.sum(dot))
    tl.store(row + _GOING, tl.sum(moving).to(tl.float64))
    tl.store(row + _AGAINST, tl.sum(against).to(tl.float64))
    tl.store(row + _STUCK, tl.sum(stuck).to(tl.float64))
    tl.store(row + _NONFINITE, tl.sum(nonfinite).to(tl.float64))
    tl.store(row + _LOSS_DOT, tl.sum(loss_dot))


@triton.jit
def settle(table, partials, rows, U: tl.constexpr, L: tl.constexpr, AXES: tl.constexpr, MERGED: tl.constexpr):
    """The row of an update."""
    tensor = tl.program_id(0)
    chunks = _field(table, tensor, _FIRST, AXES)
    count = _field(table, tensor, _COUNT, AXES)
    columns = tl.arange(0, _MOVED)
    total = tl.zeros([_MOVED], tl.float64)
    for first in range(0, count, MERGED):
        at = first + tl.arange(0, MERGED).to(tl.int64)[:, None]
        there = (at < count) & ((columns >= _MOVE_SQUARE) & (columns <= _LOSS_DOT))[None, :]
        total += tl.sum(tl.load(partials + (chunks + at) * _MOVED + columns[None, :], mask=there, other=0.0), axis=0)
    value = tl.where(columns == _MOVE_ENTRIES, _field(table, tensor, _NUMEL, AXES).to(tl.float64), total)
    value = tl.where(columns == _EXACT, 1.0, value)
    if U is None:
        value = tl.where((columns == _USED_SQUARE) | (columns == _MOVE_DOT), float("nan"), value)
    if L is None:
        value = tl.where(columns >= _LOSS_DOT, float("nan"), value)
    tl.store(rows + _field(table, tensor, _ROW, AXES) * _UPDATES + columns, value, mask=columns < _UPDATES)


@triton.jit
def pick(table, rows, T: tl.constexpr, AXES: tl.constexpr):
    """The samples of a tensor."""
    tensor = tl.program_id(0)
    n = _field(table, tensor, _NUMEL, AXES)
    lanes = tl.arange(0, _SAMPLES).to(tl.int64)
    at = tl.where(n > _SAMPLES, lanes * (n - 1) // (_SAMPLES - 1), lanes)
    pointer = _address(table, tensor, 0, T, AXES, False)
    x = tl.load(pointer + _place(table, tensor, 0, at, AXES), mask=at < n, other=0.0)
    tl.store(rows + _field(table, tensor, _ROW, AXES) * _SAMPLES + lanes, _wide(x))
