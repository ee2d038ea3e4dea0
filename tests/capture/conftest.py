"""A capture that hands its readings to a list."""

import operator
from dataclasses import dataclass, field

import pytest
import torch

from gradlens.capture.attachment import Attachment
from gradlens.capture.guards import Guard
from gradlens.capture.watcher import Watched, Watcher
from gradlens.schedules import as_schedule


def _copy(tensor):
    return None if tensor is None else tensor.detach().clone()


@dataclass
class Seen:
    """A reading, with its tensors copied: by name."""

    key: tuple
    partials: dict
    notes: dict
    complete: bool
    unchanged: bool
    skipped: object
    divisor: object
    scale: object


@dataclass
class RecordingSink:
    readings: list = field(default_factory=list)
    updates: list = field(default_factory=list)
    closed: list = field(default_factory=list)
    events: list = field(default_factory=list)
    kept: dict = field(default_factory=dict)
    losses: dict = field(default_factory=dict)
    facts: list = field(default_factory=list)

    def __call__(self, event):
        getattr(self, f"on_{type(event).__name__}", self.events.append)(event)

    def on_Reading(self, reading):
        if reading.replaces is not None:
            self.readings = [r for r in self.readings if r.key != reading.replaces]
        names = reading.parameters.names
        partials = {names[i]: _copy(g) for i, g in zip(reading.rows, reading.tensors, strict=True)}
        notes = dict(zip(names, reading.notes or [None] * len(names), strict=True))
        rest = (reading.complete, reading.copies_backward, reading.skipped, reading.divisor, reading.scale)
        self.readings.append(Seen(reading.key, partials, notes, *rest))
        self.events.append(reading.key)

    def on_PassFailed(self, event):
        self.readings = [r for r in self.readings if r.key != event.key]
        self.events.append((*event.key[:2], "abandoned"))

    def on_WeightsBefore(self, event):
        self.kept.update({i: _copy(w) for i, w in zip(event.rows, event.weights, strict=True)})

    def on_Update(self, update):
        moved = {i: _copy(w) - self.kept[i] for i, w in zip(update.rows, update.weights, strict=True)}
        self.updates.append((update, moved))
        self.events.append((*update.key[:2], "update"))

    def on_PassEnded(self, event):
        pass

    on_TableDone = on_PassEnded  # noqa: N815

    def on_LossSeen(self, event):
        self.losses[event.step, event.backward] = event.value

    def on_Noted(self, event):
        self.facts.append(event.fact)

    def on_SteadyReading(self, event):
        """A step by the book is seen as what it stands for."""
        for each in event.general():
            self(each)

    on_SteadyStart = on_SteadyUsed = on_SteadyUpdate = on_SteadyReading  # noqa: N815

    def on_StepClosed(self, event):
        self.closed.append((event.step, dict(event.scalars)))
        self.events.append((event.step, "closed"))

    def merged(self, step, backward, stage):
        """The partials of one table, over its readings."""
        result = {}
        for reading in self.readings:
            if reading.key == (step, backward, stage):
                result.update(reading.partials)
        return result

    def keys(self, stage):
        seen = [r.key[:2] for r in self.readings if r.key[2] == stage and r.complete]
        return list(dict.fromkeys(seen))

    def notes(self, step, backward, stage):
        return next(r.notes for r in reversed(self.readings) if r.key == (step, backward, stage) and r.complete)


class Bench:
    """A capture on a model, and what it saw."""

    def __init__(
        self, model, optimizers=(), *, stages=("backward", "used"), schedule=1, scaler=None, local=False, select=None
    ):
        self.faults = []
        self.sink = RecordingSink()
        fault = lambda where, error: self.faults.append((where, error))  # noqa: E731
        if isinstance(optimizers, torch.optim.Optimizer):
            optimizers = [optimizers]
        watched = Watched(
            Attachment(model, select),
            list(optimizers),
            [False] * len(optimizers),
            as_schedule(schedule),
            scaler,
            frozenset(stages),
            updates=True,
            local=local,
        )
        self.capture = Watcher(watched, self.sink, Guard(fault, operator.call))
        self.capture.attach()


@pytest.fixture
def watched():
    """Makes benches, and checks at the end that nothing of ours failed."""
    benches = []

    def make(*args, **kwargs):
        benches.append(Bench(*args, **kwargs))
        return benches[-1]

    yield make
    for bench in benches:
        bench.capture.detach()
        assert bench.faults == []
