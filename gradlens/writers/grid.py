"""A run as a bounded table of sums: rows are parameters or modules, columns are spans of steps.

    cell[sum, row, span]  =  sum over the row's parameters and the span's observed steps

Every number kept is a sum over disjoint things, so rows merge and spans merge by addition, exactly: when the run outgrows
its `SPANS`, spans are paired and are twice as long; when a model has more parameters than `ROWS`, its rows are modules.

What is read from a cell is a statistic of everything in it: an rms over all steps of the span leans to the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from gradlens.analysis.rules.base import judged
from gradlens.blocks import Block, block_of
from gradlens.records import Snapshot

ROWS, SPANS = 160, 240  #: 160 x 240 cells of 5 sums are 1.5 MB

_SQUARES, _FINITE, _INCREASE, _DECREASE, _NONFINITE = range(5)


class Grid:
    """Rows in model order. `rows` says which row a parameter is in, `labels` what the rows are."""

    def __init__(self, max_rows: int = ROWS, max_spans: int = SPANS) -> None:
        self._max_rows, self._max_spans = max_rows, max_spans
        self.rows: dict[str, int] = {}
        self.labels: tuple[str, ...] = ()
        self.first = 0  #: the first step
        self.span = 1  #: steps a column
        self.spans = 0  #: columns that the run has reached
        self._sums = np.zeros((5, 0, max_spans))

    def add(self, snapshot: Snapshot) -> None:
        """Count a step's snapshot in. Steps before the first are left out."""
        self.add_moments(block_of(snapshot), [0])

    def add_moments(self, block: Block, at: Sequence[int]) -> None:
        """Count moments of a block in, in order."""
        steps = block.step[at]
        if not self.spans:
            self.first = int(steps[0])
        counted = steps >= self.first
        if not counted.any() or not len(block.parameters):
            return
        moments, steps = np.asarray(at, np.int64)[counted], steps[counted]
        self._cover(block.names)
        while (int(steps.max()) - self.first) // self.span >= self._max_spans:
            self._fold()
        spans = (steps - self.first) // self.span
        self.spans = max(self.spans, int(spans.max()) + 1)
        cells = (self.at(block.names)[None, :] * self._max_spans + spans[:, None]).ravel()
        for total, values in zip(self._sums, _summands(block, moments), strict=True):
            total += np.bincount(cells, values.ravel(), total.size).reshape(total.shape)

    def at(self, names: Sequence[str]) -> np.ndarray:
        """The rows of some parameters, `[n]`."""
        return np.fromiter((self.rows[name] for name in names), np.int64, len(names))

    def members(self) -> list[list[str]]:
        """The parameters of each row."""
        result: list[list[str]] = [[] for _ in self.labels]
        for name, row in self.rows.items():
            result[row].append(name)
        return result

    @property
    def sums(self) -> np.ndarray:
        """The cells that the run has reached: `[5, rows, spans]`."""
        return self._sums[:, :, : self.spans]

    # --- growth -----------------------------------------------------------------------------------------------------

    def _cover(self, names: Sequence[str]) -> None:
        """Give every name a row. New ones come behind what precedes them in the model."""
        if self.rows.keys() >= set(names):
            return
        order = joined(list(self.rows), names)
        labels, rows = grouped(order, self._max_rows)
        sums = np.zeros((5, len(labels), self._max_spans))
        for members, old in zip(self.members(), self._sums.swapaxes(0, 1), strict=True):
            sums[:, rows[order.index(members[0])]] += old
        self.labels, self.rows, self._sums = labels, dict(zip(order, rows, strict=True)), sums

    def _fold(self) -> None:
        half = (self._max_spans + 1) // 2
        padded = np.zeros((*self._sums.shape[:2], 2 * half))
        padded[:, :, : self._max_spans] = self._sums
        self._sums[:] = 0
        self._sums[:, :, :half] = padded.reshape(*padded.shape[:2], half, 2).sum(axis=3)
        self.span *= 2
        self.spans = (self.spans + 1) // 2


def _summands(block: Block, moments: np.ndarray) -> list[np.ndarray]:
    """The five sums' shares, `[moments, n]` each: 0 for parameters that have no partials of their own."""
    names = ("positive", "negative", "zero", "square_sum", "nan", "inf")
    counts = {name: block.columns[name][moments] for name in names}
    own = judged(block)[moments]
    finite = counts["positive"] + counts["negative"] + counts["zero"]
    values = [counts["square_sum"], finite, counts["negative"], counts["positive"], counts["nan"] + counts["inf"]]
    return [np.where(own, np.nan_to_num(np.asarray(value, np.float64), posinf=np.inf), 0.0) for value in values]


# --- what sums say: `[5, ...]` in, `[...]` out; NaN where there is nothing to say it of --------------------------------


def rms(sums: np.ndarray) -> np.ndarray:
    """Root mean square of the partials."""
    return np.sqrt(_ratio(sums[_SQUARES], sums[_FINITE]))


def increase(sums: np.ndarray) -> np.ndarray:
    """Of the weights whose partial is not 0, the share that should increase."""
    return _ratio(sums[_INCREASE], sums[_INCREASE] + sums[_DECREASE])


def known(sums: np.ndarray) -> np.ndarray:
    """Whether any partial was seen, finite or not."""
    return sums[_FINITE] + sums[_NONFINITE] > 0


def nonfinite(sums: np.ndarray) -> np.ndarray:
    """How many partials were NaN or infinite."""
    return sums[_NONFINITE]


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)


# --- which rows there are -------------------------------------------------------------------------------------------


def joined(known: Sequence[str], names: Sequence[str]) -> list[str]:
    """Both sequences' names, the known ones in their order, a new one behind the known one that precedes it."""
    old = set(known)
    behind: dict[str | None, list[str]] = {}
    anchor = None if old.intersection(names) or not known else known[-1]
    for name in names:
        if name in old:
            anchor = name
        else:
            behind.setdefault(anchor, []).append(name)
    return [*behind.get(None, ()), *(each for name in known for each in (name, *behind.get(name, ())))]


def grouped(names: Sequence[str], most: int) -> tuple[tuple[str, ...], list[int]]:
    """At most `most` rows for the parameters: the labels, and the row of each name.

    Parameters themselves if they fit; else the modules that own them; else modules ever higher up; at last, neighbours.
    """
    for keys in _ever_coarser(names):
        labels = tuple(dict.fromkeys(keys))
        if len(labels) <= most:
            number = {label: i for i, label in enumerate(labels)}
            return labels, [number[key] for key in keys]
    size = -(-len(labels) // most)
    number = {label: i // size for i, label in enumerate(labels)}
    blocks = [labels[i : i + size] for i in range(0, len(labels), size)]
    return tuple(f"{block[0]} (+{len(block) - 1})" for block in blocks), [number[key] for key in keys]


def sections(labels: Sequence[str], few: int = 10, some: int = 28, most: int = 100) -> list[tuple[str, int, int]]:
    """Stretches of neighbouring rows that belong to one module: name, first row, row behind the last.

    At most `some`, if that does not leave less than `few`; else up to `most`, and beyond that neighbours are put together.
    """
    levels = [[(key, len(list(run))) for key, run in groupby(keys)] for keys in _ever_coarser(labels)]
    fitting = next((i for i, runs in enumerate(levels) if len(runs) <= some), len(levels))
    enough = fitting == 0 or (fitting < len(levels) and len(levels[fitting]) >= few)
    runs = levels[fitting if enough else fitting - 1]
    size = max(1, -(-len(runs) // most))
    result, start = [], 0
    for i in range(0, len(runs), size):
        stop = start + sum(count for _, count in runs[i : i + size])
        result.append((runs[i][0], start, stop))
        start = stop
    return result


def _ever_coarser(names: Sequence[str]) -> Iterator[list[str]]:
    yield list(names)
    owners = [name.split(".")[:-1] or [name] for name in names]
    for depth in range(max(map(len, owners), default=1), 0, -1):
        yield [".".join(owner[:depth]) for owner in owners]
