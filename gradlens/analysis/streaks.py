"""For how many steps in a row a condition has held: "on each of the last n observed steps", once for all rules.

    answers [moments, parameters]   1 it holds, 0 it does not, -1 unknown
    lasting [moments, parameters]   it holds at this moment, and has on each of the last n steps

A step may have several moments: it must hold at each that can say, and at least one must be able to. Blocks end anywhere,
within a step too: what is not over is carried to the next block of the stage. Parameters are followed by name.
"""

from __future__ import annotations

import numpy as np

from gradlens.analysis.history import Columns
from gradlens.records import Parameters


class Streaks:
    """One condition, on every stage."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._stages: dict[str, _Stage] = {}

    def lasting(self, columns: Columns, answers: np.ndarray) -> np.ndarray:
        """Where it has lasted; the blocks of a stage come in order."""
        if self._steps == 1:
            return np.asarray(answers == 1)
        stage = self._stages.setdefault(columns.stage, _Stage())
        return stage.lasting(columns, answers, self._steps)


class _Stage:
    """What one block leaves to the next, by parameter."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._of: tuple[Parameters, np.ndarray] | None = None
        self._run = np.zeros(0, np.int64)  # steps on which it held, up to the one before `ordinal`
        self._one = np.zeros(0, bool)  # of the step `ordinal`: somewhere it holds, somewhere it does not
        self._zero = np.zeros(0, bool)
        self._ordinal = np.zeros(0, np.int64)

    def lasting(self, columns: Columns, answers: np.ndarray, steps: int) -> np.ndarray:
        at = self._at(columns.parameters)
        ordinal = np.array([moment.ordinal for moment in columns.moments], np.int64)
        starts = np.flatnonzero(np.concatenate([[True], ordinal[1:] != ordinal[:-1]]))
        ones, zeros = answers == 1, answers == 0
        one, zero = (np.logical_or.reduceat(values, starts, axis=0) for values in (ones, zeros))  # by step
        same, next_ = self._ordinal[at] == ordinal[0], self._ordinal[at] == ordinal[0] - 1
        carried = np.where(next_ & self._one[at] & ~self._zero[at], self._run[at] + 1, np.where(same, self._run[at], 0))
        left = self._zero[at] & same
        one[0] |= self._one[at] & same
        zero[0] |= left
        before = _runs(one & ~zero, np.diff(ordinal[starts]) != 1, carried)
        self._run[at], self._one[at], self._zero[at], self._ordinal[at] = before[-1], one[-1], zero[-1], ordinal[-1]
        if not ones.any():
            return ones
        step = np.cumsum(np.isin(np.arange(len(ordinal)), starts)) - 1
        broken = np.cumsum(zeros, axis=0)
        broken = (broken - (broken - zeros)[starts][step]) > 0
        broken[step == 0] |= left
        return np.asarray(ones & ~broken & (before[step] >= steps - 1))

    def _at(self, parameters: Parameters) -> np.ndarray:
        if self._of is None or self._of[0] is not parameters:
            for name in parameters.names:
                self._places.setdefault(name, len(self._places))
            more = len(self._places) - len(self._run)
            if more:
                self._run, self._ordinal = (np.concatenate([a, np.full(more, -2)]) for a in (self._run, self._ordinal))
                self._one, self._zero = (np.concatenate([a, np.zeros(more, bool)]) for a in (self._one, self._zero))
            self._of = parameters, np.array([self._places[name] for name in parameters.names], np.int64)
        return self._of[1]


def _runs(held: np.ndarray, gap: np.ndarray, carried: np.ndarray) -> np.ndarray:
    """`[steps, n]` on how many steps before each it held without a break; `gap` is before each but the first."""
    place = np.arange(len(held))[:, None]
    fresh = np.zeros(held.shape, bool)  # where a run begins again: nothing before counts
    fresh[1:] = ~held[:-1] | gap[:, None]
    last = np.maximum.accumulate(np.where(fresh, place, -1), axis=0)
    return np.asarray(np.where(last < 0, place + carried, place - last))
