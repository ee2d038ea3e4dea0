"""From what capture read to tables, on the training thread: which kernel reads what, and which table it belongs to.

A table is made by its first reading, filled by others, and handed to the recorder when its step is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from gradlens import kernels
from gradlens.capture.readings import Key, Reading, Update
from gradlens.capture.sharding import summand
from gradlens.facts import Fact
from gradlens.kernels.tensors import PLAIN, local_part
from gradlens.records import PARTIAL, Finding, Parameters, Severity, Stage, Status
from gradlens.statistics.buffers import Buffer, keepable, summarize
from gradlens.statistics.detail import DetailSteps
from gradlens.statistics.memory import Plan
from gradlens.statistics.streaming import Streaming
from gradlens.statistics.table import Piece, Table, UpdatePiece
from gradlens.watching import process_group
from gradlens.watching.failures import Failures
from gradlens.watching.isolation import capturing_cuda_graph, isolated_compute
from gradlens.watching.overhead import Stopwatch
from gradlens.watching.recorder import Recorder


@dataclass(eq=False)
class UpdateEntries:
    """The entries of one parameter that the update is measured on."""

    row: int
    used: Tensor | None
    before: Tensor
    after: Tensor


#: Notes of rows whose partials a backward did not compute, or of which others are in `.grad` too.
_NOT_COMPUTED = (Status.FROZEN, Status.EXCLUDED, Status.UNCAPTURED)

#: StableTensors samples of gradients, by device.
Samples = dict[torch.device, Piece]


class TableBuilder:
    """A `capture.Sink`: takes readings on the training thread, and hands complete tables to the recorder."""

    def __init__(
        self, recorder: Recorder, plan: Plan, features: frozenset[str], failures: Failures, timed: Stopwatch
    ) -> None:
        self.recorder, self.failures = recorder, failures
        self._plan, self._features = plan, features
        self._open: dict[Key, Table] = {}
        self._losses: dict[tuple[int, int], float | Tensor] = {}  # by step and backward
        self._last: Table | None = None  # the last `backward` table, which `used` may copy
        self._flips: dict[str, Buffer] = {}
        self._before = Buffer(plan)
        self.evidence = Streaming(plan) if "evidence" in features else None
        self._reading = kernels.StableTensors()  # what was read at the end of a pass, until its samples were taken
        self._ended: Samples = {}  # `.grad` as the last backward left it
        self._consumed: Samples = {}  # as the optimizer got it
        self._marked: tuple[Parameters, frozenset[int], Parameters] | None = None
        self._told: set[str] = set()  # parameters whose gradients were found to be summands, why evidence left something out
        self.detail = DetailSteps()
        self._timed = timed
        self.count = 0  # tables that were made

    # --- capture's sink ---------------------------------------------------------------------------------------------

    def read(self, reading: Reading) -> None:
        """Take the gradients of some parameters."""
        self._do("statistics", self._read, reading)
        if self.evidence is not None and reading.key[2] == Stage.BACKWARD:
            self._do("evidence", self._gather, self.evidence, reading)

    def abandon(self, key: Key) -> None:
        """Forget what was read of a backward pass that failed."""
        self._open.pop(key, None)
        if self.evidence is not None:
            self.evidence.failed(key[1])

    def before(self, parameters: Parameters, rows: Sequence[int], weights: Sequence[Tensor]) -> None:
        """Keep the weights before the step."""
        self._do("weights before the step", self._keep_before, parameters, rows, weights)

    def update(self, update: Update) -> None:
        """Take what the optimizer did."""
        self._do("updates", self._update, update)

    def ended(self, rows: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Sample `.grad` as a backward pass left it, to tell later what was done to it."""
        self._do("gradient samples", self._sample_end, rows, gradients)

    def loss(self, step: int, backward: int, value: float | Tensor) -> None:
        """Keep the loss of a backward pass, for its tables."""
        self._losses[step, backward] = value

    def note(self, fact: Fact) -> None:
        """Hand a fact on, with what is sent next."""
        self.recorder.note(fact)

    def tell(self, finding: Finding) -> None:
        """Hand a finding on, with what is sent next."""
        self.failures.findings.append(finding)

    def step_closed(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Send what the step gave."""
        if self.evidence is not None:
            self._do("evidence", self._fold, self.evidence, step)
        if self._open:
            self._do("end of a step", self._release, step, scalars)
        self._open = {key: table for key, table in self._open.items() if table.step > step}
        self._losses = {key: loss for key, loss in self._losses.items() if key[0] > step}
        if self.failures.findings:
            self._do("findings", self._send, [], {})  # what could not be sent with the step
        self._last, self._ended, self._consumed, self._reading = None, {}, {}, kernels.StableTensors()
        self._before.forget()

    def interrupt(self) -> None:
        """Raise what the user asked to be raised."""
        self.recorder.interrupt()

    def _do(self, where: str, call: Callable, *args: Any) -> None:
        if self.failures.off(where):
            return
        if capturing_cuda_graph():
            self._leave_out_recorded()
            return
        with self._timed:
            try:
                with isolated_compute():
                    call(*args)
            except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
                self.failures(where, error)

    def _leave_out_recorded(self) -> None:
        if "graph" in self._told:
            return
        self._told.add("graph")
        self.tell(
            Finding(
                rule="cuda-graph",
                step=self.failures.step(),
                severity=Severity.WARNING,
                seen="a step was captured as a CUDA graph: it was not read, nor will replays be, for no hook runs in them",
                remedy="watch the steps before the capture, or train without the graph for as long as you want to look",
            )
        )

    def _fold(self, evidence: Streaming, step: int) -> None:
        evidence.step_done()
        if evidence.left_out and evidence.left_out not in self._told:
            self._told.add(evidence.left_out)
            self.failures.findings.append(
                Finding(
                    rule="evidence-left-out",
                    step=step,
                    severity=Severity.INFO,
                    seen=f"evidence does without some gradients: {evidence.left_out}",
                    remedy="gradlens.survey() gives verdicts at fixed weights for any model",
                )
            )

    # --- gradients --------------------------------------------------------------------------------------------------

    def _read(self, reading: Reading) -> None:
        table = self._table(reading)
        used = reading.key[2] == Stage.USED
        detail = process_group.count() > 1 or self.detail.of(reading.key[0])  # what ranks hold merges by its histograms
        if used:
            self._consumed.update(self._sample(reading.rows, reading.tensors))
        if reading.rows and not (used and reading.unchanged and self._copy(table, reading)):
            for rows, tensors, now in _by_device(reading.rows, reading.tensors, reading.weights):
                fixed = kernels.StableTensors(tensors)
                if reading.complete and reading.key[2] == Stage.BACKWARD:
                    self._reading = fixed
                weights = [self._weight_before(row, w) for row, w in zip(rows, now, strict=True)] if reading.late else now
                numbers, flips = summarize(rows, fixed, weights, self._last_of(reading), detail)
                table.pieces.append(Piece(rows, numbers, reading.skipped))
                if flips is not None:
                    table.flips.append(Piece(*flips))
        if not set(map(type, reading.tensors)) <= PLAIN:
            table.summands.update(row for row, g in zip(reading.rows, reading.tensors, strict=True) if summand(g))
        if reading.complete:
            self._complete(table, reading)
        if reading.gone and self._last is not None and len(self._last.parameters) == len(reading.parameters):
            self._stand_in(table, reading, self._last)

    def _stand_in(self, table: Table, reading: Reading, last: Table) -> None:
        """`.grad` was cleared before it could be read: the last backward's rows stand in for it."""
        everything = range(len(reading.parameters))
        rows = [row for row in everything if not reading.notes or reading.notes[row] != "elsewhere"]
        table.pieces += [Piece(p.rows, p.numbers, reading.skipped, last.divisor) for p in _only(last.pieces, rows)]
        table.flips += _only(last.flips, rows)
        notes, wanted = [*table.notes] or [None] * len(everything), set(rows)
        table.notes = [
            last.notes[i] if i in wanted and last.notes else None if i in wanted else notes[i] for i in everything
        ]

    def _gather(self, evidence: Streaming, reading: Reading) -> None:
        if reading.moving:
            evidence.moving()
            return
        for rows, tensors, _ in _by_device(reading.rows, reading.tensors, reading.tensors):
            evidence.add(reading.parameters, reading.key[1], rows, tensors, reading.divisor)
        if reading.complete:
            evidence.ended([row for row, note in enumerate(reading.notes) if note in _NOT_COMPUTED])

    def _table(self, reading: Reading) -> Table:
        table = self._open.get(reading.key)
        if table is None:
            step, backward, stage = reading.key
            table = Table(
                step,
                backward,
                stage,
                reading.parameters,
                time.time(),
                notes=["elsewhere"] * len(reading.parameters),
                rank=process_group.rank(),
            )
            self._open[reading.key] = table
            self.count += 1
        return table

    def _complete(self, table: Table, reading: Reading) -> None:
        table.complete = True
        table.parameters = self._with_summands(reading.parameters, table)
        table.divisor, table.scale = reading.divisor, reading.scale
        # Two optimizers read their own parameters each: a row keeps the note of the reading that had it.
        if not reading.notes:
            table.notes = []
        elif table.notes:
            table.notes = [old if new == "elsewhere" else new for new, old in zip(reading.notes, table.notes, strict=True)]
        if table.stage == Stage.BACKWARD:
            self._send_older(table)
            self._last = table

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
                self.failures.findings.append(_partial(table, named))
        return self._marked[2]

    def _copy(self, table: Table, reading: Reading) -> bool:
        """Take the `backward` rows for `used` where nothing can have changed in between: the samples say so too.

        Only on the CPU: elsewhere the comparison would make the host wait.
        """
        last = self._last
        if last is None or not isinstance(reading.scale, float) or reading.scale != 1.0:
            return False
        if Stage.USED in self._flips:
            return False  # some `used` gradient differed once: its successors compare with it, not with `backward`
        cpu = torch.device("cpu")
        if {*self._consumed, *self._ended} != {cpu} or not _bit_equal(self._ended[cpu], self._consumed[cpu], reading.rows):
            return False
        rows = list(reading.rows)
        table.pieces += _only(last.pieces, rows)
        table.flips += _only(last.flips, rows)
        return True

    def _weight_before(self, row: int, weight: Tensor) -> Tensor:
        """The weight before the step, where all of it was kept; else as it is now, one update later."""
        kept = self._before.get(row) if self._before.whole(row) else None
        return weight if kept is None else kept

    def _last_of(self, reading: Reading) -> Buffer | None:
        if "flips" not in self._features:
            return None
        return self._flips.setdefault(reading.key[2], Buffer(self._plan)).use(reading.parameters)

    # --- updates ----------------------------------------------------------------------------------------------------

    def _keep_before(self, parameters: Parameters, rows: Sequence[int], weights: Sequence[Tensor]) -> None:
        self._before.use(parameters)
        for members, tensors, _ in _by_device(rows, weights, weights):
            self._before.keep(members, tensors)

    def _sample(self, rows: Sequence[int], tensors: Sequence[Tensor]) -> Samples:
        groups = _by_device(rows, tensors, tensors)
        return {members[0].device: Piece(at, kernels.sample(members)) for at, members, _ in groups}

    def _sample_end(self, rows: Sequence[int], gradients: Sequence[Tensor]) -> None:
        self._ended, last, self._reading = {}, self._reading, kernels.StableTensors()
        if len(last) == len(gradients) and all(map(is_, last, gradients)):  # what was just read, on one device
            self._ended = {last[0].device: Piece(list(rows), kernels.sample(last))} if last else {}
        else:
            self._ended = self._sample(rows, gradients)

    def _update(self, update: Update) -> None:
        table = self._open.get(update.key)
        if table is None:
            return
        moved = dict(zip(update.rows, update.moved, strict=True))
        same = update.unchanged and isinstance(update.scale, float) and update.scale == 1.0
        for rows, weights, used in _by_device(update.rows, update.weights, update.used):
            whole, kept = self._before.together(rows, weights), None
            if whole is not None and same and all(g is None or g.layout == torch.strided for g in used):
                there, numbers = rows, kernels.compare(used, whole, weights)
            else:
                entries = [e for row, w, g in zip(rows, weights, used, strict=True) if (e := self._moved(row, w, g))]
                if not entries:
                    continue
                there, kept = [e.row for e in entries], self._kept(entries) if update.single and not same else None
                numbers = kernels.compare(
                    [e.used for e in entries], [e.before for e in entries], [e.after for e in entries], kept
                )
            device = weights[0].device
            table.updates.append(
                UpdatePiece(
                    Piece(there, numbers),
                    moved=[moved[row] for row in there],
                    skipped=update.skipped,
                    kept=kept is not None,
                    ended=self._ended.get(device) if update.own else None,
                    used=self._consumed.get(device),
                    same=same,
                    scale=update.scale,
                )
            )

    def _moved(self, row: int, weight: Tensor, used: Tensor | None) -> UpdateEntries | None:
        before = self._before.get(row)
        if before is None:
            return None
        gradient = None if used is None or not keepable(used) else self._before.view(row, used)
        return UpdateEntries(row, gradient, before, self._before.view(row, weight))

    def _kept(self, entries: Sequence[UpdateEntries]) -> list[Tensor | None] | None:
        """The loss's own gradient, where `flips` has kept it from the step's only backward."""
        last = self._flips.get(Stage.BACKWARD)
        if last is None:
            return None
        kept = [None if e.used is None else last.get(e.row) for e in entries]
        return kept if all(g is not None or e.used is None for g, e in zip(kept, entries, strict=True)) else None

    # --- sending ----------------------------------------------------------------------------------------------------

    def _send_older(self, table: Table) -> None:
        """Under accumulation each backward's tables leave when the next one comes, so that memory stays bounded."""
        older = [t for t in self._open.values() if t.complete and (t.step, t.backward) < (table.step, table.backward)]
        self._send([t for t in older if t.stage != Stage.USED], {})

    def _release(self, step: int, scalars: Mapping[str, Any]) -> None:
        self._send([t for t in self._open.values() if t.step <= step and t.complete], scalars)

    def release_open(self, scalars: Mapping[str, Any]) -> None:
        """Send what is complete of the open step, for a question asked in the middle of it."""
        tables = [t for t in self._open.values() if t.complete and t.stage != Stage.USED]
        self._do("a question in the middle of a step", self._send, tables, scalars)

    def _send(self, tables: list[Table], scalars: Mapping[str, Any]) -> None:
        self.recorder.send(tables, scalars, [self._losses.get((table.step, table.backward)) for table in tables])
        for table in tables:
            self._open.pop((table.step, table.backward, table.stage), None)


def _mark(parameters: Parameters, rows: frozenset[int]) -> Parameters:
    pieces = tuple(PARTIAL if row in rows else parameters.piece(row) for row in range(len(parameters)))
    return Parameters(parameters.names, parameters.shapes, parameters.dtypes, pieces)


def _partial(table: Table, names: Sequence[str]) -> Finding:
    few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return Finding(
        rule="partial-gradient",
        step=table.step,
        stage=str(table.stage),
        severity=Severity.INFO,
        seen=f"the gradients of {len(names)} parameters ({few}) are summands that the ranks have yet to add (placement "
        "Partial): their statistics are of this rank's summand, not of the gradient",
        causes=("tensor parallel replicates a norm layer whose input is sharded by sequence",),
        remedy="read them as local; reduce them before the optimizer's step if their placement is not meant",
        parameter=names[0],
        parameters=tuple(names),
    )


_ON_CPU = attrgetter("is_cpu")


def _bit_equal(a: Piece, b: Piece, rows: Sequence[int]) -> bool:
    """Whether two pieces have the same bits in these rows."""
    if list(a.rows) == list(b.rows) == list(rows):
        return torch.equal(a.numbers.view(torch.int64), b.numbers.view(torch.int64))
    left, right = (dict(zip(piece.rows, piece.numbers.view(torch.int64).tolist(), strict=True)) for piece in (a, b))
    return all(row in left and left[row] == right.get(row) for row in rows)


def _by_device(
    rows: Sequence[int], tensors: Sequence[Tensor], others: Sequence[Any]
) -> list[tuple[list[int], list[Tensor], list[Any]]]:
    """Groups of one device each; tensors without storage (meta) are left out."""
    if set(map(type, tensors)) <= PLAIN and all(map(_ON_CPU, tensors)):
        return [(list(rows), list(tensors), list(others))] if rows else []
    groups: dict[torch.device, tuple[list[int], list[Tensor], list[Any]]] = {}
    for row, tensor, other in zip(rows, tensors, others, strict=True):
        local = local_part(tensor)
        if local.device.type != "meta":
            group = groups.setdefault(local.device, ([], [], []))
            group[0].append(row)
            group[1].append(local)
            group[2].append(None if other is None else local_part(other))
    return list(groups.values())


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
