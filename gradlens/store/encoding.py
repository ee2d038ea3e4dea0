"""Records to the rows of a run directory's tables: their keys, the numbers that stand for names, and what detail is kept.

History has every row. Histograms and the most sensitive weights of a step are kept when the run has grown by a tenth since
the last that were, and at the end; the weights of moments around a step that went wrong too (`flight.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gradlens import blocks
from gradlens.activations import SUMS, Activations
from gradlens.blocks import Block, block_of
from gradlens.records import Parameters, Snapshot
from gradlens.schedules import Growing
from gradlens.store import segment
from gradlens.store.flight import Flight
from gradlens.store.tables import STAGES, STATUSES, TABLES
from gradlens.store.tail import Rows

GROWTH = 1.1  #: of the run, between two steps whose histograms and weights are kept


class RowEncoder:
    """The rows that have not been written yet. What they refer to is noted in the segment, whose file goes first."""

    def __init__(self, described: segment.Segment) -> None:
        self._segment = described
        self._pending: dict[str, list[Rows]] = {table: [] for table in TABLES}
        self.waiting = 0  #: rows among them
        self.stale = False  #: whether the segment's file lacks something
        self._snapshots = 0
        self._entries: dict[segment.Entry, int] = {}
        self._modules: dict[tuple[str, str], int] = {}
        self._lately: dict[int, tuple[Parameters, np.ndarray]] = {}  # rows' entries, by the identity of their parameters
        self._kept, self._flight = _Kept(), Flight()

    def take(self, moments: Sequence[tuple[Block, int]]) -> None:
        """Moments, each a block and a place in it."""
        if self._segment.first_step is None and moments:
            block, at = moments[0]
            self._segment.first_step, self.stale = int(block.step[at]), True
        numbers: dict[int, tuple[Block, list[int]]] = {}
        for number, (block, _) in enumerate(moments, start=self._snapshots):
            numbers.setdefault(id(block), (block, []))[1].append(number)
        for block, own in numbers.values():
            self._put_block(block, np.array(own, np.int64))
        self._put_scalars(moments)
        wrong = {id(block): self._flight.wrong(block) for block, _ in numbers.values()}
        steps = {key: block.step.tolist() for key, (block, _) in numbers.items()}
        for number, (block, at) in enumerate(moments, start=self._snapshots):
            due = self._kept.due(steps[id(block)][at], number, block, at)
            if due:
                self._put_detail(number, block.snapshot(at))
            for earlier, snapshot in self._flight.take(number, block, at, wrong=wrong[id(block)][at], written=due):
                self._put_detail(earlier, snapshot)
                self._kept.forget(earlier)
        self._kept.hold()
        if self._flight.steps and self._segment.settings.get("flight") != self._flight.steps:
            self._segment.settings = {**self._segment.settings, "flight": list(self._flight.steps)}
            self.stale = True
        self._snapshots += len(moments)

    def take_activations(self, passes: Sequence[Activations]) -> None:
        """What modules made in forward passes."""
        for each in passes:
            entries = [self._module(module) for module in zip(each.modules, each.types, strict=True)]
            rows = [i for i, entry in enumerate(entries) if entry is not None]
            keys = {"snapshot": self._snapshots, "step": each.step, "backward": each.backward}
            keys["time"] = int(_microseconds(np.array([each.time]))[0])
            columns = {name: np.full(len(rows), value) for name, value in keys.items()}
            columns["entry"] = np.array([entries[i] for i in rows], np.int32)
            columns["calls"] = np.array(each.calls)[rows]
            self._put("activations", columns | dict(zip(SUMS, each.sums[rows].T, strict=True)))

    def _module(self, module: tuple[str, str]) -> int | None:
        """The entry of an output; None of one too many."""
        if module not in self._modules and len(self._modules) < segment.MAX_MODULES:
            self._modules[module] = len(self._segment.modules)
            self._segment.modules.append(module)
            self.stale = True
        return self._modules.get(module)

    def _put_block(self, block: Block, numbers: np.ndarray) -> None:
        entries = self._entries_of(block.parameters)
        n = len(entries)
        rows = {name: np.repeat(values, n) for name, values in _keys(numbers, block).items()}
        rows["entry"] = np.tile(entries, len(numbers))
        rows["status"], rows["scale"] = _CODES[block.status].ravel(), block.scale.ravel()
        for name in TABLES["history"]:
            if name not in rows:
                rows[name] = np.ravel(block.column(name))
        self._put("history", rows)

    def _entries_of(self, parameters: Parameters) -> np.ndarray:
        known = self._lately.get(id(parameters))
        if known is not None and known[0] is parameters:
            return known[1]
        rows = np.empty(len(parameters), np.int32)
        for row, (name, shape, dtype) in enumerate(zip(parameters.names, parameters.shapes, parameters.dtypes, strict=True)):
            entry = (name, tuple(int(n) for n in shape), dtype, parameters.piece(row))
            if entry not in self._entries:
                self._entries[entry] = len(self._segment.parameters)
                self._segment.parameters.append(entry)
                self.stale = True
            rows[row] = self._entries[entry]
        if len(self._lately) >= 8:
            self._lately.clear()
        self._lately[id(parameters)] = parameters, rows
        return rows

    def _put_scalars(self, moments: Sequence[tuple[Block, int]]) -> None:
        names = self._segment.scalars
        places = {name: i for i, name in enumerate(names)}
        of: list[int] = []  # which of the moments
        entry: list[int] = []
        values: list[float] = []
        for at, (block, place) in enumerate(moments):
            for name, value in block.scalars[place].items():
                if name not in places and len(names) < segment.MAX_SCALARS:
                    places[name] = len(names)
                    names.append(name)
                    self.stale = True
                if name in places:
                    of.append(at)
                    entry.append(places[name])
                    values.append(value)
        if of:
            self._put(
                "scalars", {**_keys_of(moments, of, self._snapshots), "entry": np.array(entry), "value": np.array(values)}
            )

    def _put_detail(self, number: int, snapshot: Snapshot) -> None:
        keys = _keys(np.array([number]), block_of(snapshot))
        entries = self._entries_of(snapshot.parameters)

        def put(table: str, entry: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
            self._put(table, {**{name: np.repeat(v, len(entry)) for name, v in keys.items()}, "entry": entry, **columns})

        if snapshot.histogram is not None:
            row, bucket = np.nonzero(snapshot.histogram)
            put("histograms", entries[row], {"bucket": bucket, "count": snapshot.histogram[row, bucket]})
        if snapshot.top is not None:
            row, column = np.nonzero(snapshot.top.index >= 0)
            put(
                "weights",
                entries[row],
                {name: getattr(snapshot.top, name)[row, column] for name in ("index", "partial", "value")},
            )

    def _put(self, table: str, columns: Mapping[str, np.ndarray]) -> None:
        rows = {name: np.asarray(columns[name]).astype(dtype, copy=False) for name, dtype in TABLES[table].items()}
        count = len(rows["entry"])
        if count:
            self._pending[table].append(rows)
            self.waiting += count

    def take_rest(self) -> None:
        """The detail of the last step, at the end."""
        for number, snapshot in self._kept.rest():
            self._put_detail(number, snapshot)

    def batches(self) -> list[tuple[str, list[Rows]]]:
        """What has come for each table. It stays until it is said to be `written`."""
        return [(table, rows) for table, rows in self._pending.items() if rows]

    def written(self, table: str) -> None:
        """These are in a file."""
        self._pending[table] = []


def _keys(numbers: np.ndarray, block: Block) -> dict[str, np.ndarray]:
    """What rows of a block's moments begin with, `[m]` each."""
    return {
        "snapshot": numbers,
        "step": block.step,
        "backward": block.backward,
        "stage": np.full(len(numbers), STAGES.index(block.stage)),
        "time": _microseconds(block.time),
    }


def _keys_of(moments: Sequence[tuple[Block, int]], of: Sequence[int], first: int) -> dict[str, np.ndarray]:
    """The same of some moments of several blocks, the first of them all being number `first`."""
    chosen = [moments[at] for at in of]
    return {
        "snapshot": first + np.array(of),
        "step": np.array([block.step[at] for block, at in chosen]),
        "backward": np.array([block.backward[at] for block, at in chosen]),
        "stage": np.array([STAGES.index(block.stage) for block, _ in chosen]),
        "time": _microseconds(np.array([block.time[at] for block, at in chosen])),
    }


def _microseconds(seconds: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.round(seconds * 1e6), nan=0.0, posinf=0.0, neginf=0.0).astype(np.int64)


#: The code that the files have of each status of a block.
_CODES = np.array([STATUSES.index(status) for status in blocks.STATUSES], np.int8)


class _Kept:
    """Which steps' histograms and weights are kept: each at first, then when their count has grown; and the last."""

    def __init__(self) -> None:
        self._growing, self._step, self._due = Growing(GROWTH), -1, False
        self._last: list[tuple[int, Block | None, int, Snapshot | None]] = []

    def due(self, step: int, number: int, block: Block, at: int) -> bool:
        """Whether this moment's are to be kept."""
        if step != self._step:
            self._step, self._last = step, []
            self._due = self._growing.due()
        if not self._due:
            self._last.append((number, block, at, None))
            del self._last[:-8]
        return self._due

    def forget(self, number: int) -> None:
        """It was kept for another reason."""
        self._last = [each for each in self._last if each[0] != number]

    def hold(self) -> None:
        """Keep the last step's moments themselves, and not their blocks."""
        self._last = [
            (number, None, 0, _single(block, at) if block is not None else kept) for number, block, at, kept in self._last
        ]

    def rest(self) -> list[tuple[int, Snapshot]]:
        """The last step's, if they were not kept."""
        last, self._last = self._last, []
        return [(number, kept) for number, _, _, kept in last if kept is not None]


def _single(block: Block, at: int) -> Snapshot:
    return block.snapshot(at) if len(block) == 1 else block.part(at, at + 1).snapshot(0)
