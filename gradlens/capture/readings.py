"""From what a pass or an optimizer left to readings: which tensors hold the partials, and why a row has none.

Values that live to the end of a backward are read there, together. Those that do not are read inside the hook: what another
rank's gradient is about to be mixed into, what a user's hook may replace, what an optimizer inside the pass uses and frees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor

from gradlens.capture.arrivals import State
from gradlens.capture.attachment import Attachment, Slot
from gradlens.capture.engine import Engine, Pass
from gradlens.capture.events import PassEnded, Reading, Sink
from gradlens.capture.marks import version
from gradlens.capture.step import Step
from gradlens.records import Note, Stage, TableKey


def gradients_at(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """What is in `.grad` of each."""
    return [None if t is None else t.grad for t in tensors]


class PassReader:
    """Reads what backward passes give."""

    def __init__(self, attachment: Attachment, engine: Engine, sink: Sink, stages: frozenset[str], *, local: bool) -> None:
        self._attachment, self._engine, self._sink, self._stages = attachment, engine, sink, stages
        self.local = local  # gradients are mixed with other ranks' before the pass ends

    def key(self, stage: Stage, current: Pass) -> TableKey:
        """The pass's table; the pass gets its number when something of it is read."""
        if current.number is None:
            current.number = current.step.take_number()
        return TableKey(current.step.number, current.number, stage)

    def emit(
        self,
        stage: Stage,
        slots: Sequence[Slot],
        tensors: Sequence[Tensor],
        current: Pass,
        *,
        complete: bool,
        notes: Sequence[Note | None] = (),
    ) -> None:
        """Hand a reading on."""
        with self._engine.lock:
            rows, now = self._attachment.rows, self._attachment.at(slots)
            triples = [(rows[slot], g, w) for slot, g, w in zip(slots, tensors, now, strict=True) if w is not None]
            triples.sort(key=itemgetter(0))  # a pass goes through the model from its end
            self._sink(
                Reading(
                    key=self.key(stage, current),
                    parameters=self._attachment.parameters,
                    rows=[row for row, _, _ in triples],
                    tensors=[g for _, g, _ in triples],
                    weights=[w for _, _, w in triples],
                    divisor=current.scale,
                    scale=current.scale,
                    complete=complete,
                    notes=notes,
                    moving=current.step.moving,
                )
            )

    def read_now(self, current: Pass, slot: Slot, g: Tensor) -> None:
        """This gradient will not be there at the end of the pass."""
        if Stage.BACKWARD in self._stages:
            self.emit(Stage.BACKWARD, [slot], [g], current, complete=False)

    def read_pending(self, current: Pass) -> None:
        """So much is held that it is read before the pass ends."""
        current.step.fresh = False
        pending = current.arrivals.take_pending()
        if Stage.BACKWARD in self._stages:
            self.emit(Stage.BACKWARD, list(pending), list(pending.values()), current, complete=False)

    def read_pass(self, current: Pass) -> None:
        """The pass is over: read what lived to its end."""
        self._note(current)
        if Stage.BACKWARD in self._stages:
            self._read_backward(current)
        elif current.arrivals.of(State.PENDING):
            current.step.fresh = False
        if Stage.ACCUMULATED in self._stages:
            self._read_accumulated(Stage.ACCUMULATED, current)
        if self._was_averaged(current) and Stage.REDUCED in self._stages:
            self._read_accumulated(Stage.REDUCED, current)
            current.step.reduced = current.number

    def mark_end(self, current: Pass) -> None:
        """Remember the gradients as this pass left them."""
        slots = self.quiet(current)
        now = gradients_at(self._attachment.at(slots))
        current.step.ending.update(slots, now)
        there = [(slot, g) for slot, g in zip(slots, now, strict=True) if g is not None]
        self._sink(PassEnded([self._attachment.rows[slot] for slot, _ in there], [g for _, g in there]))

    def quiet(self, current: Pass) -> list[Slot]:
        """The slots whose `.grad` may be read now: where several threads run passes, only those that this one reached.

        To read `.grad` while another thread's loop has it crashes, even under a lock and between its passes (torch 2.13).
        """
        slots = self._attachment.slots
        return slots if len(self._engine.threads) < 2 else [slot for slot in slots if current.arrivals.has(slot)]

    def _note(self, current: Pass) -> None:
        step = current.step
        step.reached.update(current.arrivals.arrived())
        step.undefined.update(current.arrivals.of(State.UNDEFINED))
        step.undefined -= step.reached
        if current.inputs:
            step.excluded.update(s for s in self._attachment.slots if s.hooked and s.hooked not in current.inputs)
        step.excluded -= step.reached

    def _was_averaged(self, current: Pass) -> bool:
        """Whether `.grad` is now what all ranks have given to; in one process it always is.

        DDP writes it after the pass has accumulated the last gradient, and does not under `no_sync`; the gradients of
        distributed tensors come averaged. What is averaged by hand, after the pass, is seen as used.
        """
        step = current.step
        if not self.local or any(hasattr(slot.tensor(), "placements") for slot in current.arrivals.arrived()):
            step.averaged = True
            return True
        missed = [slot for slot in self.quiet(current) if not current.arrivals.has(slot)]
        others = [slot for slot in missed if (p := slot.tensor()) is not None and changed(step, slot, p)]
        written = bool(others)
        if current.last is not None:
            slot, gradient, seen = current.last
            now = None if (p := slot.tensor()) is None else p.grad
            written = now is not None and (id(now), version(now)) != (gradient, seen)
        if written:
            step.filled_by_peers.update(others)
        step.averaged |= written or current.last is None
        return bool(written)

    def _read_backward(self, current: Pass) -> None:
        arrivals = current.arrivals
        slots, tensors = self._fresh(current)
        kept = arrivals.of(State.PENDING, State.SUMMED)
        current.step.fresh = current.step.fresh and not arrivals.of(State.PENDING)
        slots += kept
        tensors += [arrivals.tensors[slot] for slot in kept]
        notes = self._notes(current)
        for slot, note in zip(self._attachment.slots, notes, strict=False):
            if note is Note.UNCAPTURED and (p := slot.tensor()) is not None and p.grad is not None:
                slots.append(slot)
                tensors.append(p.grad)
        self.emit(Stage.BACKWARD, slots, tensors, current, complete=True, notes=notes)

    def _fresh(self, current: Pass) -> tuple[list[Slot], list[Tensor]]:
        slots: list[Slot] = []
        tensors: list[Tensor] = []
        fresh = current.arrivals.of(State.FRESH)
        for slot, parameter in zip(fresh, self._attachment.at(fresh), strict=True):
            gradient = current.arrivals.tensors.get(slot)  # kept when a nested run ended
            if gradient is None and parameter is not None and slot not in current.lost:
                gradient = parameter.grad
            if gradient is not None:
                slots.append(slot)
                tensors.append(gradient)
            elif slot not in current.lost:
                slot.read_in_hook = True
        return slots, tensors

    def _read_accumulated(self, stage: Stage, current: Pass) -> None:
        quiet, everyone = self.quiet(current), self._attachment.slots
        slots = [s for s in quiet if (p := s.tensor()) is not None and p.grad is not None and p.requires_grad]
        left = self._attachment.ignored if self.local and stage == Stage.REDUCED else ()
        if left:
            slots = [slot for slot in slots if slot not in left]
        tensors: list[Any] = [slot.tensor().grad for slot in slots]  # type: ignore[union-attr]
        present = set(slots)
        notes: list[Note | None] = [
            None if slot in current.step.reached else Note.STALE if slot in present else note
            for slot, note in zip(everyone, self._notes(current), strict=False)
        ]
        if quiet is not everyone:
            notes = [None if slot in present else Note.ELSEWHERE for slot in everyone]
        elif left:
            notes = notes or [None] * len(quiet)
            notes = [Note.ELSEWHERE if slot in left else note for slot, note in zip(quiet, notes, strict=True)]
        self.emit(stage, slots, tensors, current, complete=True, notes=notes)

    def _notes(self, current: Pass) -> list[Note | None]:
        """Why a row of this pass has no tensor; empty where all have one."""
        slots, arrivals = self._attachment.slots, current.arrivals
        lost = current.lost
        missing = [i for i, slot in enumerate(slots) if slot.read_in_hook or slot in lost or not arrivals.has(slot)]
        if not missing:
            return []
        notes: list[Note | None] = [None] * len(slots)
        for i in missing:
            notes[i] = self._note_of(slots[i], current)
        return notes

    def _note_of(self, slot: Slot, current: Pass) -> Note | None:
        parameter, state = slot.tensor(), current.arrivals.state(slot)
        if parameter is None or not parameter.requires_grad:
            return Note.FROZEN
        if current.arrivals.has(slot):
            return Note.GONE if state is State.FRESH else None
        if (slot in current.late or not slot.is_hooked(parameter)) and changed(current.step, slot, parameter):
            return Note.UNCAPTURED
        if current.inputs and id(parameter) not in current.inputs:
            return Note.EXCLUDED
        return Note.UNDEFINED if state is State.UNDEFINED else Note.ABSENT


def changed(step: Step, slot: Slot, parameter: Tensor) -> bool:
    """Whether `.grad` was written since the step opened."""
    return parameter.grad is not None and not step.opening.same(slot, parameter.grad)
