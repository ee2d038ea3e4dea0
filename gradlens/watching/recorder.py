"""From tables to records, on a thread of its own.

    training thread:  tables -> Transfer -> queue
    recorder thread:  queue -> Snapshot -> durable writers -> history -> rules -> the other writers

One direction: nothing here calls back into the training loop. What the user asked to be raised waits in `to_raise`.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from gradlens.analysis.diagnosis import Diagnosis, diagnose
from gradlens.analysis.history import History
from gradlens.analysis.ruleset import RuleSet
from gradlens.analysis.trend import trend
from gradlens.errors import FindingError, GradlensWarning
from gradlens.facts import Fact
from gradlens.records import Finding, Severity, Snapshot
from gradlens.statistics.table import Table
from gradlens.statistics.transfer import Transfer
from gradlens.watching.failures import Failures
from gradlens.writers.background import Background
from gradlens.writers.base import Writer
from gradlens.writers.fanout import Fanout


@dataclass(eq=False)
class TableBatch:
    """Tables on their way to the background thread."""

    step: int
    tables: list[Table]
    transfer: Transfer
    scalars: dict[str, Any]
    on_device: Sequence[str] = ()  # the scalars that come last in the transfer
    findings: Sequence[Finding] = ()
    losses: Sequence[float | Tensor | None] = ()  # by table; those on a device come last in the transfer
    facts: Sequence[Fact] = ()
    snapshots: list[Snapshot] | None = None  # once the numbers have been taken

    @property
    def nbytes(self) -> int:
        """What waits while the parcel waits."""
        return sum(tensor.numel() * 8 for table in self.tables for tensor in table.pack())

    def unpack(self) -> Iterator[Snapshot]:
        """The tables, once their numbers have arrived."""
        arrays = self.transfer.wait()
        losses = list(self.losses) or [None] * len(self.tables)
        moved = [i for i, loss in enumerate(losses) if isinstance(loss, Tensor)]
        end = len(arrays) - len(moved)
        for i, array in zip(moved, arrays[end:], strict=True):
            losses[i] = array.item()
        first = end - len(self.on_device)
        late = {name: array.item() for name, array in zip(self.on_device, arrays[first:end], strict=True)}
        scalars = {name: float(value) for name, value in {**self.scalars, **late}.items()}
        given, before = iter(arrays[:first]), None
        for table, loss in zip(self.tables, losses, strict=True):
            own = scalars if loss is None or "loss" in scalars else {"loss": float(loss), **scalars}
            snapshot = table.unpack(list(itertools.islice(given, len(table.pack()))), own, before)
            before = (table, snapshot)
            yield snapshot


class RecordConsumer:
    """A writer of table batches: what the background thread does with each.

    A record that waits would be lost with the process. So what is waiting goes to the durable writers first; rules and the
    other writers, which take longer, get it in its turn.
    """

    def __init__(
        self,
        history: History,
        rules: RuleSet,
        writers: Sequence[Writer],
        on_finding: Callable[[Finding], None],
    ) -> None:
        self._history, self._rules, self._on_finding = history, rules, on_finding
        self._durable = Fanout([writer for writer in writers if _durable(writer)])
        self._others = Fanout([writer for writer in writers if not _durable(writer)])
        self.waiting: Callable[[], list[Any]] = list
        self._ahead: list[Finding] = []  # that waited, and are recorded already

    def write(self, parcel: TableBatch | Finding) -> None:
        """Snapshots, findings, records."""
        if isinstance(parcel, Finding):
            self._found(parcel)
            return
        snapshots = self._record(parcel)
        self._record_waiting()
        for finding in parcel.findings:
            self._found(finding)
        for fact in parcel.facts:
            self._history.note(on_host(fact))
        for snapshot in snapshots:
            self._history.append(snapshot)
            self._others.write(snapshot)
            for finding in self._rules(self._history):
                self._found(finding)

    def _record(self, parcel: TableBatch) -> list[Snapshot]:
        if parcel.snapshots is None:
            parcel.snapshots = list(parcel.unpack())
            for snapshot in parcel.snapshots:
                self._durable.write(snapshot)
        return parcel.snapshots

    def _record_waiting(self) -> None:
        for parcel in self.waiting():
            if isinstance(parcel, Finding):  # that steps were left out, say
                self._record_finding(parcel)
            elif not parcel.transfer.arrived():
                return
            else:
                with contextlib.suppress(Exception):  # of which is told when its turn has come
                    self._record(parcel)

    def _record_finding(self, finding: Finding) -> None:
        if not any(finding is each for each in self._ahead):
            self._durable.write(finding)
            self._ahead.append(finding)

    def _found(self, finding: Finding) -> None:
        self._record_finding(finding)
        self._ahead = [each for each in self._ahead if each is not finding]
        self._others.write(finding)
        self._on_finding(finding)

    def flush(self) -> None:
        """Hand on."""
        self._durable.flush()
        self._others.flush()

    def close(self) -> None:
        """Hand on."""
        self._durable.close()
        self._others.close()


def on_host(fact: Fact) -> Fact:
    """The fact without tensors: numbers that a device had are waited for, on this thread."""
    moved = {f.name: float(value) for f in fields(fact) if isinstance(value := getattr(fact, f.name), Tensor)}
    return replace(fact, **moved) if moved else fact  # type: ignore[arg-type]


def _durable(writer: Writer) -> bool:
    return bool(getattr(writer, "durable", False))


class Recorder:
    """Takes tables on the training thread; history, rules and writers get them on another."""

    def __init__(
        self,
        rules: Sequence[Any],
        writers: Sequence[Writer],
        on_finding: str | Callable[[Finding], None],
        failures: Failures,
    ) -> None:
        self.history = History()
        self.found: list[Finding] = []
        self._failures, self._on_finding = failures, on_finding
        self._to_raise: list[Finding] = []
        self._facts: list[Fact] = []
        self._consumer = RecordConsumer(self.history, RuleSet(rules), writers, self._found)
        self._background = Background(self._consumer)
        self._consumer.waiting = self._background.waiting

    def note(self, fact: Fact) -> None:
        """Something is known beside gradients; it is handed on with the next tables."""
        self._facts.append(fact)

    def send(self, tables: list[Table], scalars: Mapping[str, Any], losses: Sequence[float | Tensor | None] = ()) -> None:
        """Hand tables on, with what the user observed at their step, and the findings that wait. Never waits."""
        findings = list(self._failures.findings)
        if not tables and not findings:
            return
        facts, self._facts = self._facts, []
        late = [loss for loss in losses if isinstance(loss, Tensor)]
        observed = {name: value.detach() for name, value in scalars.items() if isinstance(value, Tensor)}
        transfer = Transfer([tensor for table in tables for tensor in table.pack()] + list(observed.values()) + late)
        step = tables[-1].step if tables else self._failures.step()
        self._background.write(TableBatch(step, tables, transfer, dict(scalars), list(observed), findings, losses, facts))
        del self._failures.findings[: len(findings)]

    def _found(self, finding: Finding) -> None:
        self.found.append(finding)
        if callable(self._on_finding):
            try:
                self._on_finding(finding)
            except Exception as error:  # noqa: BLE001 - the user's callback must not stop the records
                self._failures("on_finding", error)
        elif self._on_finding == "warn":
            warnings.warn(GradlensWarning(str(finding)), stacklevel=2)
        elif self._on_finding == "raise" and finding.severity != Severity.INFO:
            self._to_raise.append(finding)

    def diagnosis(self) -> Diagnosis:
        """What was found so far, in order."""
        return diagnose(list(self.found), trend(self.history.course, list(self.history.facts)))

    def interrupt(self) -> None:
        """Raise what the user asked to be raised: called in the training thread, after an update."""
        if self._to_raise:
            raise FindingError(self._to_raise.pop(0))

    def busy(self) -> bool:
        """Whether something that was sent has not arrived yet."""
        return self._background.busy

    def flush(self) -> None:
        """Everything that was sent is in history and with the writers."""
        self._background.flush()

    def close(self) -> None:
        """Drain, and close the writers."""
        self._background.close()
