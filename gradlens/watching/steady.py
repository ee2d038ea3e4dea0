"""What a part of a step by the book is read with: calls that are prepared once, and made each step.

The calls belong to a route, the parameters that the part is about, which capture drops as soon as anything about them
changes. They are made again when the buffers have moved, or a tensor has: the old ones would not serve. Where the facts that
they rest on do not hold, nothing has been done, and the general events stand in.

What an optimizer is given was read at the end of a backward, along the same route or one that has more parameters: then the
numbers of its own are taken from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradlens import kernels
from gradlens.capture.events import UNTOUCHED, GradientFacts, Steady, SteadyReading, SteadyStart, SteadyUpdate, SteadyUsed
from gradlens.capture.provenance import loss_gradient
from gradlens.kernels.prepared import Prepared
from gradlens.records import Parameters, Source, Stage, TableKey
from gradlens.statistics.buffers import Buffer
from gradlens.statistics.table import Piece, Table
from gradlens.watching.isolation import isolated_compute
from gradlens.watching.open_tables import OpenTables
from gradlens.watching.updates import UpdateMeter

#: Steps for which nothing is prepared after it was in vain; each time that it was doubles them, up to the second number.
PAUSE, LONGEST = 2, 1024

_Rooms = kernels.StableTensors | None

#: What a call reads: a step's first backward, a later one, what ranks averaged; what an optimizer is given, and the same
#: with the loss's own.
FIRST, LATER, REDUCED, USED, KEPT = "first", "later", "reduced", "used", "kept"
#: What an optimizer is given, which a call along another route has read.
PART = "part"


class First(NamedTuple):
    """How a step's first backward was read."""

    key: TableKey
    by: Prepared
    before: _Rooms  #: where the weights were copied to


class Reading(NamedTuple):
    """The last backward that was read by the book."""

    key: TableKey
    route: Steady
    samples: Tensor  #: of gradients and weights, side by side
    piece: Piece  #: of the gradients alone


class Calls:
    """The calls of one route: each was made for certain buffers."""

    def __init__(self, route: Steady) -> None:
        self._weights, self._made = route.weights, dict[str, tuple[tuple[_Rooms, ...], Prepared]]()
        self._pause, self._left = PAUSE, 0
        self.first: First | None = None
        self.begun: TableKey | None = None  #: the optimizer's step that was given what `given` has read
        self.given: Prepared | None = None
        self.source = Source.USED  #: of the loss's gradient
        self._places: tuple[list[int], slice | Tensor | None] | None = None

    def _make(self, kind: str, buffers: tuple[_Rooms, ...]) -> Prepared | None:
        self._made.pop(kind, None)
        if self._left:
            self._left -= 1
            return None
        prepared = kernels.prepare(self._weights, *buffers)
        if not prepared.apart:
            self.in_vain(kind)
            return None
        self._made[kind] = buffers, prepared
        return prepared

    def in_vain(self, kind: str) -> None:
        """It did not serve: it is not tried for a while."""
        self._made.pop(kind, None)
        self._left, self._pause = self._pause, min(2 * self._pause, LONGEST)

    def places(self, rows: list[int], within: list[int]) -> slice | Tensor | None:
        """Where these rows are among those of a longer route; None where some are not."""
        if self._places is None or self._places[0] is not within:
            self._places = within, places(rows, within)
        return self._places[1]

    def serve(self, kind: str, buffers: tuple[_Rooms, ...], ask: Callable[[Prepared], Any]) -> tuple[Prepared, Any] | None:
        """The prepared call, and what it answers where it is asked; None where none answers.

        buffers: The last gradients, the weights before the step, and the loss's own gradients.
        """
        made = self._made.get(kind)
        fits = made is not None and all(map(is_, made[0], buffers))
        prepared = made[1] if made is not None and fits else self._make(kind, buffers)
        answer = None if prepared is None else ask(prepared)
        if prepared is not None and not answer:  # its weights may have moved
            prepared = self._make(kind, buffers)
            answer = None if prepared is None else ask(prepared)
        if prepared is None:
            return None
        if not answer:
            self.in_vain(kind)
            return None
        self._pause = PAUSE
        return prepared, answer


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
        self.answered = 0  #: events
        self.handlers: dict[type, Callable[[Any], bool]] = {
            SteadyReading: self._read,
            SteadyStart: self._start,
            SteadyUsed: self._used,
            SteadyUpdate: self._update,
        }

    def _previous(self, stage: Stage, route: Steady) -> tuple[_Rooms, bool]:
        """Where the last gradients are; False where they are not kept whole, or not yet."""
        buffer = self._flips.get(stage)
        if buffer is None:
            buffer = self._last_of(stage, route.parameters)
        rooms = None if buffer is None else buffer.rooms(route.parameters, route.rows, kept=True)
        return rooms, (rooms is None) == (buffer is None)

    def _read(self, event: SteadyReading) -> bool:
        route, key = event.route, event.key
        if isinstance(event.scale, Tensor):
            return False  # rows that wait for a device
        if event.loss is not None:
            self._open.losses[key.step, key.backward] = event.loss
        previous, fine = self._previous(key.stage, route)
        before = self._meter.room(route.parameters, route.rows) if event.updates else None
        if not fine or (before is None) == event.updates:  # they are not kept whole, or not yet
            return False
        calls = route.calls or _calls(route)
        kind = REDUCED if key.stage is Stage.REDUCED else FIRST if event.updates or not key.backward else LATER
        read = calls.serve(
            kind, (previous, before), methodcaller("read", event.gradients, self._detail(key.step), event.updates)
        )
        if read is None:
            return False
        prepared, rows = read
        samples = Piece(route.rows, rows.gradient_samples)
        if kind != LATER:
            calls.first = First(key, prepared, before)
        if event.ended is None:
            self._meter.read_steadily(samples)
        else:
            self._meter.pass_ended(*event.ended)
        table = self._open.whole(key, route.parameters, [Piece(route.rows, rows.rows)], event.notes)
        table.divisor = table.scale = event.scale
        if kind == REDUCED:
            self._open.last = table
        else:
            self._open.ended(table)
        self._open.reading = Reading(key, route, rows.samples, samples)
        self.answered += 1
        return True

    def _start(self, event: SteadyStart) -> bool:
        """What the optimizer is given was read at the end of the backward, and its table has the same numbers."""
        route, last, table = event.route, self._open.reading, self._open.last
        if Stage.USED in self._flips:  # some `used` gradient differed once: its successors compare with it
            return self._read_used(event, UNTOUCHED, 1.0)
        if last is None or table is None or last.key != (table.step, table.backward, table.stage) or not event.kept:
            return False
        if last.route is not route:
            return self._start_part(event, last, table)
        first = None if route.calls is None else route.calls.first
        if first is None or first.key != last.key or not unchanged(first.by, event.gradients, event.updates):
            return False
        self._open.copied = last.key.stage
        self._given(event, first.by, first.before, list(table.pieces), last.piece)
        return True

    def _start_part(self, event: SteadyStart, last: Reading, table: Table) -> bool:
        """The same for some of the parameters that the backward has reached."""
        route = event.route
        calls = route.calls or _calls(route)
        at = calls.places(route.rows, last.route.rows)
        before = self._meter.room(route.parameters, route.rows) if event.updates else None
        if at is None or (before is None) == event.updates or [piece.rows for piece in table.pieces] != [last.route.rows]:
            return False
        with isolated_compute():
            rows, samples, gradients = (taken(n, at) for n in (table.pieces[0].numbers, last.samples, last.piece.numbers))
        served = calls.serve(PART, (None, before), methodcaller("take_over", event.gradients, samples))
        if served is None or not unchanged(by := served[0], event.gradients, event.updates):
            return False
        self._open.copied = last.key.stage
        self._given(event, by, before, [Piece(route.rows, rows)], Piece(route.rows, gradients))
        return True

    def _given(self, event: SteadyStart, by: Prepared, before: _Rooms, pieces: list[Piece], samples: Piece) -> None:
        route, calls = event.route, event.route.calls
        self._meter.given_steadily(route.parameters, before if event.updates else None, samples)
        self._open.joined(event.key, route.parameters, pieces, event.notes)
        calls.begun, calls.given, calls.source = event.key, by, Source.USED
        self.answered += 1

    def _used(self, event: SteadyUsed) -> bool:
        return not isinstance(event.scale, Tensor) and self._read_used(event, event.facts, event.scale)

    def _read_used(self, event: SteadyStart | SteadyUsed, facts: GradientFacts, scale: float | Tensor) -> bool:
        """What the optimizer is given is read, and the weights are copied if they have moved since the first backward."""
        route, key = event.route, event.key
        calls = route.calls or _calls(route)
        source = loss_gradient(facts, scale, kept=Stage.BACKWARD in self._flips)
        loss, known = self._previous(Stage.BACKWARD, route) if source is Source.KEPT else (None, True)
        previous, fine = self._previous(Stage.USED, route)
        before = self._meter.room(route.parameters, route.rows) if event.updates else None
        if not (known and fine) or (before is None) == event.updates:
            return False
        first, copy = calls.first, event.updates
        if copy and event.kept and first is not None and first.key.step == key.step:
            copy = not first.by.unchanged(event.gradients)[1]
        kind = USED if loss is None else KEPT
        read = calls.serve(
            kind, (previous, before, loss), methodcaller("read", event.gradients, self._detail(key.step), copy)
        )
        if read is None:
            return False
        by, rows = read
        self._meter.given_steadily(route.parameters, before, Piece(route.rows, rows.gradient_samples))
        self._open.joined(key, route.parameters, [Piece(route.rows, rows.rows)], event.notes).scale = scale
        self._open.copied, calls.begun, calls.given, calls.source = None, key, by, source
        self.answered += 1
        return True

    def _update(self, event: SteadyUpdate) -> bool:
        route, calls, table = event.route, event.route.calls, self._open.tables.get(event.key)
        if calls is None or table is None or calls.begun != event.key or calls.given is None:
            return False
        numbers = calls.given.compare(event.gradients)
        if numbers is None:
            return False
        moved, own = Piece(route.rows, numbers), event.facts.own
        measured = self._meter.measured_steadily(moved, route.lr_positive, calls.source, own=own, scale=event.scale)
        table.updates.append(measured)
        self.answered += 1
        return True


def _calls(route: Steady) -> Calls:
    """New ones."""
    calls = route.calls = Calls(route)
    return calls


def unchanged(by: Prepared, gradients: Sequence[Tensor], weights: bool) -> bool:
    """Whether the samples are what was read: of the gradients, and of the weights where these are asked for."""
    same, stayed = by.unchanged(gradients)
    return same and (stayed or not weights)


def places(rows: Sequence[int], within: Sequence[int]) -> slice | Tensor | None:
    """Where these rows are among others, as a slice where they are side by side; None where some are not there."""
    known = {row: place for place, row in enumerate(within)}
    at = [known[row] for row in rows if row in known]
    if not at or len(at) < len(rows):
        return None
    side_by_side = at == list(range(at[0], at[0] + len(at)))
    return slice(at[0], at[0] + len(at)) if side_by_side else torch.tensor(at, device="cpu")  # whatever the user's default


def taken(numbers: Tensor, at: slice | Tensor) -> Tensor:
    """These of its rows."""
    return numbers[at] if isinstance(at, slice) else numbers.index_select(0, at)
