"""From what capture saw to tables, on the training thread: which kernel reads what, and which table it belongs to.

A table is made by its first reading and filled by others. When it leaves for the recorder is `open_tables`'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradlens import findings, kernels
from gradlens.capture.events import (
    Event,
    LossSeen,
    Noted,
    PassEnded,
    PassFailed,
    Reading,
    ScaleFound,
    SteadyReading,
    SteadyStart,
    SteadyUpdate,
    SteadyUsed,
    StepClosed,
    TableDone,
    Update,
    WeightsBefore,
)
from gradlens.capture.sharding import summand
from gradlens.kernels.tensors import PLAIN
from gradlens.records import PARTIAL, Finding, Note, Parameters, Stage
from gradlens.statistics.buffers import Buffer, summarize
from gradlens.statistics.detail import DetailSteps
from gradlens.statistics.memory import Plan
from gradlens.statistics.streaming import EvidenceCollector
from gradlens.statistics.table import Piece, Table
from gradlens.watching import process_group
from gradlens.watching.failures import Failures
from gradlens.watching.isolation import capturing_cuda_graph, isolated_compute
from gradlens.watching.open_tables import OpenTables, merged
from gradlens.watching.recorder import Recorder
from gradlens.watching.row_calls import RowCalls, joined
from gradlens.watching.steady import SteadyTables
from gradlens.watching.updates import UpdateMeter, by_device, present

#: Notes of rows whose partials a backward did not compute, or of which others are in `.grad` too.
_NOT_COMPUTED = (Note.FROZEN, Note.EXCLUDED, Note.UNCAPTURED)

#: What prepared calls stand in for; and what they are called where they fail.
_PARTS = frozenset({"statistics", "gradient samples", "weights before the step", "updates"})
_PREPARED = "prepared calls"


class TableBuilder:
    """A sink of capture's: called with each event on the training thread, it hands complete tables to the recorder."""

    def __init__(self, recorder: Recorder, plan: Plan, features: frozenset[str], failures: Failures) -> None:
        self.recorder, self.failures = recorder, failures
        self._plan, self._features = plan, features
        self.open = OpenTables(recorder)
        self._flips: dict[str, Buffer] = {}
        self._meter, self._row_calls = UpdateMeter(plan), RowCalls()
        self.evidence = EvidenceCollector(plan) if "evidence" in features else None
        self._marked: tuple[Parameters, frozenset[int], Parameters] | None = None
        self._told: set[str] = set()  # parameters whose gradients were found to be summands, why evidence left something out
        self.detail = DetailSteps()
        self._touched = False  # by an event of a step that has not closed
        self.steady = SteadyTables(self.open, self._meter, self._flips, self._last_of, self._detail)
        self._steady_handlers = self.steady.handlers if self.evidence is None else {}
        self._handlers: dict[type, Callable[[Any], None]] = {
            Reading: self._on_reading,
            PassEnded: lambda e: self._do("gradient samples", self._meter.pass_ended, e.rows, e.gradients),
            PassFailed: self._on_pass_failed,
            WeightsBefore: lambda e: self._do("weights before the step", self._meter.keep, e),
            Update: lambda e: self._do("updates", self._update, e),
            ScaleFound: self._on_scale_found,
            LossSeen: self._on_loss,
            Noted: lambda e: self.recorder.note(e.fact),
            TableDone: lambda e: self._try("end of a backward's step", self.open.send_until, e.key),
            SteadyReading: self._on_steady,
            SteadyStart: self._on_steady,
            SteadyUsed: self._on_steady,
            SteadyUpdate: self._on_steady,
            Finding: self._on_finding,
        }

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if type(event) is StepClosed:
            self._on_step_closed(event)
        else:
            self._touched = True
            self._handlers[type(event)](event)

    # --- events -----------------------------------------------------------------------------------------------------

    def _on_reading(self, reading: Reading) -> None:
        self._do("statistics", self._read, reading)
        if self.evidence is not None and reading.key.stage == Stage.BACKWARD:
            self._do("evidence", self._gather, self.evidence, reading)

    def _on_steady(self, event: SteadyReading | SteadyStart | SteadyUsed | SteadyUpdate) -> None:
        """A prepared call; or else what the event stands for, one by one."""
        answer, failures = self._steady_handlers.get(type(event)), self.failures
        fine = not failures.any or not (failures.lately(_PARTS) or failures.off(_PREPARED))
        # The later parts of a step rest on the reading: where that was by a prepared call, everything is on the CPU.
        if answer is not None and fine and not (type(event) is SteadyReading and capturing_cuda_graph()):
            try:
                if answer(event):
                    if failures.any:
                        failures.worked(_PREPARED)
                    return
            except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
                event.route.calls = None
                self.failures(_PREPARED, error)
        for each in event.general():
            self(each)

    def _on_pass_failed(self, event: PassFailed) -> None:
        self.open.tables.pop(event.key, None)
        if self.evidence is not None:
            self.evidence.failed(event.key.backward)

    def _on_scale_found(self, event: ScaleFound) -> None:
        """A scaler turned up at the optimizer's step: what was read of this step is still multiplied by its scale."""
        for key, table in self.open.tables.items():
            if key.step == event.step and key.stage != Stage.USED:
                table.divisor = table.scale = event.scale
                table.host = False

    def _on_loss(self, event: LossSeen) -> None:
        self.open.losses[event.step, event.backward] = event.value

    def _on_finding(self, finding: Finding) -> None:
        self.failures.findings.append(finding)

    def _on_step_closed(self, event: StepClosed) -> None:
        step = event.step
        if self.evidence is not None:
            self._do("evidence", self._fold, self.evidence, step)
        elif not (self._touched or self.failures.findings):
            return
        if self.open.tables:
            self._try("end of a step", self.open.release, step, event.scalars)
        self.open.forget(step)
        if self.failures.findings:
            self._try("findings", self.open.send, [], {})  # what could not be sent with the step
        self._meter.forget()
        self._touched = bool(self.open.tables or self.open.losses)

    def _do(self, where: str, call: Callable[..., None], *args: Any) -> None:
        """Call what computes, apart from the user's computing."""
        self._try(where, self._apart, call, *args)

    @staticmethod
    def _apart(call: Callable[..., None], *args: Any) -> None:
        with isolated_compute():
            call(*args)

    def _try(self, where: str, call: Callable[..., None], *args: Any) -> None:
        failures = self.failures
        if failures.any and failures.off(where):
            return
        if capturing_cuda_graph():
            self._tell_once("graph", findings.cuda_graph(self.failures.step()))
            return
        try:
            call(*args)
            if failures.any:
                failures.worked(where)
        except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
            failures(where, error)

    def _tell_once(self, key: str, finding: Finding) -> None:
        if key not in self._told:
            self._told.add(key)
            self.failures.findings.append(finding)

    def _fold(self, evidence: EvidenceCollector, step: int) -> None:
        evidence.step_done()
        if evidence.left_out:
            self._tell_once(evidence.left_out, findings.evidence_left_out(step, evidence.left_out))

    # --- gradients --------------------------------------------------------------------------------------------------

    def _read(self, reading: Reading) -> None:
        if reading.replaces is not None:
            self.open.tables.pop(reading.replaces, None)
        table = self.open.of(reading.key, reading.parameters)
        used = reading.key.stage == Stage.USED
        if used:
            self._meter.consumed(reading.rows, reading.tensors)
            self.open.copied = None
        if reading.rows and not (used and reading.copies_backward and self._copy(table, reading)):
            self._summarize(table, reading)
        if not set(map(type, reading.tensors)) <= PLAIN:
            table.summands.update(row for row, g in zip(reading.rows, reading.tensors, strict=True) if summand(g))
        if reading.complete:
            self._complete(table, reading)
        last = self.open.last_of(reading.key) if reading.gone else None
        if last is not None and len(last.parameters) == len(reading.parameters):
            self._stand_in(table, reading, last)

    def _summarize(self, table: Table, reading: Reading) -> None:
        before, last = self._meter.weight_before, self._last_of(reading.key.stage, reading.parameters)
        detail = self._detail(reading.key.step)
        if last is not None and reading.replaces is not None:
            last.forget()  # what it has is of this very step
        if len(reading.rows) == 1 and not (reading.complete or reading.late):
            row, weight = reading.rows[0], reading.weights[0]
            read = self._row_calls.read(reading.parameters, row, reading.tensors[0], weight, last, detail)
            if read is not None:
                table.pieces.append(Piece(list(reading.rows), read, reading.skipped))
                return
        for rows, tensors, now in by_device(reading.rows, reading.tensors, reading.weights):
            fixed = kernels.StableTensors(tensors)
            if reading.complete and reading.key.stage == Stage.BACKWARD:
                self._meter.reading(fixed)
            weights = present([before(row, w) for row, w in zip(rows, now, strict=True)] if reading.late else now)
            numbers, flips = summarize(rows, fixed, weights, last, detail)
            table.pieces.append(Piece(rows, numbers, reading.skipped))
            if flips is not None:
                table.flips.append(Piece(*flips))

    def _detail(self, step: int) -> bool:
        return process_group.count() > 1 or self.detail.of(step)  # what ranks hold merges by its histograms

    def _stand_in(self, table: Table, reading: Reading, last: Table) -> None:
        """`.grad` was cleared before it could be read: the last backward's rows stand in for it."""
        everything = range(len(reading.parameters))
        rows = [row for row in everything if not reading.notes or reading.notes[row] != Note.ELSEWHERE]
        table.pieces += [Piece(p.rows, p.numbers, reading.skipped, last.divisor) for p in _only(last.pieces, rows)]
        table.flips += _only(last.flips, rows)
        notes, wanted = [*table.notes] or [None] * len(everything), set(rows)
        table.notes = [
            last.notes[i] if i in wanted and last.notes else None if i in wanted else notes[i] for i in everything
        ]

    def _gather(self, evidence: EvidenceCollector, reading: Reading) -> None:
        if reading.moving:
            evidence.moving()
            return
        for rows, tensors, _ in by_device(reading.rows, reading.tensors, reading.tensors):
            evidence.add(reading.parameters, reading.key.backward, rows, tensors, reading.divisor)
        if reading.complete:
            evidence.ended([row for row, note in enumerate(reading.notes) if note in _NOT_COMPUTED])

    def _complete(self, table: Table, reading: Reading) -> None:
        table.complete = True
        table.parameters = self._with_summands(reading.parameters, table)
        table.divisor, table.scale = reading.divisor, reading.scale
        table.notes = merged(table.notes, reading.notes)
        if len(table.pieces) > 1:
            table.pieces = joined(table.pieces)
        if table.stage == Stage.BACKWARD:
            self.open.ended(table)
        elif table.stage == Stage.REDUCED:
            self.open.last = table

    def _with_summands(self, parameters: Parameters, table: Table) -> Parameters:
        """The rows of summands marked: a gradient may be placed otherwise than its parameter. One object while it lasts."""
        if not table.summands:
            return parameters
        rows = frozenset(table.summands)
        if self._marked is None or self._marked[0] is not parameters or self._marked[1] != rows:
            self._marked = (parameters, rows, _mark(parameters, rows))
            named = [parameters.names[row] for row in sorted(rows)]
            if not self._told >= set(named):
                self._told.update(named)
                self.failures.findings.append(findings.partial_gradient(table.step, str(table.stage), named))
        return self._marked[2]

    def _copy(self, table: Table, reading: Reading) -> bool:
        """Take the last backward's rows for `used` where nothing can have changed in between: the samples say so too."""
        last, rows = self.open.last_of(reading.key), list(reading.rows)
        if last is None or Stage.USED in self._flips:
            return False  # some `used` gradient differed once: its successors compare with it, not with the backward's
        if not {row for piece in last.pieces for row in piece.rows}.issuperset(rows):
            return False
        if not self._meter.still_as_backward_left(rows):
            return False
        table.pieces += _only(last.pieces, rows)
        table.flips += _only(last.flips, rows)
        self.open.copied = Stage(last.stage)
        return True

    def _last_of(self, stage: Stage, parameters: Parameters) -> Buffer | None:
        if "flips" not in self._features:
            return None
        buffer = self._flips.get(stage)
        if buffer is None:
            buffer = self._flips[stage] = Buffer(self._plan)
        return buffer.use(parameters)

    def _update(self, update: Update) -> None:
        table = self.open.tables.get(update.key)
        if table is not None:
            table.host = False
            backward = self._flips.get(Stage.BACKWARD)
            given = self._flips.get(self.open.copied or Stage.USED)
            table.updates += self._meter.measure(update, given, backward)

    def detached(self) -> None:
        """Nothing more comes: what the last reading by the book refers to is the model's."""
        self.open.reading = None

    def release_open(self, scalars: Mapping[str, Any]) -> None:
        """Send what is complete of the open step, for a question asked in the middle of it."""
        self._try("a question in the middle of a step", self.open.send, self.open.answered(), scalars)


def _mark(parameters: Parameters, rows: frozenset[int]) -> Parameters:
    pieces = tuple(PARTIAL if row in rows else parameters.piece(row) for row in range(len(parameters)))
    return Parameters(parameters.names, parameters.shapes, parameters.dtypes, pieces)


def _only(pieces: Sequence[Piece], rows: Sequence[int]) -> list[Piece]:
    """The pieces' numbers for the given rows."""
    wanted = set(rows)
    result = []
    for piece in pieces:
        if wanted.issuperset(piece.rows):
            result.append(piece)
        else:
            at = [i for i, row in enumerate(piece.rows) if row in wanted]
            if at:
                result.append(Piece([piece.rows[i] for i in at], piece.numbers[at]))
    return result
