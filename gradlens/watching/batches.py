"""Tables on their way from the training thread to the recorder's: what waits in the inbox, and what becomes of it.

    tables of a step -> TableBatch, in the inbox -> portions -> Unpacked: moments, facts and findings, as they came

Numbers that a device has are on their way to the host meanwhile; who unpacks a batch waits for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from gradlens.activations import Activations, added
from gradlens.facts import Fact
from gradlens.moments import Moments, together
from gradlens.records import Finding
from gradlens.statistics.table import Table, settle
from gradlens.statistics.transfer import Transfer
from gradlens.statistics.unpacking import Arrival, unpack
from gradlens.watching.isolation import isolated_compute

_NUMBERS, _HOST = {float, type(None)}, attrgetter("host")


@dataclass(eq=False)
class TableBatch:
    """Tables of a step, with what was observed, found and known at it."""

    step: int
    nbytes: int
    tables: list[Table]
    losses: Sequence[float | Tensor | None]  # by table
    scalars: dict[str, Any]
    findings: Sequence[Finding]
    facts: Sequence[Fact] = ()
    transfer: Transfer | None = None  # of what a device has
    slots: Sequence[tuple[object, str]] = ()  # where that belongs

    @property
    def rows(self) -> int:
        """Of all tables."""
        return sum(len(table.parameters) for table in self.tables)

    def begin_transfer(self) -> None:
        """Have what a device has copied to the host, in one copy and without waiting."""
        if not self.scalars and set(map(type, self.losses)) <= _NUMBERS and all(map(_HOST, self.tables)):
            return  # as nearly always on a CPU: told in a few calls
        observed = [name for name, value in self.scalars.items() if isinstance(value, Tensor) and not value.is_cpu]
        late = [i for i, loss in enumerate(self.losses) if isinstance(loss, Tensor) and not loss.is_cpu]
        if not (observed or late) and all(table.on_host() for table in self.tables):
            return
        with isolated_compute():
            losses = self.losses = list(self.losses)
            boxes = [_Box(self.scalars, name) for name in observed] + [_Box(losses, i) for i in late]
            self.slots = [slot for table in self.tables for slot in table.slots()] + [(box, "value") for box in boxes]
            self.transfer = Transfer([getattr(holder, name).detach() for holder, name in self.slots])

    def arrived(self) -> bool:
        """Whether every number is there."""
        return self.transfer is None or self.transfer.arrived()

    def arrivals(self) -> list[Arrival]:
        """The tables with their numbers; waits for those that a device has."""
        if self.transfer is not None:
            settle(self.slots, self.transfer.wait())
            self.transfer = None
        scalars = {name: float(value) for name, value in self.scalars.items()}
        return [Arrival(table, _with_loss(scalars, loss)) for table, loss in zip(self.tables, self.losses, strict=True)]


def _with_loss(scalars: dict[str, float], loss: float | Tensor | None) -> dict[str, float]:
    return scalars if loss is None or "loss" in scalars else {"loss": float(loss), **scalars}


class _Box:
    """A place in a dictionary or a list, as an attribute."""

    def __init__(self, holder: Any, key: Any) -> None:
        self._holder, self._key = holder, key

    @property
    def value(self) -> Any:
        """What is there."""
        return self._holder[self._key]

    @value.setter
    def value(self, value: Any) -> None:
        self._holder[self._key] = value


def findings_alone(findings: Sequence[Finding], step: int) -> TableBatch:
    """What was found, without any tables."""
    return TableBatch(step, 0, [], [], {}, findings)


def portions(batches: Sequence[TableBatch], most: int) -> Iterator[list[TableBatch]]:
    """Batches of some `most` rows together: a block is made of one portion, and handed on whole."""
    portion: list[TableBatch] = []
    rows = 0
    for batch in batches:
        portion.append(batch)
        rows += batch.rows
        if rows >= most:
            yield portion
            portion, rows = [], 0
    if portion:
        yield portion


class Unpacked(NamedTuple):
    """Moments; and facts and the training thread's findings, each with the place of the first moment that knows it."""

    moments: Moments
    facts: list[tuple[int, Fact]]
    findings: list[tuple[int, Finding]]

    @property
    def rows(self) -> int:
        """Of all moments."""
        return sum(block.rows for block in self.moments.blocks)


def unpacked(batches: Sequence[TableBatch], failed: Callable[[str, Exception], object]) -> Unpacked:
    """What batches hold, together. A fact that is bad is left out, and `failed` told: it costs no gradient."""
    facts, found, arrivals = [], list[tuple[int, Finding]](), list[Arrival]()
    for batch in batches:
        found += [(len(arrivals), finding) for finding in batch.findings]
        for each in batch.facts:
            try:
                facts.append((len(arrivals), on_host(each)))
            except Exception as error:  # noqa: BLE001
                failed(f"what {type(each).__name__.lower()} say", error)
        arrivals += batch.arrivals()
    return Unpacked(unpack(arrivals), facts, found)


def joined(parts: Sequence[Unpacked]) -> Unpacked:
    """What was unpacked one after the other, as if it had come at once."""
    starts = list(itertools.accumulate([0, *(len(part.moments) for part in parts[:-1])]))
    facts = [(at + place, fact) for at, part in zip(starts, parts, strict=True) for place, fact in part.facts]
    found = [(at + place, finding) for at, part in zip(starts, parts, strict=True) for place, finding in part.findings]
    return Unpacked(together([part.moments for part in parts]), facts, found)


def on_host(fact: Fact) -> Fact:
    """The fact without tensors: numbers that a device had are waited for, on this thread."""
    if isinstance(fact, Activations):
        calls = [row.tolist() if isinstance(row, Tensor) else row for rows in fact.sums for row in rows]
        place = np.repeat(np.arange(len(fact.calls)), fact.calls)
        return replace(fact, sums=added(np.array(calls, np.float64), place, len(fact.calls)))
    moved = {f.name: float(value) for f in fields(fact) if isinstance(value := getattr(fact, f.name), Tensor)}
    return replace(fact, **moved) if moved else fact  # type: ignore[arg-type]
