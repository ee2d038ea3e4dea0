"""What an optimizer's step reads: the weights before it, the gradients that it is given, and what it did.

Without an optimizer a stand-in takes its place, and what the user's own loop consumed is read once the step is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradlens import findings
from gradlens.capture import provenance
from gradlens.capture.arrivals import HELD_BYTES
from gradlens.capture.attachment import Attachment, Slot
from gradlens.capture.engine import Engine
from gradlens.capture.events import GradientFacts, Reading, Sink, Update, WeightsBefore
from gradlens.capture.marks import Marks, zeroed
from gradlens.capture.optimizers import Optimizers, WatchedOptimizer, positive_rates
from gradlens.capture.readings import changed, gradients_at
from gradlens.capture.step import Step
from gradlens.records import Finding, Note


class StepReader:
    """Reads what optimizers use, and what they do."""

    def __init__(
        self,
        attachment: Attachment,
        engine: Engine,
        optimizers: Optimizers,
        sink: Sink,
        tell: Callable[[Finding], None],
        *,
        used: bool,
        updates: bool,
        local: bool,
    ) -> None:
        self._attachment, self._engine, self._optimizers, self._sink = attachment, engine, optimizers, sink
        self._tell, self._used, self._local = tell, used, local
        self.updates = updates  #: the weights' moves are measured
        self.notes = UsedNotes(attachment, self._reached)
        self.by_hand = WatchedOptimizer()  #: stands in where the user moves the weights
        self.all_written = 0  # steps in a row in which every gradient was written by hand
        self.left: list[tuple[Slot, Tensor]] = []  #: without an optimizer: what the last backward left in `.grad`

    def _reached(self, step: Step, slot: Slot) -> bool:
        """Whether a pass of this step reached the slot: one that is over, or one that is still going on."""
        return slot in step.reached or any(p.step is step and p.arrivals.has(slot) for p in self._engine.passes)

    def before(self, held: Mapping[Slot, Tensor]) -> WeightsBefore:
        return WeightsBefore(self._attachment.parameters, self._rows(held), list(held.values()))

    def keep(
        self, step: Step, watched: WatchedOptimizer, held: Mapping[Slot, Tensor], *, backward: int | None = None
    ) -> None:
        """Keep the weights before the step; of what several optimizers move one after another, those before the first.

        backward: The number of the backward that its closure will call first.
        """
        if len(self._optimizers.watched) > 1 or watched.wrapped:
            key = step.used_key if backward is None else step.used_key._replace(backward=backward)
            held = {slot: w for slot, w in held.items() if step.kept.get(slot) != key}
            step.kept.update(dict.fromkeys(held, key))
        self._sink(self.before(held))

    def keep_wrapped(self, step: Step) -> None:
        """Something around an optimizer may move weights before its step begins: they are kept when backward ends."""
        with self._attachment.cache:
            for watched in self._optimizers.watched:
                if watched.wrapped and watched.step is None:  # else its call is under way, and began with the weights kept
                    held = self._optimizers.held(watched)
                    step.kept.update(dict.fromkeys(held, step.used_key))
                    self._sink(self.before(held))

    def _rows(self, slots: Mapping[Slot, Any]) -> list[int]:
        return list(map(self._attachment.rows.__getitem__, slots))

    def _facts(self, step: Step, watched: WatchedOptimizer) -> GradientFacts:
        single = step.passes == 1 and step.fresh and not self._local
        return GradientFacts(single, step.own, watched.untouched, reduced=step.reduced == step.used_key.backward)

    def read_used(
        self,
        step: Step,
        watched: WatchedOptimizer,
        *,
        skipped: bool | Tensor = False,
        late: bool = False,
        held: Mapping[Slot, Tensor] | None = None,
        replaces: Any = None,
        gradients: Sequence[Tensor | None] | None = None,
        unknown: bool = False,
    ) -> None:
        """Read the gradients that this optimizer consumes. `held` is what it moves, where that is known."""
        watched.read = True
        held = self._optimizers.held(watched) if held is None else held
        now = gradients_at(held.values()) if gradients is None else gradients
        present = [(slot, g, w) for (slot, w), g in zip(held.items(), now, strict=True) if g is not None and w.requires_grad]
        watched.given = Marks([slot for slot, _, _ in present], [g for _, g, _ in present])
        watched.untouched = step.ending.all_same(list(held), now)
        if not self._used:
            return
        self._sink(
            Reading(
                key=step.used_key,
                parameters=self._attachment.parameters,
                rows=[self._attachment.rows[slot] for slot, _, _ in present],
                tensors=[g for _, g, _ in present],
                weights=[w for _, _, w in present],
                scale=step.scale,
                notes=self._used_notes(step, held, now, len(present), unknown=unknown),
                copies_backward=provenance.may_copy(self._facts(step, watched), step.scale),
                skipped=skipped,
                late=late,
                gone=not present and bool(step.reached) and not unknown,
                replaces=replaces,
            )
        )

    def _used_notes(
        self, step: Step, held: Mapping[Slot, Tensor], now: Sequence[Tensor | None], present: int, *, unknown: bool
    ) -> Sequence[Note | None]:
        if unknown:
            return [Note.GONE if slot in step.reached else Note.ABSENT for slot in self._attachment.slots]
        notes = self.notes.of(step, held, now, present)
        written = bool(notes) and Note.UNCAPTURED in notes and set(notes) <= {Note.UNCAPTURED, Note.FROZEN, Note.ELSEWHERE}
        self.all_written = self.all_written + 1 if written else 0
        if self.all_written == 2:  # once may be a parameter that lost its hooks: they were set again
            names = [slot.name for slot in held if slot in self.notes.written]
            self._tell(findings.written_by_hand(step.number, names))
        return notes

    def read_update(
        self, step: Step, watched: WatchedOptimizer, optimizer: Optimizer | None, skipped: bool | Tensor
    ) -> None:
        held = self._optimizers.held(watched)
        if optimizer is None:
            positive = [True] * len(held)
        else:
            rates = positive_rates(optimizer)
            held = {slot: w for slot, w in held.items() if id(w) in rates}
            positive = [rates[id(w)] for w in held.values()]
        used = [
            g if g is not None and watched.given.same(slot, g) else None
            for slot, g in zip(held, gradients_at(held.values()), strict=True)
        ]
        self._sink(
            Update(
                key=step.used_key,
                rows=self._rows(held),
                used=used,
                weights=list(held.values()),
                lr_positive=positive,
                facts=self._facts(step, watched),
                scale=step.scale,
                skipped=skipped,
            )
        )

    def read_by_hand(self, step: Step) -> None:
        """Without an optimizer: read what the user's loop has consumed, as far as that is still there."""
        held, left = self._optimizers.held(self.by_hand), dict(self.left)
        given = [_consumed(step, slot, w.grad, left.get(slot)) for slot, w in held.items()]
        if any(g is None and slot in step.reached for slot, g in zip(held, given, strict=True)):
            self._tell(findings.used_unknown(step.number))
            self.read_used(step, self.by_hand, gradients=[None] * len(held), unknown=True)
        else:
            self.read_used(step, self.by_hand, gradients=given)

    def hold_gradients(self) -> None:
        """Hold what is in `.grad`, if that is little: the user's loop consumes it before we are called again."""
        self.left, size = [], 0
        for slot, tensor in zip(self._attachment.slots, self._attachment.tensors(), strict=True):
            gradient = None if tensor is None else tensor.grad
            if gradient is not None:
                self.left.append((slot, gradient))
                size += gradient.numel() * gradient.element_size()
        if size > HELD_BYTES:
            self.left = []


def _consumed(step: Step, slot: Slot, now: Tensor | None, left: Tensor | None) -> Tensor | None:
    """What is in `.grad`, or else what the last backward left there; not what has been zeroed since."""
    for gradient in (now, left):
        if gradient is not None and (step.ending.same(slot, gradient) or not zeroed(gradient)):
            return gradient
    return None


class UsedNotes:
    """What is special about the rows of a `used` table."""

    def __init__(self, attachment: Attachment, reached: Callable[[Step, Slot], bool]) -> None:
        self._attachment, self._reached = attachment, reached
        self.read_at_step = False  # gradients of parameters came whose hooks FSDP1 suppresses
        self.written: set[Slot] = set()  # whose `.grad` was new at the last step, though no backward reached them

    def of(
        self, step: Step, held: Mapping[Slot, Tensor], gradients: Sequence[Tensor | None], present: int
    ) -> list[Note | None]:
        """By row of the model; empty where all of it is held, has a gradient, and nothing is special."""
        slots = self._attachment.slots
        special = {
            slot: self._note(step, slot)
            for (slot, w), g in zip(held.items(), gradients, strict=True)
            if slot not in step.reached or g is None or not w.requires_grad
        }
        if special or self.written:
            self.written.difference_update(held)
            self.written.update(slot for slot, note in special.items() if note is Note.UNCAPTURED)
            for slot in self.written & special.keys():
                slot.rehook()
        if not special and present == len(slots):
            return []
        return [special.get(slot) if slot in held else Note.ELSEWHERE for slot in slots]

    def _note(self, step: Step, slot: Slot) -> Note | None:
        parameter = slot.tensor()
        if parameter is None or not parameter.requires_grad:
            return Note.FROZEN
        if self._reached(step, slot):
            return Note.EXCLUDED if parameter.grad is None else None
        if slot in step.filled_by_peers:
            return Note.STALE
        if slot in step.undefined:
            return Note.UNDEFINED
        if slot.flat_slice is not None and (not len(slot.flat_slice) or changed(step, slot, parameter)):
            self.read_at_step = True
            return Note.STALE if len(slot.flat_slice) else None  # other ranks have all of it
        if changed(step, slot, parameter):
            return Note.UNCAPTURED
        if slot in step.excluded:
            return Note.EXCLUDED
        return Note.ABSENT if parameter.grad is None else Note.STALE
