"""The course of a whole run in a few numbers a step, however long it is: the loss, and what the steps were like.

    loss     of each backward; of a step the mean over its backwards, and each of the first four by itself
    norm     |g| of what was used, of the whole model
    ratio    |dw| / |w| of the whole model, and the largest of a weight
    cosine   between this step's gradient and the last observed one
    weight   |w|

At most `CAPACITY` points are shown. When they are more, every second leaves and from then on every second step is taken:
points are steps, not means, so that what is seen of them is what happened.

    settled   points of which everything is known
    logs      (moment, step, value) of each number, as they came since then

`until(seq)` is the course as it was when that moment was the newest, exactly, for moments that are not settled. One thread
adds, any number read: what is read is a settled state and logs that only grow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from gradlens.blocks import Block
from gradlens.moments import Moments
from gradlens.records import Stage, Status

CAPACITY = 2048
PASSES = 4  #: backward passes of a step whose losses are told apart
LEAST = 256  #: steps that are settled together

_LOSSES = tuple(f"loss_{backward}" for backward in range(PASSES))


class _Log:
    """Numbers as they came: `[3, n]` moment, step, value. A reader keeps what it has while this grows."""

    __slots__ = ("_room", "rows")

    def __init__(self) -> None:
        self._room = np.empty((3, 32))
        self.rows = self._room[:, :0]

    def extend(self, *rows: np.ndarray) -> None:
        """Append `[m]` moments, steps and values."""
        n, more = self.rows.shape[1], len(rows[0])
        if n + more > self._room.shape[1]:
            room = np.empty((3, 2 * (n + more)))
            room[:, :n] = self.rows
            self._room = room
        self._room[:, n : n + more] = rows
        self.rows = self._room[:, : n + more]

    def until(self, seq: float) -> np.ndarray:
        """What had come at a moment."""
        rows = self.rows
        return rows[:, : np.searchsorted(rows[0], seq, side="right")]

    def after(self, seq: float) -> _Log:
        """What came after a moment, as a log of its own."""
        rows, result = self.rows, _Log()
        result.extend(*rows[:, np.searchsorted(rows[0], seq, side="right") :])
        return result


@dataclass(frozen=True, eq=False)
class _State:
    """Settled points, and logs of what came since; `begun` has a line for each step as it was first seen."""

    seen: int = 0
    stride: int = 1
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    values: dict[str, np.ndarray] = field(default_factory=dict)  #: [points]
    known: dict[str, np.ndarray] = field(default_factory=dict)
    begun: _Log = field(default_factory=_Log)
    logs: dict[str, _Log] = field(default_factory=dict)


class Course:
    """Points of a run, oldest first."""

    def __init__(self) -> None:
        self._state = _State()
        self._newest = -math.inf  # step
        self._last = -1.0  # moment that came
        self._end = math.inf  # of what is shown: a moment

    # --- growth -----------------------------------------------------------------------------------------------------

    def add(self, moments: Moments, first: int) -> None:
        """Take moments that have just come, in order, the first of them being number `first`: all of each block."""
        if not len(moments):
            return
        state = self._state
        seqs, steps = np.arange(first, first + len(moments)), moments.step
        before = np.maximum.accumulate(np.concatenate([[self._newest], steps[:-1]]))
        new = steps > before
        self._newest = max(self._newest, float(steps.max()))
        came: dict[str, list[np.ndarray]] = {}
        for block, own in moments.by_block():
            for name, where, values in _numbers(block):
                came.setdefault(name, []).append(np.stack([seqs[own][where], steps[own][where], values]))
        for name, parts in came.items():
            rows = np.concatenate(parts, axis=1)
            state.logs.setdefault(name, _Log()).extend(*rows[:, np.argsort(rows[0], kind="stable")])
        state.begun.extend(seqs[new], steps[new], steps[new])
        self._last = float(seqs[-1])

    def settle(self, seq: int) -> None:
        """Nothing is asked of the moments up to this one by themselves any more: of what they gave the last is kept."""
        state = self._state
        if state.begun.until(seq).shape[1] < LEAST:
            return
        whole = self.until(seq)
        seen, stride = whole.seen, whole.stride
        found = {name: whole._laid(name) for name in {*state.values, *state.logs}}
        self._state = _State(
            seen,
            stride,
            whole._points(),
            {name: values for name, (values, _) in found.items()},
            {name: known for name, (_, known) in found.items()},
            state.begun.after(seq),
            {name: log.after(seq) for name, log in state.logs.items()},
        )

    # --- as it is, and as it was --------------------------------------------------------------------------------------

    def until(self, seq: float) -> Course:
        """The course as it was when the moment of this number was the newest."""
        result = Course()
        result._end = min(seq, self._end)
        result._state = self._state
        return result

    def _still(self) -> Course:
        """This course while another thread adds to it."""
        return self if self._end < math.inf else self.until(self._last)

    def seen_at(self, seqs: np.ndarray) -> np.ndarray:
        """How many steps had been seen at each moment."""
        state = self._state
        return np.asarray(state.seen + np.searchsorted(state.begun.rows[0], seqs, side="right"))

    @property
    def seen(self) -> int:
        """Steps that were seen."""
        state = self._state
        return state.seen + state.begun.until(self._end).shape[1]

    @property
    def stride(self) -> int:
        """Each so many steps have a point."""
        stride, seen = self._state.stride, self.seen
        while -(-seen // stride) > CAPACITY:
            stride *= 2
        return stride

    @property
    def steps(self) -> list[int]:
        """The steps that have a point."""
        return [int(step) for step in self._still()._points()]

    def _points(self) -> np.ndarray:
        state, stride = self._state, self.stride
        fresh = state.begun.until(self._end)[1]
        return np.concatenate([state.steps[:: stride // state.stride], fresh[-state.seen % stride :: stride]])

    def __len__(self) -> int:
        return len(self._still()._points())

    def _laid(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Of each point the value that came last, and whether one came."""
        state, steps = self._state, self._points()
        values, known = np.full(len(steps), np.nan), np.zeros(len(steps), bool)
        if name in state.values:
            every = self.stride // state.stride
            old = state.values[name][::every]
            values[: len(old)], known[: len(old)] = old, state.known[name][::every]
        if name in state.logs and len(steps):
            _, of, came = state.logs[name].until(self._end)
            at = np.minimum(np.searchsorted(steps, of), len(steps) - 1)
            there = steps[at] == of
            values[at[there]], known[at[there]] = came[there], True
        return values, known

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps `[k]` and values `[k]`, of the steps that have one."""
        still = self._still()
        values, known = still._losses() if name == "loss" else still._laid(name)
        return still._points()[known].astype(np.int64), values[known]

    def _losses(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean over a step's backwards; where none was read, the loss of what was used stands in."""
        each = [self._laid(name) for name in _LOSSES]
        count = np.add.reduce([known.astype(int) for _, known in each])
        total = np.add.reduce([np.where(known, values, 0.0) for values, known in each])
        used, stands_in = self._laid("loss_used")
        return np.where(count > 0, total / np.maximum(count, 1), used), (count > 0) | stands_in

    def losses(self) -> dict[int, float]:
        """The loss by step."""
        return dict(zip(*(values.tolist() for values in self.series("loss")), strict=True))


def _numbers(block: Block) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What a block says: names, the moments that say it, and values."""
    losses = block.scalar("loss")
    told = np.array(["loss" in observed for observed in block.scalars], bool)
    if block.stage == Stage.USED:
        for name, values in _used(block).items():
            where = np.flatnonzero(~np.isnan(values))
            yield name, where, values[where]
        where = np.flatnonzero(told)
        yield "loss_used", where, losses[where]
        return
    norms = np.sqrt(_total(block, "square_sum", _kept(block)))
    for backward in range(PASSES):
        own = block.backward == backward
        yield f"norm_{backward}", np.flatnonzero(own), norms[own]
        yield _LOSSES[backward], np.flatnonzero(own & told), losses[own & told]


def _kept(block: Block) -> np.ndarray:
    return block.has(Status.OK, Status.ZERO, Status.NONFINITE)


def _total(block: Block, name: str, kept: np.ndarray) -> np.ndarray:
    """`[m]` a column added up over the rows that are kept."""
    values = block.columns[name]
    return np.asarray(np.where(kept & ~np.isnan(values), values, 0).sum(axis=1), np.float64)


def _used(block: Block) -> dict[str, np.ndarray]:
    kept = _kept(block)
    moved, before = (_total(block, name, kept) for name in ("update_square_sum", "update_before_square_sum"))
    flips = _total(block, "flip_square_sum", kept) ** 0.5 * _total(block, "flip_previous_square_sum", kept) ** 0.5
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "norm": np.where(kept.any(axis=1), np.sqrt(_total(block, "square_sum", kept)), np.nan),
            "weight": np.where(kept.any(axis=1), np.sqrt(_total(block, "weight_square_sum", kept)), np.nan),
            "ratio": np.where(before > 0, np.sqrt(moved / before), np.nan),
            "cosine": np.where(flips > 0, _total(block, "flip_dot", kept) / flips, np.nan),
        }
