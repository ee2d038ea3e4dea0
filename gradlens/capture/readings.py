"""What capture hands on: tensors, and where they belong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from gradlens.facts import Fact
from gradlens.records import Finding, Parameters

GONE = "gone"  #: the note of a gradient that somebody used and freed before it could be read

Key = tuple[int, int, str]  #: step, backward, stage


@dataclass(frozen=True)
class Reading:
    """The gradients of some parameters. A table may come in several; the last one is `complete` and has the notes."""

    key: Key
    parameters: Parameters
    rows: Sequence[int]  #: the parameters that `tensors` belong to
    tensors: Sequence[Tensor]
    weights: Sequence[Tensor]
    divisor: float | Tensor = 1.0  #: what the tensors still have to be divided by
    scale: float | Tensor = 1.0  #: the loss scale at backward time
    complete: bool = True
    #: By row, why it has no tensor or what is special about it: a word of `Status`, "stale" (left from an earlier step),
    #: "elsewhere" (another reading has it), or `GONE`. Empty where every row has a tensor and nothing is special.
    notes: Sequence[str | None] = ()
    #: By identity and version these are the gradients that the step's one and only backward left.
    unchanged: bool = False
    skipped: bool | Tensor = False  #: the scaler found inf and the optimizer did nothing
    late: bool = False  #: read after the optimizer's step: `weights` have moved
    moving: bool = False  #: the weights may have moved since the step's first backward
    gone: bool = False  #: `.grad` was cleared before it could be read: the last backward's rows stand in for it


@dataclass(frozen=True)
class Update:
    """What the optimizer did: read once its step is over."""

    key: Key
    rows: Sequence[int]
    used: Sequence[Tensor | None]  #: None where the optimizer wrote over the gradient it used
    weights: Sequence[Tensor]
    moved: Sequence[bool]  #: whether the learning rate was above 0
    single: bool  #: the step had one backward, onto fresh gradients
    own: bool  #: nobody else hooked the parameters: `.grad` got what backward computed
    unchanged: bool  #: by identity and version, `.grad` at the step was what the last backward left
    scale: float | Tensor = 1.0
    skipped: bool | Tensor = False


class Sink(Protocol):
    """Where readings go."""

    def read(self, reading: Reading) -> None:
        """Take the gradients; they are not valid after the call."""

    def abandon(self, key: Key) -> None:
        """The backward pass failed: what was read of it counts for nothing."""

    def before(self, parameters: Parameters, rows: Sequence[int], weights: Sequence[Tensor]) -> None:
        """Keep the weights: the optimizer is about to move them."""

    def update(self, update: Update) -> None:
        """Take what moved."""

    def ended(self, rows: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """A backward pass left these in `.grad`."""

    def tell(self, finding: Finding) -> None:
        """Something that the user asked for cannot be had here, or not as elsewhere."""

    def loss(self, step: int, backward: int, value: float | Tensor) -> None:
        """The loss of a backward pass, unscaled, before its table is complete."""

    def note(self, fact: Fact) -> None:
        """Something is known beside gradients."""

    def step_closed(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Nothing more comes of this step; `scalars` are what the user observed in it."""

    def interrupt(self) -> None:
        """An update is over, and the training thread may be interrupted: the one call that may raise."""
