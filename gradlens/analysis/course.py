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

from gradlens.records import Snapshot, Stage, Status

CAPACITY = 2048
PASSES = 4  #: backward passes of a step whose losses are told apart


@dataclass
class Course:
    """Points of a run, oldest first."""

    stride: int = 1
    seen: int = 0  #: steps that were seen
    steps: list[int] = field(default_factory=list)
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    _step: int = -1
    _taken: bool = False

    def add(self, snapshot: Snapshot) -> None:
        """Take the newest snapshot."""
        if snapshot.step != self._step:
            self._step = snapshot.step
            self._taken = self.seen % self.stride == 0
            self.seen += 1
            if self._taken:
                if len(self.steps) >= CAPACITY:
                    self._thin()
                if snapshot.step not in self.points:
                    self.steps.append(snapshot.step)
                    self.points[snapshot.step] = {}
        if not self._taken or snapshot.step not in self.points:
            return
        point = self.points[snapshot.step]
        if snapshot.stage == Stage.USED:
            point.update(_used(snapshot))
        elif snapshot.backward < PASSES:
            point.update(_pass(snapshot))
        loss = snapshot.loss
        if "loss" in snapshot.scalars:
            if snapshot.stage == Stage.USED:
                point.setdefault("loss", loss)
            elif snapshot.backward < PASSES:
                point[f"loss_{snapshot.backward}"] = loss
                losses = [point[f"loss_{i}"] for i in range(PASSES) if f"loss_{i}" in point]
                point["loss"] = sum(losses) / len(losses)
        if snapshot.stage != Stage.USED:
            point["backwards"] = max(point.get("backwards", 0), snapshot.backward + 1)

    def _thin(self) -> None:
        self.steps = self.steps[::2]
        self.points = {step: self.points[step] for step in self.steps}
        self.stride *= 2

    def __len__(self) -> int:
        return len(self.steps)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps `[k]` and values `[k]`, of the steps that have one."""
        steps = [step for step in list(self.steps) if name in self.points.get(step, ())]
        return np.asarray(steps, np.int64), np.asarray([self.points[step][name] for step in steps], np.float64)


def _used(snapshot: Snapshot) -> dict[str, float]:
    columns, kept = snapshot.columns, snapshot.has(Status.OK, Status.ZERO, Status.NONFINITE)
    if not kept.any():
        return {}

    def total(name: str) -> float:
        return float(np.nansum(columns[name][kept]))

    gradient, weight = total("square_sum"), total("weight_square_sum")
    moved, before = total("update_square_sum"), total("update_before_square_sum")
    flips = math.sqrt(total("flip_square_sum")) * math.sqrt(total("flip_previous_square_sum"))
    result = {"norm": math.sqrt(gradient), "weight": math.sqrt(weight)}
    if before > 0:
        result["ratio"] = math.sqrt(moved / before)
    if flips > 0:
        result["cosine"] = total("flip_dot") / flips
    return result


def _pass(snapshot: Snapshot) -> dict[str, float]:
    kept = snapshot.has(Status.OK, Status.ZERO, Status.NONFINITE)
    if not kept.any():
        return {}
    return {f"norm_{snapshot.backward}": math.sqrt(float(np.nansum(snapshot.columns["square_sum"][kept])))}
