"""The programs that `triton` launches: `reference` said again in Triton's language.

A *group* is a list of tensors whose operands have the same types. The host lays it out as a table of 64-bit integers, one
entry a tensor (`triton.Group`), and cuts every tensor into chunks of `length` entries, at least one. One launch serves them
all, a program a chunk:

    1. the program reads its chunk and writes a partial row: counts, sums, extremes, histogram, heads
    2. it counts itself as arrived, and ends unless all other programs of its tensor have
    3. the last one merges the partial rows and writes the tensor's row

Nobody waits for another program, so nothing rests on how many of them run at once or in which order; the merge goes by
rising chunk, so that sums are the same whoever is last.

**What the last one does alone is short**, whatever the size of the tensor. Of more than `FAN` chunks the last program of
each *block* of `FAN` merges these into one row first. So one program merges at most `FAN` rows and then one a block: 32 and
64 of the 2,048 that 10^9 weights have.

**The sixteen largest** cost three instructions an entry in the first pass, and no branch. Each lane keeps the largest entry
that it saw, its *head*; the entries of a lane, every `TILE`-th of the chunk, are a *strip*. The last program picks the 16
chunks that come first by their largest entry, of these chunks the 16 strips that come first by their head, and reads these
strips again: `16 * length / TILE` entries, which are 1,024 of a small tensor and 30,720 of 10^9. The largest entries lie
there, for before an entry of any other chunk or strip come the best ones of these 16. Two other ways cost more: 16
candidates that each chunk keeps take some `16 * (1 + ln(length / 16))` insertions of a few reductions each, in every chunk,
and one an entry where a tensor rises; and to search the 16 chunks whole is to read 7.9 million entries of 10^9, by one
program.

Whether an entry is zero, finite or negative, and its exponent, are read off its bits, so that a device that flushes
denormals counts them all the same. All sums are float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradlens import fields
from gradlens.kernels import reference

#: A table's entry: the entries of the tensor, the rows of its first chunk and its first block among the partial rows, how
#: many chunks there are, the row of the result, the lines of a stratum (`entries.stride`), how many programs have arrived,
#: and room. Then the size of each axis, the last first; then of each operand its address, and a stride an axis.
HEAD = 8
NUMEL, FIRST, BLOCK, COUNT, ROW, STRIDE, ARRIVED = range(7)
PADDED = 32  #: columns of a partial row: `fields.SUMMARY`, zeros that the histogram counts, and room
MOVED = 16  #: columns of a partial row of an update: `fields.UPDATES`, and room
BINS = 2 * fields.BUCKETS

_HEAD, _NUMEL, _FIRST, _BLOCK, _COUNT, _ROW, _STRIDE, _ARRIVED = map(
    tl.constexpr, (HEAD, NUMEL, FIRST, BLOCK, COUNT, ROW, STRIDE, ARRIVED)
)
_PADDED, _COUNTED_ZERO = map(tl.constexpr, (PADDED, len(fields.SUMMARY)))
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
_SHARES = tl.constexpr(tuple(fields.QUANTILES.values()))
_BUCKETS, _BINS = tl.constexpr(fields.BUCKETS), tl.constexpr(BINS)
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
def _work(table, owners, WORDS: tl.constexpr):
    """What a program does: the entry of a tensor, and which of its chunks."""
    owner = tl.load(owners + tl.program_id(0))
    return table + (owner >> 32) * WORDS, owner & 0xFFFFFFFF


@triton.jit
def _address(entry, operand: tl.constexpr, TYPE: tl.constexpr, AXES: tl.constexpr):
    """Where an operand lies."""
    return tl.load(entry + _HEAD + AXES + operand * (1 + AXES)).to(tl.pointer_type(TYPE))


@triton.jit
def _chunk(entry, operand: tl.constexpr, start, TYPE: tl.constexpr, AXES: tl.constexpr, ALIGNED: tl.constexpr):
    """Where an operand's chunk lies, of contiguous ones; of others where the operand does."""
    pointer = tl.load(entry + _HEAD + AXES + operand * (1 + AXES)).to(tl.pointer_type(TYPE))
    if ALIGNED:  # said of a function's result it would be lost
        pointer = tl.multiple_of(pointer, 16)
    if AXES == 0:
        pointer += start
    return pointer


@triton.jit
def _offset(entry, operand: tl.constexpr, start, at, AXES: tl.constexpr):
    """How many entries after `_chunk` those lie that are `at` in the chunk. 32 bits where that is enough: registers."""
    if AXES > 0:
        at = _place(entry, operand, start + at, AXES)
    return at


@triton.jit
def _place(entry, operand: tl.constexpr, at, AXES: tl.constexpr):
    """How many entries after its address an operand has those that are `at` in logical order."""
    place = at
    if AXES > 0:
        place, rest = at * 0, at.to(tl.int32)  # the host takes none with more entries: division is slow enough
        for axis in tl.static_range(AXES):  # the last one first
            size = tl.load(entry + _HEAD + axis).to(tl.int32)
            place += (rest % size) * tl.load(entry + _HEAD + AXES + operand * (1 + AXES) + 1 + axis)
            rest = rest // size
    return place


@triton.jit
def _is_last(arrived, of):
    """Whether the other programs of so many have come here before this one, whose turn it is then to read what they wrote.

    The barrier puts the writes of all threads of a program before its one atomic addition. That releases them to the whole
    device, and acquires what the programs before it have released. The last one sets the counter back for the next launch.
    """
    tl.debug_barrier()
    last = of == 1
    if of > 1:
        last = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == of - 1
        if last:
            tl.store(arrived, 0)
    return last


@triton.jit
def _written(pointer, mask, other):
    """What another program of this launch wrote: from the L2 cache, for a processor's L1 does not follow what others write.

    The acquisition in `_is_last` empties L1 as well; this does not rest on it.
    """
    return tl.load(pointer, mask=mask, other=other, cache_modifier=".cg")


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
def _peak(magnitude):
    """The largest of some magnitudes, float64; -1 of nothing, which has magnitude -1."""
    most = tl.max(magnitude)
    return tl.where(most < 0, -1.0, _value(tl.maximum(most, 0)))


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
    """Whether entries are in the sample: see `entries.sampled`. 32 bits count the lines of every tensor that is taken."""
    line, stride = (at // _LINE).to(tl.uint32), stride.to(tl.uint32)
    stratum = line // stride
    return line == stratum * stride + ((stratum * 2654435761) >> 8) % stride


@triton.jit
def _halves(low, high):
    """Two facts of each lane as one number, so that two counts share a register."""
    return low.to(tl.int32) + tl.where(high, 1 << 16, 0)


@triton.jit
def _low(halves):
    return tl.sum(halves & 0xFFFF)


@triton.jit
def _high(halves):
    return tl.sum(halves >> 16)


@triton.jit
def summarize(
    table, owners, arrivals, partials, bins, heads, tiles, rows, length,
    G: tl.constexpr, W: tl.constexpr, P: tl.constexpr, KEEP: tl.constexpr,
    DETAIL: tl.constexpr, AXES: tl.constexpr, ALIGNED: tl.constexpr, WORDS: tl.constexpr,
    TILE: tl.constexpr, FAN: tl.constexpr, MERGED: tl.constexpr, PEAKS: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    """The rows of gradients. `W` and `P` are None where there are no weights and no previous gradients.

    `KEEP`: gradients are written to operand 3.
    """
    entry, number = _work(table, owners, WORDS)
    first, count = tl.load(entry + _FIRST), tl.load(entry + _COUNT)
    _scan(
        entry, number, first, partials, bins, heads, tiles, length,
        G, W, P, KEEP, DETAIL, AXES, ALIGNED, TILE,
    )  # fmt: skip
    part, parts = first, count
    if count > FAN:
        part, parts = tl.load(entry + _BLOCK), tl.cdiv(count, FAN)
        block = number // FAN
        size = tl.minimum(count - block * FAN, FAN)
        last = _is_last(arrivals + part + block, size)
        if last:
            _merge_block(partials, bins, first + block * FAN, size, part + block, MERGED)
            last = _is_last(entry + _ARRIVED, parts)
    else:
        last = _is_last(entry + _ARRIVED, count)
    if last:
        _close(
            entry, part, parts, partials, bins, heads, tiles, rows, length,
            G, W, P, DETAIL, AXES, TILE, MERGED, PEAKS, SEARCHED,
        )  # fmt: skip


@triton.jit
def _scan(
    entry, number, first, partials, bins, heads, tiles, length,
    G: tl.constexpr, W: tl.constexpr, P: tl.constexpr, KEEP: tl.constexpr, DETAIL: tl.constexpr,
    AXES: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The partial row of a chunk. What each lane keeps are registers: `Sizes.tile`."""
    start = number * length
    entries = tl.minimum(tl.load(entry + _NUMEL) - start, length).to(tl.int32)
    lanes = tl.arange(0, TILE)

    gradient = _chunk(entry, 0, start, G, AXES, ALIGNED)
    none = _bits(tl.zeros([TILE], G))
    limit: tl.constexpr = _limit(none)
    zeros = tl.zeros([TILE], tl.int32)
    odd, signs = zeros, zeros  # halves: NaN and infinities; zeros and negatives
    total = tl.zeros([TILE], tl.float64)
    abs_total, square_total = total, total
    least, most, smallest = none + limit, none - limit, none + limit
    head, tile = none - 1, zeros  # the largest magnitude, and the tile where it came first
    histogram = tl.zeros([_BINS], tl.int32)
    if not DETAIL:
        stride = tl.load(entry + _STRIDE)
        counted_zeros = zeros
    if W is not None:
        weight = _chunk(entry, 1, start, W, AXES, ALIGNED)
        w_none = _bits(tl.zeros([TILE], W))
        w_limit: tl.constexpr = _limit(w_none)
        w_square, w_largest, dot, w_odd = total, w_none - 1, total, zeros
    if P is not None:
        previous = _chunk(entry, 2, start, P, AXES, ALIGNED)
        p_limit: tl.constexpr = _limit(_bits(tl.zeros([1], P)))
        compared, moving = zeros, zeros  # moving: halves, and those of which that flipped
        p_dot, g_square, p_square = total, total, total
    if KEEP:
        room = _chunk(entry, 3, start, G, AXES, ALIGNED)

    for n in range(tl.cdiv(entries, TILE)):
        at = n * TILE + lanes
        inside, whole = at < entries, n * TILE + TILE <= entries
        x = _read(gradient, _offset(entry, 0, start, at, AXES), inside, whole)
        bits = _bits(x)
        magnitude = _magnitude(bits)
        fine = (magnitude < limit) & inside
        there = fine & (magnitude > 0)
        key = tl.where(bits < 0, -magnitude, magnitude)
        odd += _halves(magnitude > limit, magnitude == limit)
        signs += _halves((magnitude == 0) & inside, there & (bits < 0))
        least = tl.minimum(least, tl.where(fine, key, limit))
        most = tl.maximum(most, tl.where(fine, key, -limit))
        smallest = tl.minimum(smallest, tl.where(there, magnitude, limit))
        ahead = fine & (magnitude > head)
        head, tile = tl.where(ahead, magnitude, head), tl.where(ahead, n, tile)
        if DETAIL:
            histogram += tl.histogram(_bucket(bits), _BINS, mask=there)
        else:
            taken = inside
            if stride > 1:
                taken = _sampled(start + at, stride) & inside
            counted_zeros += ((magnitude == 0) & taken).to(tl.int32)
            taken = taken & there
            if tl.max(taken.to(tl.int32)) > 0:
                histogram += tl.histogram(_bucket(bits), _BINS, mask=taken)
        g = tl.where(fine, _wide(x), 0.0)
        total += g
        abs_total += tl.abs(g)
        square_total += g * g
        if W is not None:
            y = _read(weight, _offset(entry, 1, start, at, AXES), inside, whole)
            w_magnitude = _magnitude(_bits(y))
            w_fine = (w_magnitude < w_limit) & inside
            w = tl.where(w_fine, _wide(y), 0.0)
            w_square += w * w
            w_largest = tl.maximum(w_largest, tl.where(w_fine, w_magnitude, -1))
            dot += g * w
            w_odd += (w_magnitude >= w_limit).to(tl.int32)
        if P is not None:
            z = _read(previous, _offset(entry, 2, start, at, AXES), inside, whole)
            p_bits = _bits(z)
            p_magnitude = _magnitude(p_bits)
            both = fine & (p_magnitude < p_limit)
            going = both & there & (p_magnitude > 0)
            p = tl.where(both, _wide(z), 0.0)
            h = tl.where(both, g, 0.0)
            compared += both.to(tl.int32)
            moving += _halves(going, going & ((bits < 0) != (p_bits < 0)))
            p_dot += h * p
            g_square += h * h
            p_square += p * p
        if KEEP:
            tl.store(room + _offset(entry, 3, start, at, AXES), x, mask=inside)

    chunk = first + number
    row, buckets = partials + chunk * _PADDED, tl.arange(0, _BINS)
    tl.store(heads + chunk * TILE + lanes, head)
    tl.store(tiles + chunk * TILE + lanes, tile)
    tl.store(bins + chunk * _BINS + buckets, histogram)
    zero, negative, nan, inf = _low(signs), _high(signs), _low(odd), _high(odd)
    tl.store(row + _COUNTED_ZERO, (zero if DETAIL else tl.sum(counted_zeros)).to(tl.float64))
    tl.store(row + _NEGATIVE, negative.to(tl.float64))
    tl.store(row + _POSITIVE, (entries - zero - negative - nan - inf).to(tl.float64))
    tl.store(row + _ZERO, zero.to(tl.float64))
    tl.store(row + _NANS, nan.to(tl.float64))
    tl.store(row + _INFS, inf.to(tl.float64))
    tl.store(row + _SUM, tl.sum(total))
    tl.store(row + _ABS_SUM, tl.sum(abs_total))
    tl.store(row + _SQUARE_SUM, tl.sum(square_total))
    tl.store(row + _MIN, _signed(tl.min(least)))
    tl.store(row + _MAX, _signed(tl.max(most)))
    tl.store(row + _ABS_MAX, _peak(head))
    tl.store(row + _ABS_MIN, _value(tl.min(smallest)))
    if W is not None:
        tl.store(row + _W_SQUARE, tl.sum(w_square))
        tl.store(row + _W_MAX, _peak(w_largest))
        tl.store(row + _DOT, tl.sum(dot))
        tl.store(row + _W_NONFINITE, tl.sum(w_odd).to(tl.float64))
    if P is not None:
        tl.store(row + _COMPARED, tl.sum(compared).to(tl.float64))
        tl.store(row + _MOVING, _low(moving).to(tl.float64))
        tl.store(row + _FLIPPED, _high(moving).to(tl.float64))
        tl.store(row + _P_DOT, tl.sum(p_dot))
        tl.store(row + _G_SQUARE, tl.sum(g_square))
        tl.store(row + _P_SQUARE, tl.sum(p_square))


@triton.jit
def _merge(partials, bins, first, count, MERGED: tl.constexpr):
    """Sums, minima and maxima of the columns of some partial rows, and their histogram."""
    columns, buckets = tl.arange(0, _PADDED), tl.arange(0, _BINS)
    total, histogram = tl.zeros([_PADDED], tl.float64), tl.zeros([_BINS], tl.int64)
    least, most = total + _INF, total - _INF
    for some in range(0, count, MERGED):
        at = some + tl.arange(0, MERGED).to(tl.int64)[:, None]
        there = (at < count) & (columns <= _COUNTED_ZERO)[None, :]
        part = _written(partials + (first + at) * _PADDED + columns[None, :], there, 0.0)
        total += tl.sum(part, axis=0)
        least = tl.minimum(least, tl.min(tl.where(there, part, _INF), axis=0))
        most = tl.maximum(most, tl.max(tl.where(there, part, -_INF), axis=0))
        counts = _written(bins + (first + at) * _BINS + buckets[None, :], at < count, 0)
        histogram += tl.sum(counts.to(tl.int64), axis=0)
    return total, least, most, histogram


@triton.jit
def _is_lower(columns):
    """Columns that merge by their minimum."""
    return (columns == _MIN) | (columns == _ABS_MIN)


@triton.jit
def _is_upper(columns):
    """Columns that merge by their maximum."""
    return (columns == _MAX) | (columns == _ABS_MAX) | (columns == _W_MAX)


@triton.jit
def _merge_block(partials, bins, first, count, into, MERGED: tl.constexpr):
    """Partial rows as one."""
    total, least, most, histogram = _merge(partials, bins, first, count, MERGED)
    columns = tl.arange(0, _PADDED)
    value = tl.where(_is_lower(columns), least, tl.where(_is_upper(columns), most, total))
    tl.store(partials + into * _PADDED + columns, value)
    tl.store(bins + into * _BINS + tl.arange(0, _BINS), histogram.to(tl.int32))


@triton.jit
def _nobody(none):
    """Room for the largest, by magnitude and index, that is filled from the first place on: nothing has magnitude -1."""
    return tl.zeros([_TOP], none.dtype) - 1, -tl.arange(0, _TOP).to(tl.int64) + _LATE


@triton.jit
def _take(best, place, magnitude, index):
    """The largest of two lots, of equal ones the first. Magnitudes below 0 are nothing."""
    most, floor = tl.max(magnitude), tl.min(best)
    first, last = tl.min(tl.where(magnitude == most, index, _LATE)), tl.max(tl.where(best == floor, place, -1))
    while (most > floor) | ((most == floor) & (most >= 0) & (first < last)):
        gone = (best == floor) & (place == last)
        best, place = tl.where(gone, most, best), tl.where(gone, first, place)
        magnitude = tl.where(index == first, -1, magnitude)
        most, floor = tl.max(magnitude), tl.min(best)
        first, last = tl.min(tl.where(magnitude == most, index, _LATE)), tl.max(tl.where(best == floor, place, -1))
    return best, place


@triton.jit
def _largest(
    entry, partials, heads, tiles, length,
    G: tl.constexpr, AXES: tl.constexpr, TILE: tl.constexpr, PEAKS: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    """The largest of a tensor, in any order: the bits of their magnitudes, and indices."""
    rows, count, numel = tl.load(entry + _FIRST), tl.load(entry + _COUNT), tl.load(entry + _NUMEL)
    peaks, chunks = _nobody(tl.zeros([1], tl.float64))
    for some in range(0, count, PEAKS):
        at = some + tl.arange(0, PEAKS).to(tl.int64)
        peak = _written(partials + (rows + at) * _PADDED + _ABS_MAX, at < count, -1.0)
        peaks, chunks = _take(peaks, chunks, peak, at)

    nothing = _bits(tl.zeros([1], G))
    chosen = peaks >= 0
    chunks = tl.where(chosen, chunks, 0)[:, None]
    floor = tl.min(peaks)
    best, place = _nobody(nothing)
    for some in range(0, TILE, SEARCHED):
        lanes = some + tl.arange(0, SEARCHED).to(tl.int64)[None, :]
        at = (rows + chunks) * TILE + lanes
        there = chosen[:, None] & (lanes < TILE)
        head = _written(heads + at, there, -1)
        head = tl.where(_value(head) >= floor, head, -1)
        index = chunks * length + _written(tiles + at, there, 0).to(tl.int64) * TILE + lanes
        best, place = _take(best, place, head, index)

    chosen = best >= 0
    floor = tl.min(best)
    place = tl.where(chosen, place, 0)
    chunk = place // length
    start = (chunk * length + (place - chunk * length) % TILE)[:, None]
    stop = tl.where(chosen, tl.minimum(chunk * length + length, numel), 0)[:, None]
    gradient = _address(entry, 0, G, AXES)
    best, place = _nobody(nothing)
    for some in range(0, tl.minimum(length, numel), TILE * SEARCHED):
        at = start + some + tl.arange(0, SEARCHED).to(tl.int64)[None, :] * TILE
        x = tl.load(gradient + _place(entry, 0, at, AXES), mask=at < stop, other=0.0)
        magnitude = _magnitude(_bits(x))
        real = (at < stop) & (magnitude < _limit(magnitude)) & (magnitude >= floor)
        best, place = _take(best, place, tl.where(real, magnitude, -1), at)
    return best, place


@triton.jit
def _write_quantiles(row, histogram, zero, low, high):
    """As `fields.quantiles`: the one bucket that holds the rank, and the place in it. Negative buckets rise by magnitude."""
    buckets = tl.arange(0, _BINS)
    negative = buckets < _BUCKETS
    total = tl.sum(histogram) + zero
    negatives, passed = tl.sum(tl.where(negative, histogram, 0.0)), tl.cumsum(histogram, axis=0)
    after = tl.where(negative, negatives - passed + histogram, zero + passed)
    power = (((buckets % _BUCKETS + _LOWEST).to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    start = tl.where(negative, -2 * power, power)
    for i in tl.static_range(5):
        rank = (tl.maximum(total - 1, 0.0) * _SHARES[i]).to(tl.int64).to(tl.float64)
        here = (after > rank) & (after - histogram <= rank)
        share = (rank - (after - histogram) + 0.5) / tl.maximum(histogram, 1.0)
        value = tl.sum(tl.where(here, start + share * power, 0.0))  # 0 where no bucket is: the rank is that of a zero
        value = tl.where(total > 0, tl.minimum(tl.maximum(value, low), high), float("nan"))
        tl.store(row + _QUANTILE + i, value)


@triton.jit
def _close(
    entry, first, count, partials, bins, heads, tiles, rows, length,
    G: tl.constexpr, W: tl.constexpr, P: tl.constexpr, DETAIL: tl.constexpr,
    AXES: tl.constexpr, TILE: tl.constexpr, MERGED: tl.constexpr, PEAKS: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    """The row of a tensor, from so many partial rows of its chunks or blocks."""
    row = rows + tl.load(entry + _ROW) * (_WIDTH if DETAIL else _LIGHT_WIDTH)
    columns = tl.arange(0, _PADDED)
    total, least, most, counts = _merge(partials, bins, first, count, MERGED)
    lower, upper = _is_lower(columns), _is_upper(columns)
    magnitude = (columns == _ABS_MAX) | (columns == _W_MAX)
    value = tl.where(lower, least, tl.where(upper, most, total))
    nothing = ((lower | upper) & (tl.abs(value) == _INF)) | (magnitude & (value < 0))
    value = tl.where(columns == _ENTRIES, tl.load(entry + _NUMEL).to(tl.float64), value)
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
    histogram = counts.to(tl.float64)
    _write_quantiles(row, histogram, zero, low, high)
    if DETAIL:
        tl.store(row + _HISTOGRAM + tl.arange(0, _BINS), histogram)

    best, place = _largest(entry, partials, heads, tiles, length, G, AXES, TILE, PEAKS, SEARCHED)
    before = (best[None, :] > best[:, None]) | ((best[None, :] == best[:, None]) & (place[None, :] < place[:, None]))
    rank = tl.sum(before.to(tl.int32), axis=1)
    real = best >= 0
    gradient = _address(entry, 0, G, AXES)
    g = tl.load(gradient + _place(entry, 0, place, AXES), mask=real, other=0.0)
    tl.store(row + _PARTIALS + rank, tl.where(real, _wide(g), float("nan")))
    tl.store(row + _INDICES + rank, tl.where(real, place, -1).to(tl.float64))
    if W is not None:
        weight = _address(entry, 1, W, AXES)
        w = tl.load(weight + _place(entry, 1, place, AXES), mask=real, other=0.0)
        tl.store(row + _VALUES + rank, tl.where(real, _wide(w), float("nan")))
    else:
        tl.store(row + _VALUES + rank, tl.full([_TOP], float("nan"), tl.float64))


# --- updates and samples ----------------------------------------------------------------------------------------------


@triton.jit
def compare(
    table, owners, partials, rows, length,
    U: tl.constexpr, B: tl.constexpr, A: tl.constexpr, L: tl.constexpr,
    AXES: tl.constexpr, ALIGNED: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """The rows of updates. `U` and `L` are None where the used and the loss's gradient are not there."""
    entry, number = _work(table, owners, WORDS)
    first, count = tl.load(entry + _FIRST), tl.load(entry + _COUNT)
    _moved(entry, number, partials + (first + number) * _MOVED, length, U, B, A, L, AXES, ALIGNED, TILE)
    if _is_last(entry + _ARRIVED, count):
        _settle(entry, partials + first * _MOVED, count, rows, U, L, MERGED)


@triton.jit
def _moved(
    entry, number, row, length,
    U: tl.constexpr, B: tl.constexpr, A: tl.constexpr, L: tl.constexpr,
    AXES: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The partial row of a chunk of an update."""
    start = number * length
    entries = tl.minimum(tl.load(entry + _NUMEL) - start, length).to(tl.int32)
    lanes = tl.arange(0, TILE)
    before, after = _chunk(entry, 1, start, B, AXES, ALIGNED), _chunk(entry, 2, start, A, AXES, ALIGNED)
    square, before_square = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64)
    used_square, dot, loss_dot = square, square, square
    moving = tl.zeros([TILE], tl.int32)
    against, stuck, nonfinite = moving, moving, moving
    if U is not None:
        used = _chunk(entry, 0, start, U, AXES, ALIGNED)
    if L is not None:
        loss = _chunk(entry, 3, start, L, AXES, ALIGNED)

    for n in range(tl.cdiv(entries, TILE)):
        at = n * TILE + lanes
        inside, whole = at < entries, n * TILE + TILE <= entries
        w = _wide(_read(before, _offset(entry, 1, start, at, AXES), inside, whole))
        new = _wide(_read(after, _offset(entry, 2, start, at, AXES), inside, whole))
        nonfinite += (inside & ~(tl.abs(new) < _INF)).to(tl.int32)
        dw = new - w
        finite = (tl.abs(dw) < _INF) & inside
        dw = tl.where(finite, dw, 0.0)
        w = tl.where(finite, w, 0.0)
        square += dw * dw
        before_square += w * w
        if U is not None:
            x = _read(used, _offset(entry, 0, start, at, AXES), inside, whole)
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
            x = _wide(_read(loss, _offset(entry, 3, start, at, AXES), inside, whole))
            loss_dot += tl.where(finite & (tl.abs(x) < _INF), x, 0.0) * dw

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
def _settle(entry, partials, count, rows, U: tl.constexpr, L: tl.constexpr, MERGED: tl.constexpr):
    """The row of an update, from so many partial rows."""
    columns = tl.arange(0, _MOVED)
    total = tl.zeros([_MOVED], tl.float64)
    for some in range(0, count, MERGED):
        at = some + tl.arange(0, MERGED).to(tl.int64)[:, None]
        there = (at < count) & ((columns >= _MOVE_SQUARE) & (columns <= _LOSS_DOT))[None, :]
        total += tl.sum(_written(partials + at * _MOVED + columns[None, :], there, 0.0), axis=0)
    value = tl.where(columns == _MOVE_ENTRIES, tl.load(entry + _NUMEL).to(tl.float64), total)
    value = tl.where(columns == _EXACT, 1.0, value)
    if U is None:
        value = tl.where((columns == _USED_SQUARE) | (columns == _MOVE_DOT), float("nan"), value)
    if L is None:
        value = tl.where(columns >= _LOSS_DOT, float("nan"), value)
    tl.store(rows + tl.load(entry + _ROW) * _UPDATES + columns, value, mask=columns < _UPDATES)


@triton.jit
def sample(table, rows, T: tl.constexpr, AXES: tl.constexpr, WORDS: tl.constexpr):
    """The samples of tensors, a program each."""
    entry = table + tl.program_id(0).to(tl.int64) * WORDS
    n = tl.load(entry + _NUMEL)
    lanes = tl.arange(0, _SAMPLES).to(tl.int64)
    at = tl.where(n > _SAMPLES, lanes * (n - 1) // (_SAMPLES - 1), lanes)
    x = tl.load(_address(entry, 0, T, AXES) + _place(entry, 0, at, AXES), mask=at < n, other=0.0)
    tl.store(rows + tl.load(entry + _ROW) * _SAMPLES + lanes, _wide(x))


# --- evidence ---------------------------------------------------------------------------------------------------------


@triton.jit
def _number(numbers, at: tl.constexpr):
    """A float64, from its bits: an argument would be float32."""
    return tl.load(numbers + at).to(tl.float64, bitcast=True)


@triton.jit
def add_moments(
    table, owners, numbers, length,
    G: tl.constexpr, D: tl.constexpr, AXES: tl.constexpr, ALIGNED: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add gradients to `mean, squares, positive, negative`: see `accumulate.add_moments`.

    `numbers`: share, weight and divisor. `D` is None for a divisor of 1, and a type where it is an address.
    """
    entry, number = _work(table, owners, WORDS)
    start = number * length
    entries = tl.minimum(tl.load(entry + _NUMEL) - start, length).to(tl.int32)
    gradient = _chunk(entry, 0, start, G, AXES, ALIGNED)
    mean, squares = _chunk(entry, 1, start, tl.float64, AXES, ALIGNED), _chunk(entry, 2, start, tl.float64, AXES, ALIGNED)
    positive, negative = _chunk(entry, 3, start, tl.int32, AXES, ALIGNED), _chunk(entry, 4, start, tl.int32, AXES, ALIGNED)
    share, weight = _number(numbers, 0), _number(numbers, 1)
    if D is None:
        divisor = 1.0
    elif D == tl.int64:
        divisor = _number(numbers, 2)
    else:
        divisor = _wide(tl.load(tl.load(numbers + 2).to(tl.pointer_type(D))))
    for n in range(tl.cdiv(entries, TILE)):
        at = n * TILE + tl.arange(0, TILE)
        inside, whole = at < entries, n * TILE + TILE <= entries
        g = _wide(_read(gradient, _offset(entry, 0, start, at, AXES), inside, whole))
        if D is not None:
            g = g / divisor
        m = _read(mean, _offset(entry, 1, start, at, AXES), inside, whole)
        step = g - m
        m += share * step
        tl.store(mean + _offset(entry, 1, start, at, AXES), m, mask=inside)
        place = _offset(entry, 2, start, at, AXES)
        tl.store(squares + place, _read(squares, place, inside, whole) + weight * (step * (g - m)), mask=inside)
        place = _offset(entry, 3, start, at, AXES)
        tl.store(positive + place, _read(positive, place, inside, whole) + (g > 0).to(tl.int32), mask=inside)
        place = _offset(entry, 4, start, at, AXES)
        tl.store(negative + place, _read(negative, place, inside, whole) + (g < 0).to(tl.int32), mask=inside)


@triton.jit
def _decay(kept, at, towards, share, inside):
    """Move some means towards what came."""
    was = tl.load(kept + at, mask=inside, other=0.0)
    tl.store(kept + at, was + share * (towards - was), mask=inside)


@triton.jit
def fold_decayed(
    table, owners, numbers, length, ALIGNED: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Let means decay towards gradients: see `accumulate.fold_decayed`. What is not finite has share 0."""
    entry, number = _work(table, owners, WORDS)
    start = number * length
    entries = tl.minimum(tl.load(entry + _NUMEL) - start, length).to(tl.int32)
    share = _number(numbers, 0)
    gradient = _chunk(entry, 0, start, tl.float64, 0, ALIGNED)
    mean, square = _chunk(entry, 1, start, tl.float64, 0, ALIGNED), _chunk(entry, 2, start, tl.float64, 0, ALIGNED)
    signs, seen = _chunk(entry, 3, start, tl.float32, 0, ALIGNED), _chunk(entry, 4, start, tl.float32, 0, ALIGNED)
    flips, moving = _chunk(entry, 5, start, tl.float32, 0, ALIGNED), _chunk(entry, 6, start, tl.float32, 0, ALIGNED)
    steps, last = _chunk(entry, 7, start, tl.int32, 0, ALIGNED), _chunk(entry, 8, start, tl.int8, 0, ALIGNED)
    for n in range(tl.cdiv(entries, TILE)):
        at = n * TILE + tl.arange(0, TILE)
        inside = at < entries
        g = tl.load(gradient + at, mask=inside, other=0.0)
        fine = tl.abs(g) < _INF
        g = tl.where(fine, g, 0.0)
        wide = tl.where(fine, share, 0.0)
        narrow = wide.to(tl.float32)
        sign = (g > 0).to(tl.float32) - (g < 0).to(tl.float32)
        was = tl.load(last + at, mask=inside, other=0)
        both = sign * was.to(tl.float32)  # 1: the same sign as before, -1: another, 0: one of them is 0
        _decay(mean, at, g, wide, inside)
        _decay(square, at, g * g, wide, inside)
        _decay(signs, at, sign, narrow, inside)
        _decay(seen, at, tl.abs(sign), narrow, inside)
        _decay(flips, at, (both < 0).to(tl.float32), narrow, inside)
        _decay(moving, at, tl.abs(both), narrow, inside)
        tl.store(steps + at, tl.load(steps + at, mask=inside, other=0) + fine.to(tl.int32), mask=inside)
        tl.store(last + at, tl.where(sign != 0, sign.to(tl.int8), was), mask=inside)
