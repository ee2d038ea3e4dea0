"""The single weights of the last moments, held until a step goes wrong, and then written: a flight recorder.

    a moment is wrong   where an entry of g, w or w + dw is NaN or infinite under no known loss scale, or |g| of what was
                        used is `FACTOR` times the median of the last `NORMS`, ten times their largest
    then                the most sensitive weights of each parameter, of the `LAST` moments before it, its own, and `AFTER`
                        behind it; histograms too where they were taken (`statistics/detail.py`: they double a step's cost)

History has all other columns of every step anyway. Nothing is copied or computed for it while a training is well: history
holds the same rows in memory. Rows are bounded, and so is how often it writes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from gradlens.blocks import Block, Detail
from gradlens.moments import Moments
from gradlens.records import Snapshot, Stage

LAST, AFTER = 32, 4  #: moments: a step has two as a rule
ROWS = 20_000  #: of all that is held: 50 MB of histograms and weights
MOST = 8  #: times that it writes
FACTOR, NORMS, FEW = 100.0, 100, 20

Held = tuple[int, Block, int, Detail | None]


class Flight:
    """Asked about each moment, in order: of which moments what is large is to be written now."""

    def __init__(self) -> None:
        self._held: deque[Held] = deque()
        self._rows = self._after = 0
        self._norms: deque[float] = deque(maxlen=NORMS)
        self.steps: list[int] = []  #: at which a moment was wrong, and it wrote

    def wrong(self, block: Block) -> list[bool]:
        """Of each moment of a block, whether it is."""
        of = block.columns
        unscaled = np.isnan(block.scale) | (block.scale == 1.0)
        spoilt = ((of["nan"] + of["inf"] > 0) & unscaled) | (of["weight_nonfinite"] > 0) | (of["update_nonfinite"] > 0)
        result: list[bool] = spoilt.any(axis=1).tolist()
        if block.stage == Stage.USED:
            norms = np.sqrt(np.maximum(np.nansum(of["square_sum"], axis=1), 0)).tolist()
            result = [bad or self._spikes(norm) for bad, norm in zip(result, norms, strict=True)]
        return result

    def take(
        self, moments: Moments, first: int, *, wrong: np.ndarray, written: np.ndarray
    ) -> Iterator[tuple[int, Snapshot]]:
        """Moments from number `first` on, and which are written anyway; gives those that are to be written beside."""
        if self._after or wrong.any():
            for at, (block, place) in enumerate(moments):
                yield from self._take(first + at, block, place, wrong=bool(wrong[at]), written=bool(written[at]))
        elif len(self.steps) < MOST:
            for at in np.flatnonzero(~written)[-LAST:].tolist():  # those before would be held, and let go of again
                block, place = moments[at]
                self._hold((first + at, block, place, block.details[place]))

    def _take(self, number: int, block: Block, at: int, *, wrong: bool, written: bool) -> Iterator[tuple[int, Snapshot]]:
        here: Held = (number, block, at, block.details[at])
        if wrong and self._after == 0 and len(self.steps) < MOST:
            self.steps.append(int(block.step[at]))
            self._after = AFTER + 1
            yield from map(_whole, self._held)
            self._held.clear()
            self._rows = 0
        if self._after:
            self._after -= 1
            if not written:
                yield _whole(here)
        elif not written and len(self.steps) < MOST:
            self._hold(here)

    def _hold(self, here: Held) -> None:
        self._held.append(here)
        self._rows += len(here[1].parameters)
        while self._held and (len(self._held) > LAST or self._rows > ROWS):
            self._rows -= len(self._held.popleft()[1].parameters)

    def _spikes(self, norm: float) -> bool:
        known = self._norms
        spikes = len(known) >= FEW and norm > 10 * max(known) and norm > FACTOR * float(np.median(known))
        if norm > 0:
            known.append(norm)
        return spikes


def _whole(held: Held) -> tuple[int, Snapshot]:
    number, block, at, detail = held
    return number, replace(block.part(at, at + 1), details=[detail]).snapshot(0)
