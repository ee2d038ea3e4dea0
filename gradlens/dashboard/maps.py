"""Layer by step matrices of a run, read a piece at a time.

A run may have more rows than fit in memory or in a second. So a matrix is *scanned*: some parameters at a time, over all
steps, for as long as a request may take; the page shows what is there and asks again until all of it is. What a run has
grown by is read in later scans. A scan is dropped when the run was continued or replaced, and the least used go first when
all of them take more than `MAX_BYTES`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradlens.dashboard.downsampling import MISSING, NONFINITE, SEEN, Cells, width_for
from gradlens.errors import choice
from gradlens.store import lock
from gradlens.store.run import Run

if TYPE_CHECKING:
    import pandas as pd

COLUMNS, MAX_CELLS = 600, 3_000_000  #: of a matrix: as many columns as a screen shows, fewer of very many parameters
ROWS = 1_000_000  #: read at once: some 100 MB with what is made of them
MAX_BYTES = 256 << 20  #: of all matrices together
LAG = 4  #: last steps of a run over ranks that are left for later while it is written: a rank may be late

#: Statuses without a gradient, and those whose gradient is not finite.
_FLAGS = {"nonfinite": NONFINITE, **dict.fromkeys(("frozen", "uncaptured", "absent", "excluded", "undefined"), MISSING)}


@dataclass(frozen=True)
class Quantity:
    """What colours a map."""

    name: str
    title: str
    columns: tuple[str, ...]  #: that it is made of
    log: bool = False
    bounds: tuple[float, float] | None = None  #: of the colour scale; None: those of the values
    value: Callable[[pd.DataFrame], np.ndarray] = lambda frame: frame.iloc[:, -1].to_numpy(np.float64)


QUANTITIES = {
    each.name: each
    for each in (
        Quantity("rms", "rms of the partials", ("rms",), log=True),
        Quantity(
            "balance",
            "share that should increase minus share that should decrease",
            ("increase_share", "decrease_share"),
            bounds=(-1, 1),
            value=lambda frame: (frame["increase_share"] - frame["decrease_share"]).to_numpy(np.float64),
        ),
        Quantity("update_ratio", "update ratio |dw| / |w|", ("update_ratio",), log=True),
        Quantity("cosine", "cosine with the last observed gradient", ("cosine",), bounds=(-1, 1)),
        Quantity(
            "agreement",
            "share of the weights that moved as their gradient asked",
            ("against_share",),
            bounds=(0, 1),
            value=lambda frame: 1 - frame["against_share"].to_numpy(np.float64),
        ),
    )
}


def quantity(name: str) -> Quantity:
    """The quantity of that name.

    Raises:
        ArgumentError: There is none.
    """
    if name not in QUANTITIES:
        raise choice("quantity", name, QUANTITIES)
    return QUANTITIES[name]


class Scan:
    """One quantity of one stage of a run, as far as it was read."""

    def __init__(self, asked: Quantity, stage: str) -> None:
        self._asked, self._stage = asked, stage
        self.guard = threading.Lock()
        self._reset((), [])

    def _reset(self, segments: tuple[str, ...], names: list[str]) -> None:
        self._segments, self.names = segments, names
        self.cells = Cells.empty(len(names))
        self._next: int | None = None  # the step from which on nothing was read
        self._sweep: Iterator[float] | None = None
        self.share = 0.0  #: of the sweep that was read

    @property
    def complete(self) -> bool:
        """Whether all that was there when the sweep began has been read."""
        return self._sweep is None

    @property
    def nbytes(self) -> int:
        """Memory."""
        return self.cells.nbytes

    def advance(self, run: Run, until: float) -> None:
        """Read on until that moment of the monotonic clock, and one piece at least."""
        names, segments = run.names(), _segments(run)
        if segments != self._segments or names != self.names:
            self._reset(segments, names)
        if self._sweep is None:
            self._sweep = self._pieces(run)
        for share in self._sweep:
            self.share = share
            if share < 1 and time.monotonic() >= until:
                return
        self._sweep, self.share = None, 1.0

    def _pieces(self, run: Run) -> Iterator[float]:
        extent = run.extent()
        if extent is None or not self.names:
            return
        rows, first, last = extent
        ranks = run.ranks()
        if len(ranks) > 1 and any(lock.held(run.path, rank) for rank in ranks):
            last -= LAG
        begin = first if self._next is None else self._next
        if last < begin:
            return
        columns = max(min(COLUMNS, MAX_CELLS // len(self.names)), 1)
        share = (last - begin + 1) / (last - first + 1) if last > first else 1.0
        each = max(rows * share / len(self.names), 1)  # rows a parameter, of all stages
        together = max(1, int(ROWS / each))
        stretch = last - begin + 1 if each <= ROWS else max(1, int((last - begin + 1) * ROWS / each))
        total = len(self.names) * (last - begin + 1)
        done = 0
        for at in range(0, len(self.names), together):
            for start in range(begin, last + 1, stretch):
                stop = min(start + stretch, last + 1)
                names = self.names[at : at + together]
                self._add(self._read(run, names, range(start, stop)), width_for(last - first + 1, columns), columns)
                done += len(names) * (stop - start)
                yield done / total
        self._next = last  # once more: of the last step not all stages may have been there

    def _read(self, run: Run, names: list[str], steps: range) -> pd.DataFrame:
        everyone = names if len(names) < len(self.names) else None
        columns = ["step", "parameter", "status", *self._asked.columns]
        return run.history(columns=columns, parameters=everyone, steps=steps, stage=self._stage)

    def _add(self, frame: pd.DataFrame, width: int, columns: int) -> None:
        place = {name: row for row, name in enumerate(self.names)}
        words, known = _codes(frame["parameter"])
        row = np.array([place.get(word, 0) for word in known], np.int64)[words]
        states, known = _codes(frame["status"])
        flag = np.array([SEEN | _FLAGS.get(word, 0) for word in known], np.uint8)[states]
        value = np.where(flag & MISSING, np.nan, self._asked.value(frame))
        width = max(width, self.cells.width)
        new = Cells.of(len(self.names), row, frame["step"].to_numpy(np.int64), value, flag, width)
        self.cells = self.cells.merge(new).within(columns)


def _codes(words: pd.Series) -> tuple[np.ndarray, list[str]]:
    codes, known = words.factorize()
    return codes, [str(word) for word in known]


def _segments(run: Run) -> tuple[str, ...]:
    return tuple(sorted(name for name in os.listdir(run.path / "segments") if name.endswith(".json")))


class Maps:
    """The scans of all runs that are looked at, the least used dropped first."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._scans: OrderedDict[tuple[str, str, str], Scan] = OrderedDict()
        self._guard = threading.Lock()

    def scan(self, run: Run, asked: Quantity, stage: str, until: float) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The matrix as far as it was read by that moment: what is known of it, and its numbers."""
        key = (str(run.path), asked.name, stage)
        with self._guard:
            scan = self._scans.pop(key, None) or Scan(asked, stage)
            self._scans[key] = scan
        with scan.guard:
            try:
                scan.advance(run, until)
            except Exception:
                with self._guard:
                    self._scans.pop(key, None)
                raise
            answer = answered(scan, asked, stage)
        self._shrink(key)
        return answer

    def _shrink(self, newest: tuple[str, str, str]) -> None:
        with self._guard:
            while sum(scan.nbytes for scan in self._scans.values()) > self._max_bytes and len(self._scans) > 1:
                oldest = next(iter(self._scans))
                if oldest == newest:
                    return
                del self._scans[oldest]


def answered(scan: Scan, asked: Quantity, stage: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A matrix for the page: what a cell shows, as a 16-bit number, and its flags."""
    cells = scan.cells
    header = {
        "quantity": asked.name,
        "title": asked.title,
        "log": asked.log,
        "bounds": asked.bounds,
        "stage": stage,
        "rows": cells.shape[0],
        "columns": cells.shape[1],
        "width": cells.width,
        "first_step": cells.first * cells.width,
        "complete": scan.complete,
        "share": scan.share,
    }
    return header, {"values": cells.codes(log=asked.log), "flags": cells.flags}
