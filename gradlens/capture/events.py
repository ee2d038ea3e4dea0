"""What capture tells whoever builds tables: small frozen events, all through one callable.

Tensors of an event are valid during the call only: the training loop goes on to overwrite them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from gradlens.facts import Fact
from gradlens.records import Finding, Note, Parameters, TableKey


@dataclass(frozen=True, slots=True)
class Reading:
    """The gradients of some parameters. A table may come in several; the last one is `complete` and has the notes."""

    key: TableKey
    parameters: Parameters
    rows: Sequence[int]  #: the parameters that `tensors` belong to
    tensors: Sequence[Tensor]
    weights: Sequence[Tensor]
    divisor: float | Tensor = 1.0  #: what the tensors still have to be divided by
    scale: float | Tensor = 1.0  #: the loss scale at backward time
    complete: bool = True
    #: By row, why it has no tensor or what is special about it. Empty where every row has a tensor and nothing is special.
    notes: Sequence[Note | None] = ()
    copies_backward: bool = False  #: as far as identity and version tell, these are what the step's one backward left
    skipped: bool | Tensor = False  #: the scaler found inf and the optimizer did nothing
    late: bool = False  #: read after the optimizer's step: `weights` have moved
    moving: bool = False  #: the weights may have moved since the step's first backward
    gone: bool = False  #: `.grad` was cleared before it could be read: the last backward's rows stand in for it
    replaces: TableKey | None = None  #: an earlier reading of the same step turned out not to be the last


@dataclass(frozen=True, slots=True)
class WeightsBefore:
    """The weights that an optimizer is about to move."""

    parameters: Parameters
    rows: Sequence[int]
    weights: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class GradientFacts:
    """What is known about the gradient that the optimizer was given; `provenance` draws the conclusions."""

    single: bool  #: the step had one backward, onto fresh gradients, in one process
    own: bool  #: nobody else hooked the parameters: `.grad` got what backward computed
    untouched: bool  #: by identity and version, `.grad` at the step was what the last backward left
    reduced: bool = False  #: what that one left was read as `reduced`: all ranks' mean, everything accumulated in it


UNTOUCHED = GradientFacts(single=True, own=True, untouched=True)


@dataclass(frozen=True, slots=True)
class Update:
    """What the optimizer did: read once its step is over."""

    key: TableKey
    rows: Sequence[int]
    used: Sequence[Tensor | None]  #: None where the optimizer put another tensor there, or wrote to it
    weights: Sequence[Tensor]
    lr_positive: Sequence[bool]  #: whether the learning rate was above 0
    facts: GradientFacts
    scale: float | Tensor = 1.0
    skipped: bool | Tensor = False
    complete: bool = True  #: no other optimizer will add to this table


@dataclass(frozen=True, slots=True)
class PassEnded:
    """A backward pass left these in `.grad`."""

    rows: Sequence[int]
    gradients: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class PassFailed:
    """What was read of this backward pass counts for nothing."""

    key: TableKey


@dataclass(frozen=True, slots=True)
class ScaleFound:
    """The gradients of the open step turned out to be multiplied by this loss scale."""

    step: int
    scale: float | Tensor


@dataclass(frozen=True, slots=True)
class LossSeen:
    """The loss of a backward pass, unscaled, before its table is complete."""

    step: int
    backward: int
    value: float | Tensor


@dataclass(frozen=True, slots=True)
class Noted:
    """Something is known beside gradients."""

    fact: Fact


@dataclass(frozen=True, slots=True)
class TableDone:
    """Nothing more is added to the `used` table of this backward."""

    key: TableKey


class Steady(Protocol):
    """The parameters that a part by the book is about, in model order, and what the sink keeps with them."""

    parameters: Parameters
    rows: list[int]
    weights: list[Tensor]
    lr_positive: list[bool]
    calls: Any  #: the sink's own, dropped as soon as anything changes


class SteadyReading(NamedTuple):
    """A backward by the book has ended: stands for a `LossSeen`, a `Reading` of what it reached, and a `PassEnded`."""

    route: Steady
    key: TableKey
    gradients: list[Tensor]
    updates: bool  #: the weights are wanted as they are before the optimizer moves them
    notes: Sequence[Note | None] = ()  #: of the rows that it did not reach
    loss: float | Tensor | None = None
    ended: tuple[list[int], list[Tensor]] | None = None  #: rows and what is in `.grad` there, if that is not what was read
    scale: float | Tensor = 1.0  #: what the gradients are multiplied by
    moving: bool = False  #: weights have moved since the step's first backward

    def general(self) -> Iterator[Event]:
        """The events that this stands for."""
        route = self.route
        if self.loss is not None:
            yield LossSeen(self.key.step, self.key.backward, self.loss)
        yield Reading(
            key=self.key,
            parameters=route.parameters,
            rows=route.rows,
            tensors=self.gradients,
            weights=route.weights,
            divisor=self.scale,
            scale=self.scale,
            notes=self.notes,
            moving=self.moving,
        )
        yield PassEnded(*((route.rows, self.gradients) if self.ended is None else self.ended))


class SteadyStart(NamedTuple):
    """An optimizer is given what a backward by the book left: stands for `WeightsBefore` and a `Reading` of `used`."""

    route: Steady
    key: TableKey
    gradients: list[Tensor]
    updates: bool
    kept: bool  #: by their versions, the weights are what they were when the backward ended
    notes: Sequence[Note | None] = ()  #: of the rows that are not on its route

    def general(self) -> Iterator[Event]:
        """The events that this stands for."""
        route = self.route
        if self.updates:
            yield WeightsBefore(route.parameters, route.rows, route.weights)
        rest: Any = {"notes": self.notes, "copies_backward": True}
        yield Reading(self.key, route.parameters, route.rows, self.gradients, route.weights, **rest)


class SteadyUsed(NamedTuple):
    """The same, where the gradients are not what one backward left: they were clipped, accumulated, or scaled."""

    route: Steady
    key: TableKey
    gradients: list[Tensor]
    updates: bool
    kept: bool  #: by their versions, the weights are what they were when the first backward ended
    notes: Sequence[Note | None]
    facts: GradientFacts
    scale: float | Tensor = 1.0  #: the loss scale at backward time

    def general(self) -> Iterator[Event]:
        """The events that this stands for."""
        route = self.route
        if self.updates:
            yield WeightsBefore(route.parameters, route.rows, route.weights)
        rest: Any = {"notes": self.notes, "scale": self.scale}
        yield Reading(self.key, route.parameters, route.rows, self.gradients, route.weights, **rest)


class SteadyUpdate(NamedTuple):
    """The optimizer has moved all that it moves, and written to no gradient: stands for an `Update`."""

    route: Steady
    key: TableKey
    gradients: list[Tensor]
    facts: GradientFacts
    scale: float | Tensor = 1.0

    def general(self) -> Iterator[Event]:
        """The events that this stands for."""
        route = self.route
        yield Update(self.key, route.rows, self.gradients, route.weights, route.lr_positive, self.facts, self.scale)


class StepClosed(NamedTuple):
    """The step is over; `scalars` are what the user observed in it."""

    step: int
    scalars: Mapping[str, Any]


Event = (
    Reading
    | WeightsBefore
    | Update
    | PassEnded
    | PassFailed
    | ScaleFound
    | LossSeen
    | Noted
    | TableDone
    | SteadyReading
    | SteadyStart
    | SteadyUsed
    | SteadyUpdate
    | StepClosed
    | Finding
)

Sink = Callable[[Event], None]  #: where events go
