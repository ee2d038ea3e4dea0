"""What a step by the book is read with: calls that are prepared once, and made each step.

The calls belong to a route, which capture drops as soon as anything about the parameters changes. They are made again when
the buffers have moved, or a tensor has: the old ones would not serve. Where the facts that they rest on do not hold, nothing
has been done, and the general events stand in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradlens import kernels
from gradlens.capture.events import Steady, SteadyReading, SteadyStart, SteadyUpdate, SteadyUsed
from gradlens.capture.provenance import loss_gradient
from gradlens.kernels.prepared import GradientRows, Prepared
from gradlens.records import Parameters, Source, Stage, TableKey
from gradlens.statistics.buffers import Buffer
from gradlens.statistics.table import Piece
from gradlens.watching.open_tables import OpenTables
from gradlens.watching.updates import UpdateMeter

#: Steps for which nothing is prepared after it was in vain; each time that it was doubles them, up to the second number.
PAUSE, LONGEST = 2, 1024


@dataclass(eq=False)
class Calls:
    """The calls of a route, and the buffers that they were made for."""

    prepared: Prepared
    previous: kernels.StableTensors | None
    before: kernels.StableTensors | None
    read: object = None  #: the table of the reading that its samples are of
    begun: object = None  #: that of the optimizer's step which was given what was read
    given: Prepared | None = None  #: what read the gradients that it was given
    source: Source = Source.USED  #: of the loss's gradient
    added: Prepared | None = None  #: what reads the backwards after a step's first
    used: dict[tuple[int, bool], tuple[object, Prepared]] = field(default_factory=dict)

    def of_used(self, weights: Sequence[Tensor], previous: kernels.StableTensors | None, kept: bool) -> Prepared:
        """The calls for gradients that differ from what a backward left; `kept`: the loss's own are at hand."""
        known = self.used.get((id(previous), kept))
        if known is None:
            if len(self.used) > 2:
                self.used.clear()  # their rooms have moved
            loss = self.previous if kept else None
            known = self.used[id(previous), kept] = (previous, kernels.prepare(weights, previous, self.before, loss))
        return known[1]


class PreparedCalls:
    """Makes the calls of a route, and makes them again where they do not serve."""

    def __init__(self) -> None:
        self._pause, self._left = PAUSE, 0

    def read(
        self,
        event: SteadyReading,
        previous: kernels.StableTensors | None,
        before: kernels.StableTensors | None,
        detail: bool,
    ) -> GradientRows | None:
        """The gradients' rows; None where they cannot be read so."""
        route, calls = event.route, event.route.calls
        if calls is None or calls.previous is not previous or calls.before is not before:
            calls = self._make(route, previous, before)
        rows = None if calls is None else calls.prepared.read(event.gradients, detail, event.updates)
        if rows is None and calls is not None:
            calls = self._make(route, previous, before)
            rows = None if calls is None else calls.prepared.read(event.gradients, detail, event.updates)
        if rows is None:
            self.in_vain(route)
            return None
        self._pause = PAUSE
        calls.read, calls.begun = event.key, None
        return rows

    def _make(
        self, route: Steady, previous: kernels.StableTensors | None, before: kernels.StableTensors | None
    ) -> Calls | None:
        route.calls = None
        if self._left:
            self._left -= 1
            return None
        prepared = kernels.prepare(route.weights, previous, before)
        if not prepared.apart:
            self.in_vain(route)
            return None
        route.calls = Calls(prepared, previous, before)
        return route.calls

    def in_vain(self, route: Steady) -> None:
        """It did not serve: it is not tried for a while."""
        route.calls, self._left = None, self._pause
        self._pause = min(2 * self._pause, LONGEST)


class SteadyTables:
    """Fills the tables of a step by the book. A handler that says False has done nothing."""

    def __init__(
        self,
        tables: OpenTables,
        meter: UpdateMeter,
        flips: dict[str, Buffer],
        last_of: Callable[[Stage, Parameters], Buffer | None],
        detail: Callable[[int], bool],
    ) -> None:
        self._open, self._meter, self._flips, self._last_of, self._detail = tables, meter, flips, last_of, detail
        self._calls = PreparedCalls()
        self.answered = 0  #: events
        self.handlers: dict[type, Callable[[Any], bool]] = {
            SteadyReading: self._read,
            SteadyStart: self._start,
            SteadyUsed: self._used,
            SteadyUpdate: self._update,
        }

    def _read(self, event: SteadyReading) -> bool:
        route, key = event.route, event.key
        if isinstance(event.scale, Tensor):
            return False  # rows that wait for a device
        if event.loss is not None:
            self._open.losses[key.step, key.backward] = event.loss
        last = self._last_of(Stage.BACKWARD, route.parameters)
        previous = None if last is None else last.rooms(route.rows, kept=True)
        if event.ended is not None:
            return self._read_added(event, previous, event.ended) if (previous is None) == (last is None) else False
        before = self._meter.room(route.parameters, route.rows) if event.updates else None
        if (previous is None) != (last is None) or (before is None) == event.updates:
            return False  # not kept whole, or not yet
        read = self._calls.read(event, previous, before, self._detail(key.step))
        if read is None:
            return False
        self._meter.read_steadily(Piece(route.rows, read.gradient_samples))
        self._ended(event, read)
        return True

    def _ended(self, event: SteadyReading, read: GradientRows) -> None:
        table = self._open.whole(event.key, event.route.parameters, [Piece(event.route.rows, read.rows)])
        table.divisor = table.scale = event.scale
        self._open.ended(table)
        self.answered += 1

    def _read_added(self, event: SteadyReading, previous: kernels.StableTensors | None, ended: Sequence[Tensor]) -> bool:
        """A backward that was added to others: its own gradients are read, those in `.grad` only sampled."""
        route, key, calls = event.route, event.key, event.route.calls
        if calls is None or calls.previous is not previous:
            return False
        if calls.added is None:
            calls.added = kernels.prepare(route.weights, previous)
        read = calls.added.read(event.gradients, self._detail(key.step), False) if calls.added.apart else None
        if read is None:
            return False
        self._meter.pass_ended(route.rows, ended)
        self._ended(event, read)
        return True

    def _start(self, event: SteadyStart) -> bool:
        route, calls, last = event.route, event.route.calls, self._open.last
        if calls is None or last is None or calls.read != (last.step, last.backward, last.stage):
            return False
        if Stage.USED in self._flips:
            return False  # some `used` gradient differed once: its successors compare with it, not with `backward`
        if not (event.kept and unchanged(calls, event.gradients, event.updates)):
            return False
        self._meter.given_steadily(route.parameters, calls.before if event.updates else None)
        self._open.whole(event.key, route.parameters, list(last.pieces))
        self._open.copied, calls.begun, calls.given, calls.source = True, event.key, calls.prepared, Source.USED
        self.answered += 1
        return True

    def _used(self, event: SteadyUsed) -> bool:
        route, calls = event.route, event.route.calls
        if calls is None or not isinstance(calls.read, TableKey) or calls.read.step != event.key.step:
            return False
        if event.updates and not (event.kept and calls.prepared.unchanged(event.gradients)[1]):
            return False
        last = self._last_of(Stage.USED, route.parameters)
        previous = None if last is None else last.rooms(route.rows, kept=True)
        if (previous is None) != (last is None):
            return False  # not kept whole, or not yet
        source = loss_gradient(event.facts, event.scale, kept=calls.previous is not None)
        given = calls.of_used(route.weights, previous, source is Source.KEPT)
        read = given.read(event.gradients, self._detail(event.key.step), False) if given.apart else None
        if read is None:
            return False
        samples = Piece(route.rows, read.gradient_samples)
        self._meter.given_steadily(route.parameters, calls.before if event.updates else None, samples)
        self._open.whole(event.key, route.parameters, [Piece(route.rows, read.rows)]).scale = event.scale
        self._open.copied, calls.begun, calls.given, calls.source = False, event.key, given, source
        self.answered += 1
        return True

    def _update(self, event: SteadyUpdate) -> bool:
        route, calls, table = event.route, event.route.calls, self._open.tables.get(event.key)
        if calls is None or table is None or calls.begun != event.key or calls.given is None:
            return False
        numbers = calls.given.compare(event.gradients)
        if numbers is None:
            return False
        table.updates.append(
            self._meter.measured_steadily(route.rows, numbers, route.lr_positive, calls.source, event.scale)
        )
        self.answered += 1
        return True


def unchanged(calls: Calls, gradients: Sequence[Tensor], weights: bool) -> bool:
    """Whether the samples are what was read: of the gradients, and of the weights where these are asked for."""
    same, stayed = calls.prepared.unchanged(gradients)
    return same and (stayed or not weights)
