"""The course of a whole run in a few numbers a step, however long it is: the loss, and what the steps were like.

    loss     of each backward; of a step the mean over its backwards, and each of the first four by itself
    norm     |g| of what was used, of the whole model
    ratio    |dw| / |w| of the whole model, and the largest of a weight
    cosine   between this step's gradient and the last observed one
    weight   |w|

At most `CAPACITY` points are kept. When they are full, every second leaves and from then on every second step is taken:
points are steps, not means, so that what is seen of them is what happened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from gradlens.blocks import Block
from gradlens.records import Stage, Status

CAPACITY = 2048
PASSES = 4  #: backward passes of a step whose losses are told apart


@dataclass(eq=False)
class Course:
    """Points of a run, oldest first."""

    stride: int = 1
    seen: int = 0  #: steps that were seen
    steps: list[int] = field(default_factory=list)
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    _step: int = -1
    _taken: bool = False

    def add(self, block: Block) -> None:
        """Take the moments of a block that has just come, in order."""
        used = block.stage == Stage.USED
        numbers = _used(block) if used else _pass(block)
        losses = block.scalar("loss")
        for at, step in enumerate(block.step.tolist()):
            point = self._point(step)
            if point is None:
                continue
            backward = int(block.backward[at])
            if used:
                point.update((name, value) for name, values in numbers.items() if not math.isnan(value := float(values[at])))
            elif backward < PASSES:
                point[f"norm_{backward}"] = float(numbers["norm"][at])
            if "loss" in block.scalars[at]:
                _add_loss(point, float(losses[at]), None if used else backward)
            if not used:
                point["backwards"] = max(point.get("backwards", 0), backward + 1)

    def _point(self, step: int) -> dict[str, float] | None:
        """The point of a step; None of one that is left out."""
        known = self.points.get(step)
        if known is not None:
            return known
        if step != self._step and step > self._step:
            self._step = step
            self._taken = self.seen % self.stride == 0
            self.seen += 1
            if self._taken:
                if len(self.steps) >= CAPACITY:
                    self._thin()
                self.steps.append(step)
                self.points[step] = {}
                return self.points[step]
        return None

    def _thin(self) -> None:
        self.steps = self.steps[::2]
        self.points = {step: self.points[step] for step in self.steps}
        self.stride *= 2

    def __len__(self) -> int:
        return len(self.steps)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps `[k]` and values `[k]`, of the steps that have one."""
        points = self.points
        steps = [step for step in list(self.steps) if name in points.get(step, ())]
        return np.asarray(steps, np.int64), np.asarray([points[step][name] for step in steps], np.float64)

    def losses(self) -> dict[int, float]:
        """The loss by step."""
        return dict(zip(*(values.tolist() for values in self.series("loss")), strict=True))


def _add_loss(point: dict[str, float], loss: float, backward: int | None) -> None:
    """The loss of a step is the mean over its backwards; that of what was used stands in where no backward was read."""
    if backward is None:
        point.setdefault("loss", loss)
    elif backward < PASSES:
        point[f"loss_{backward}"] = loss
        losses = [point[f"loss_{i}"] for i in range(PASSES) if f"loss_{i}" in point]
        point["loss"] = sum(losses) / len(losses)


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


def _pass(block: Block) -> dict[str, np.ndarray]:
    return {"norm": np.sqrt(_total(block, "square_sum", _kept(block)))}
