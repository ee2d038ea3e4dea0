"""A million steps as some hundred columns, in which no spike vanishes.

    kept(steps, values, columns)     which points of lines to draw: of each column the lowest, the highest, the first gap
    largest_of_squares(matrix, most) a matrix of many weights, made small
    Cells                            a matrix [rows, columns]: the lowest and highest value of each cell, and what was seen

A column of a matrix is a run of `width` steps, `width` a power of two that begins at a multiple of itself. So two matrices
of one run always fit: the finer is made coarser by joining neighbours, and both are merged. Joining and merging keep the
lowest and the highest value, hence a matrix does not depend on the order or the pieces in which a run was read.

    Cells.of(all rows) == Cells.of(some rows).merge(Cells.of(the others))

What a cell shows is the value farther from the middle of its row: a spike, or a hole. This module knows numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SEEN, NONFINITE, MISSING = (
    1,
    2,
    4,
)  #: bits of `Cells.flags`: a row, one with values that are not finite, one without a gradient


def kept(steps: np.ndarray, lines: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """The rising places of the points to draw of lines over the same rising steps.

    All, where there are few. Otherwise, of each of `columns` equal stretches of steps and each line, the lowest, the highest
    and the first that is NaN, and the first and last point of all.
    """
    count = len(steps)
    if count <= 2 * columns or not lines:
        return np.arange(count)
    first, last = int(steps[0]), int(steps[-1])
    column = (steps - first).astype(np.float64) * (columns / max(last - first + 1, 1))
    begins = np.flatnonzero(np.diff(column.astype(np.int64), prepend=-1))
    chosen = [np.array([0, count - 1])]
    for line in lines:
        gap = np.isnan(line)
        chosen.append(_first_of(np.fmin.reduceat(line, begins), line, begins))
        chosen.append(_first_of(np.fmax.reduceat(line, begins), line, begins))
        if gap.any():
            chosen.append(_first_of(np.ones(len(begins)), gap.astype(np.float64), begins))
    return np.unique(np.concatenate(chosen))


def _first_of(wanted: np.ndarray, values: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """In each stretch the first place that holds what is wanted there; none where nothing does."""
    lengths = np.diff(begins, append=len(values))
    hits = np.flatnonzero(values == np.repeat(wanted, lengths))
    stretch = np.searchsorted(begins, hits, side="right")
    return hits[np.flatnonzero(np.diff(stretch, prepend=-1))]


def width_for(steps: int, columns: int) -> int:
    """The smallest power of two of which `columns` cover so many steps."""
    return 1 << max(-(-steps // max(columns, 1)) - 1, 0).bit_length()


def largest_of_squares(values: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """Flat places of a matrix with at most so many rows and columns: in each square of neighbours the value of largest size,
    or one that is not finite; and the side of the squares."""
    rows, columns = values.shape
    side = max(-(-max(rows, columns, 1) // most), 1)
    if side == 1:
        return np.arange(rows * columns, dtype=np.int32).reshape(rows, columns), 1
    padded = np.full((-(-rows // side) * side, -(-columns // side) * side), -1.0)
    padded[:rows, :columns] = np.where(np.isfinite(values), np.abs(values), np.inf)
    squares = padded.reshape(padded.shape[0] // side, side, padded.shape[1] // side, side).transpose(0, 2, 1, 3)
    place = squares.reshape(*squares.shape[:2], -1).argmax(axis=2)
    row = np.arange(squares.shape[0])[:, None] * side + place // side
    column = np.arange(squares.shape[1])[None] * side + place % side
    return (row * columns + column).astype(np.int32), side


@dataclass(frozen=True, eq=False)
class Cells:
    """The lowest and highest finite value of each row in each column of steps; NaN of none."""

    width: int  #: steps of a column
    first: int  #: the number of the first column: it begins at step `first * width`
    low: np.ndarray  #: float32 [rows, columns]
    high: np.ndarray
    flags: np.ndarray  #: uint8

    @classmethod
    def empty(cls, rows: int, width: int = 1) -> Cells:
        """Nothing seen: the identity of `merge`."""
        nothing = np.full((rows, 0), np.nan, np.float32)
        return cls(width, 0, nothing, nothing, np.zeros((rows, 0), np.uint8))

    @classmethod
    def of(cls, rows: int, row: np.ndarray, step: np.ndarray, value: np.ndarray, flag: np.ndarray, width: int) -> Cells:
        """From one value a (row, step), in any order."""
        if not len(step):
            return cls.empty(rows, width)
        column = step // width
        first = int(column.min())
        shape = (rows, int(column.max()) - first + 1)
        at = row * shape[1] + (column - first)
        flags = np.zeros(shape, np.uint8)
        np.bitwise_or.at(flags.reshape(-1), at, flag.astype(np.uint8))
        finite = np.isfinite(value)
        at, value = at[finite], _narrow(value[finite])
        low, high = np.full(shape, np.inf, np.float32), np.full(shape, -np.inf, np.float32)
        np.minimum.at(low.reshape(-1), at, value)
        np.maximum.at(high.reshape(-1), at, value)
        none = np.ones(shape, bool)
        none.reshape(-1)[at] = False
        low[none] = high[none] = np.nan
        return cls(width, first, low, high, flags)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.flags.shape

    @property
    def nbytes(self) -> int:
        """Memory."""
        return self.low.nbytes + self.high.nbytes + self.flags.nbytes

    @property
    def stop(self) -> int:
        """The number of the column after the last."""
        return self.first + self.shape[1]

    def coarser(self, width: int) -> Cells:
        """The same with wider columns."""
        cells = self
        while cells.width < width:
            cells = cells._halved()
        return cells

    def _halved(self) -> Cells:
        rows, columns = self.shape
        if not columns:
            return Cells.empty(rows, 2 * self.width)
        first, stop = self.first // 2, -(-self.stop // 2)
        wide = self._spread(2 * first, 2 * stop)
        pairs = (rows, stop - first, 2)
        return Cells(
            2 * self.width,
            first,
            np.fmin.reduce(wide.low.reshape(pairs), axis=2),
            np.fmax.reduce(wide.high.reshape(pairs), axis=2),
            np.bitwise_or.reduce(wide.flags.reshape(pairs), axis=2),
        )

    def _spread(self, first: int, stop: int) -> Cells:
        """The same from one column to another, which lie outside or at its ends."""
        if (first, stop) == (self.first, self.stop):
            return self
        rows, columns = self.shape
        low = np.full((rows, stop - first), np.nan, np.float32)
        high, flags = low.copy(), np.zeros(low.shape, np.uint8)
        here = slice(self.first - first, self.first - first + columns)
        low[:, here], high[:, here], flags[:, here] = self.low, self.high, self.flags
        return Cells(self.width, first, low, high, flags)

    def merge(self, other: Cells) -> Cells:
        """Both of them, at the wider of their widths."""
        width = max(self.width, other.width)
        a, b = self.coarser(width), other.coarser(width)
        if not a.shape[1] or not b.shape[1]:
            return b if not a.shape[1] else a
        first, stop = min(a.first, b.first), max(a.stop, b.stop)
        a, b = a._spread(first, stop), b._spread(first, stop)
        return Cells(width, first, np.fmin(a.low, b.low), np.fmax(a.high, b.high), a.flags | b.flags)

    def within(self, columns: int) -> Cells:
        """As coarse as it takes to have no more columns than that."""
        cells = self
        while cells.shape[1] > columns:
            cells = cells._halved()
        return cells

    def codes(self, *, log: bool) -> np.ndarray:
        """What each cell shows, as int16: of its lowest and highest value the one farther from the middle of its row."""
        low, high = encoded(self.low, log=log), encoded(self.high, log=log)
        if not self.shape[1]:
            return low
        middle = _middle(low, high)[:, None]
        upper = np.abs(high.astype(np.int32) - middle) >= np.abs(low.astype(np.int32) - middle)
        return np.where(upper, high, low)


#: Codes: 500 a decade on a logarithmic scale (half a percent), 30,000 a unit on a linear one; of nothing and of 0 apart.
NOTHING, ZERO, PER_DECADE, PER_ONE = -32768, -32767, 500, 30_000


def encoded(values: np.ndarray, *, log: bool) -> np.ndarray:
    """Numbers as int16."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.log10(values) * PER_DECADE if log else values * PER_ONE
        result = np.clip(np.rint(scaled), -32_000, 32_000)
        result = np.where(np.isnan(values), NOTHING, result)
    if log:
        result = np.where(values <= 0, ZERO, result)
    return result.astype(np.int16)


def _narrow(value: np.ndarray) -> np.ndarray:
    """As float32, in which nothing becomes 0 or infinite that was neither."""
    most, least = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    with np.errstate(under="ignore"):
        narrow = np.clip(value, -most, most).astype(np.float32)
    return np.where((narrow == 0) & (value != 0), np.copysign(least, value).astype(np.float32), narrow)


def _middle(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The median of each row over its cells' codes; those of nothing, which sort first, are left out."""
    both = np.sort(np.concatenate([low, high], axis=1), axis=1)
    nothing = (both == NOTHING).sum(axis=1)
    at = np.minimum(nothing + (both.shape[1] - nothing - 1) // 2, both.shape[1] - 1)
    return both[np.arange(len(both)), at].astype(np.int32)
