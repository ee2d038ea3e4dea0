"""Tables to blocks, on the recorder's thread: the numbers of many alike tables are taken at once.

    tables and their numbers  ->  runs of alike ones  ->  [moments, parameters] a column

Tables are alike when they have the same rows, notes and updates, as those of consecutive steps do. A table that is none of
the kind that is known here (several pieces, a scaler's numbers) is unpacked by itself, by `Table.unpack`, which is the
definition: a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
from torch import Tensor

from gradlens import fields
from gradlens.blocks import CODES, Block, Detail, block_of, concatenate, grouped
from gradlens.moments import Moments
from gradlens.records import Note, Parameters, Snapshot, Status, Top
from gradlens.statistics.table import UNTOUCHED, Piece, Table, numel_of, precision_of, whole_index
from gradlens.statistics.transfer import known

_OK, _ZERO, _NONFINITE, _ABSENT = (CODES[word] for word in (Status.OK, Status.ZERO, Status.NONFINITE, Status.ABSENT))
_AT = {column.name: i for i, column in enumerate(fields.UPDATES)}


@dataclass(eq=False)
class Arrival:
    """A table whose numbers are on the host, and what was observed at its step."""

    table: Table
    scalars: Mapping[str, float]


class Likeness(NamedTuple):
    """What tables must have in common to be unpacked together."""

    stage: str
    parameters: int  #: by identity
    rows: tuple[int, ...]
    notes: tuple[str | None, ...]
    rank: int
    updated: tuple[int, ...] | None = None  #: rows of the update
    moved: tuple[bool, ...] = ()
    kept: bool = False
    sampled: tuple[tuple[int, ...], tuple[int, ...]] | None = None  #: rows of the two samples


def likeness(table: Table) -> Likeness | None:
    """The likeness of a table; None if it has to be unpacked by itself."""
    if len(table.pieces) != 1 or table.flips or len(table.updates) > 1 or not table.on_host():
        return None
    (piece,) = table.pieces
    if piece.skipped or piece.divisor is not None or table.divisor != 1.0:
        return None
    first = Likeness(
        str(table.stage),
        id(table.parameters),
        tuple(piece.rows),
        tuple(table.notes),
        table.rank,
    )
    if not table.updates:
        return first
    (update,) = table.updates
    if update.skipped or update.scale != 1.0:
        return None
    sampled = update.ended is not None and update.used is not None
    return first._replace(
        updated=tuple(update.piece.rows),
        moved=tuple(update.moved),
        kept=update.kept,
        sampled=(tuple(update.ended.rows), tuple(update.used.rows)) if sampled else None,  # type: ignore[union-attr]
    )


def _likenesses(arrivals: Sequence[Arrival]) -> list[Likeness | None]:
    """Of each table; most are like the last one of their stage, which takes less to see than to say what they share."""
    last: dict[str, tuple[Table, Likeness]] = {}
    result: list[Likeness | None] = []
    for arrival in arrivals:
        table = arrival.table
        before = last.get(table.stage)
        if before is not None and _like(table, before[0]):
            result.append(before[1])
            continue
        key = likeness(table)
        if key is not None:
            last[table.stage] = table, key
        result.append(key)
    return result


def _like(table: Table, other: Table) -> bool:
    """Whether a table has the likeness of another, which has one."""
    if (
        table.parameters is not other.parameters
        or len(table.pieces) != 1
        or table.flips
        or len(table.updates) != len(other.updates)
        or table.divisor != 1.0
        or table.rank != other.rank
        or (table.notes is not other.notes and table.notes != other.notes)
        or not _like_piece(table.pieces[0], other.pieces[0])
        or isinstance(table.scale, Tensor)
    ):
        return False
    for update, known_ in zip(table.updates, other.updates, strict=True):
        if (
            update.skipped is not False
            or update.scale != 1.0
            or update.kept != known_.kept
            or update.moved != known_.moved
            or not _like_piece(update.piece, known_.piece)
            or not _like_piece(update.ended, known_.ended)
            or not _like_piece(update.used, known_.used)
        ):
            return False
    return True


def _like_piece(piece: Piece | None, other: Piece | None) -> bool:
    if piece is None or other is None:
        return piece is other
    same = piece.rows is other.rows or piece.rows == other.rows
    return same and piece.skipped is False and piece.divisor is None and piece.numbers.is_cpu


def unpack(arrivals: Sequence[Arrival]) -> Moments:
    """The moments, in the order given: of each its block, and its place in it."""
    alike = _likenesses(arrivals)
    alone = _alone(arrivals, alike)
    kept: dict[int, tuple[np.ndarray | slice, Parameters]] = {}  # by the identity of likenesses, of which there are few
    for arrival, key in zip(arrivals, alike, strict=True):
        if id(key) not in kept and key is not None:
            kept[id(key)] = _kept(arrival.table)
    kinds = [
        (arrival.table.stage, alone[i].parameters if key is None else kept[id(key)][1])
        for i, (arrival, key) in enumerate(zip(arrivals, alike, strict=True))
    ]
    numbers = np.array(grouped(kinds), np.int64)
    memory: _Memory = {}
    blocks, places = [], np.zeros(len(arrivals), np.int64)
    for number in range(int(numbers.max(initial=-1)) + 1):
        own = np.flatnonzero(numbers == number)
        places[own], members = np.arange(len(own)), own.tolist()
        parts: list[Block] = []
        for key, run in groupby(members, key=lambda i: alike[i]):
            if key is None:
                parts += [block_of(alone[i]) for i in run]
            else:
                parts.append(_Run([arrivals[i] for i in run], key, kept[id(key)], memory).block())
        blocks.append(concatenate(parts))
    return Moments(blocks, numbers, places)


def _alone(arrivals: Sequence[Arrival], alike: Sequence[Likeness | None]) -> dict[int, Snapshot]:
    """Those that are unpacked by themselves, by place."""
    result, before = {}, None
    for i, (arrival, key) in enumerate(zip(arrivals, alike, strict=True)):
        if key is None:
            numbers = [_host(tensor) for tensor in arrival.table.pack()]
            result[i] = arrival.table.unpack(numbers, arrival.scalars, before)
            before = arrival.table, result[i]
    return result


def _kept(table: Table) -> tuple[np.ndarray | slice, Parameters]:
    """The rows that a table has: those that it does not leave to another, and what these are of."""
    if "elsewhere" not in table.notes:
        return slice(None), table.parameters
    covered = {row for piece in table.pieces for row in piece.rows}
    rows = [row for row, note in enumerate(table.notes) if note != "elsewhere" or row in covered]
    if len(rows) == len(table.parameters):
        return slice(None), table.parameters
    return np.asarray(rows, np.int64), table.parameters.take(rows)


#: Columns that do not depend on updates, by the numbers, rows and parameters that they are of: tables share them.
_Memory = dict[tuple[object, ...], dict[str, np.ndarray]]


class _Run:
    """Alike tables."""

    def __init__(
        self,
        arrivals: Sequence[Arrival],
        key: Likeness,
        kept: tuple[np.ndarray | slice, Parameters],
        memory: _Memory,
    ) -> None:
        self._arrivals, self._key, self._memory = arrivals, key, memory
        self._kept = kept
        self._tables = [arrival.table for arrival in arrivals]
        self._first = self._tables[0]
        self._shape = len(arrivals), len(self._first.parameters)

    @staticmethod
    def _numbers(pieces: Sequence[Piece], stop: int | None = None) -> np.ndarray:
        """`[moments, rows, width]`."""
        return np.stack([_host(piece.numbers)[:, :stop] for piece in pieces])

    def block(self) -> Block:
        columns = self._with_unknown(self._summary()) | self._updates()
        kept, parameters = self._kept
        status = self._status(columns)
        if not isinstance(kept, slice):
            columns = {name: values[:, kept] for name, values in columns.items()}
            status = status[:, kept]
        tables = self._tables
        return Block(
            self._key.stage,
            parameters,
            np.array([table.step for table in tables], np.int64),
            np.array([table.backward for table in tables], np.int64),
            np.array([table.time for table in tables], np.float64),
            status,
            np.repeat(np.array([table.scale for table in tables], np.float64), len(parameters)).reshape(status.shape),
            columns,
            self._details(),
            [arrival.scalars for arrival in self._arrivals],
            self._key.rank,
        )

    # --- gradients --------------------------------------------------------------------------------------------------

    def _summary(self) -> dict[str, np.ndarray]:
        pieces = [table.pieces[0] for table in self._tables]
        same = self._key.rows, self._key.parameters, *(id(piece.numbers) for piece in pieces)
        if same not in self._memory:
            self._memory[same] = self._gradients(pieces)
        return self._memory[same]

    def _gradients(self, pieces: Sequence[Piece]) -> dict[str, np.ndarray]:
        numbers = np.ascontiguousarray(self._numbers(pieces, fields.QUANTILE.stop).transpose(2, 0, 1))
        rows = self._rows(self._key.rows)
        dtypes = {column.name: column.dtype for column in fields.SUMMARY} | dict.fromkeys(fields.QUANTILES, "float64")
        columns: dict[str, np.ndarray] = {}
        for (name, dtype), values in zip(dtypes.items(), numbers, strict=True):
            values = values.astype(dtype, copy=False)
            columns[name] = values if isinstance(rows, slice) else self._spread(self._untouched(name, dtype), rows, values)
        return fields.without_nothing(columns)

    def _with_unknown(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows that nobody could read are empty, not 0."""
        gone = set(np.flatnonzero([note == Note.GONE for note in self._key.notes]).tolist()) - set(self._key.rows)
        return fields.unknown(columns, np.asarray(sorted(gone))) if gone else columns

    def _rows(self, rows: tuple[int, ...]) -> np.ndarray | slice:
        return slice(None) if rows == tuple(range(self._shape[1])) else np.asarray(rows, np.int64)

    def _untouched(self, name: str, dtype: str) -> np.ndarray:
        """What rows have that no gradient reached: their partials are 0."""
        numel = numel_of(self._first.parameters)
        if name in ("numel", "zero"):
            return np.broadcast_to(numel, self._shape).copy()
        if dtype == "int64" or name in ("sum", "abs_sum", "square_sum"):
            return np.zeros(self._shape, dtype)
        if name in ("min", "max", "abs_max") or name in fields.QUANTILES:
            return np.broadcast_to(np.where(numel > 0, 0.0, np.nan), self._shape).copy()
        return np.full(self._shape, np.nan)

    @staticmethod
    def _spread(result: np.ndarray, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        result[:, rows] = values
        return result

    def _details(self) -> list[Detail | None]:
        of = self._first.parameters, self._key.rows, self._rows(self._key.rows), self._kept[0]
        return [partial(_detail, _host(table.pieces[0].numbers), *of) for table in self._tables]

    # --- updates ----------------------------------------------------------------------------------------------------

    def _updates(self) -> dict[str, np.ndarray]:
        zeros, nothing = np.broadcast_to(np.zeros((), np.int64), self._shape), np.broadcast_to(np.nan, self._shape)
        empty = {column.name: zeros if column.dtype == "int64" else nothing for column in fields.UPDATES}
        if self._key.updated is None:
            return empty
        updates = [table.updates[0] for table in self._tables]
        numbers = self._numbers([update.piece for update in updates]).transpose(2, 0, 1).copy()
        numbers[_AT["update_stuck"]][:, ~np.asarray(self._key.moved, bool)] = 0
        dot, exact = numbers[_AT["update_loss_dot"]], numbers[_AT["update_loss_exact"]]
        same = self._same_samples() & np.array([update.same for update in updates])
        dot[same], exact[same] = numbers[_AT["update_dot"]][same], 1.0
        if not self._key.kept and not same.all():
            clip = self._clip()[~same]
            dot[~same] = numbers[_AT["update_dot"]][~same] / clip[:, None]
            exact[~same] = np.where(np.isnan(clip), np.nan, 0.0)[:, None]
        exact[np.isnan(dot)] = np.nan
        rows = self._rows(self._key.updated)
        if isinstance(rows, slice):
            return {c.name: values.astype(c.dtype, copy=False) for c, values in zip(fields.UPDATES, numbers, strict=True)}
        return {c.name: self._spread(empty[c.name].copy(), rows, v) for c, v in zip(fields.UPDATES, numbers, strict=True)}

    def _samples(self) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]] | None:
        """What the last backward left and what the optimizer consumed, `[moments, rows, 16]` of the same rows."""
        if self._key.sampled is None:
            return None
        ended, used = self._key.sampled
        place = {row: i for i, row in enumerate(ended)}
        common = [(place[row], i) for i, row in enumerate(used) if row in place]
        if not common:
            return None
        left, right = (np.asarray(each, np.int64) for each in zip(*common, strict=True))
        updates = [table.updates[0] for table in self._tables]
        before = self._numbers([u.ended for u in updates if u.ended is not None])
        after = self._numbers([u.used for u in updates if u.used is not None])
        return before[:, left], after[:, right], tuple(ended[i] for i in left.tolist())

    def _same_samples(self) -> np.ndarray:
        """`[moments]` whether they agree bit for bit: `p.grad.data.mul_()` leaves no other trace."""
        samples = self._samples()
        if self._key.sampled is not None and not self._key.sampled[1]:
            return np.ones(self._shape[0], bool)
        if samples is None or self._key.sampled is None or len(samples[2]) < len(self._key.sampled[1]):
            return np.zeros(self._shape[0], bool)
        before, after = (np.ascontiguousarray(each, np.float64).view(np.int64) for each in samples[:2])
        return np.asarray((before == after).all(axis=(1, 2)))

    def _clip(self) -> np.ndarray:
        """`[moments]` what the whole gradient was multiplied by; NaN where that was not one number."""
        samples = self._samples()
        if samples is None:
            return np.full(self._shape[0], np.nan)
        before, after = (each.reshape(self._shape[0], -1) for each in samples[:2])
        return uniform_ratios(before, after, precision_of([self._first.parameters.dtypes[row] for row in samples[2]]))

    # --- status -----------------------------------------------------------------------------------------------------

    def _status(self, c: Mapping[str, np.ndarray]) -> np.ndarray:
        untouched = c["zero"] == c["numel"]
        status = np.where(untouched, _ZERO, _OK).astype(np.uint8)
        status[c["nan"] + c["inf"] > 0] = _NONFINITE
        for row, note in enumerate(self._key.notes):
            if note in UNTOUCHED:
                status[:, row] = CODES[str(note)]
            elif note == Status.UNCAPTURED or note == "stale":
                other = CODES[str(note)] if note == Status.UNCAPTURED else status[:, row]
                status[:, row] = np.where(untouched[:, row], _ABSENT, other)
            elif note == "gone":
                status[:, row] = CODES[Status.UNCAPTURED]
        return status


def _detail(
    numbers: np.ndarray,
    parameters: Parameters,
    pieces: tuple[int, ...],
    rows: np.ndarray | slice,
    kept: np.ndarray | slice,
) -> tuple[np.ndarray | None, Top | None]:
    """What is large of one table: its histogram and its most sensitive weights.

    A function of that table's numbers alone. The newest moments keep it, and would keep all tables that came with them.
    """
    n, histogram = len(parameters), None
    if numbers.shape[1] == fields.WIDTH:
        histogram = np.zeros((n, 2 * fields.BUCKETS), np.int64)
        histogram[rows] = numbers[:, fields.HISTOGRAM]
    top = Top(np.full((n, fields.TOP), -1), *np.full((2, n, fields.TOP), np.nan))
    index = numbers[:, fields.TOP_INDEX]
    top.index[rows] = whole_index(parameters, pieces, np.where(np.isnan(index), -1, index).astype(np.int64))
    top.partial[rows], top.value[rows] = numbers[:, fields.TOP_PARTIAL], numbers[:, fields.TOP_VALUE]
    if isinstance(kept, slice):
        return histogram, top
    return None if histogram is None else histogram[kept], top.take(kept)


def uniform_ratios(before: np.ndarray, after: np.ndarray, precision: float) -> np.ndarray:
    """`[moments]` c with `after = c * before` for every entry of a moment, up to rounding; NaN if there is none."""
    seen = np.isfinite(before) & (before != 0) & np.isfinite(after)
    ratios = np.full(before.shape, np.nan)
    np.divide(after, before, out=ratios, where=seen)
    ratios.sort(axis=1)  # NaN at the end
    count = seen.sum(axis=1)
    place = np.arange(len(ratios))
    last = np.maximum(count - 1, 0)
    middle = (ratios[place, last // 2] + ratios[place, np.minimum(count // 2, last)]) / 2
    spread = np.maximum(middle - ratios[:, 0], ratios[place, last] - middle)
    return np.where((middle > 0) & (spread <= 4 * precision * middle), middle, np.nan)


def _host(tensor: Tensor) -> np.ndarray:
    if tensor.requires_grad:
        tensor = tensor.detach()
    return known(tensor).numpy()  # type: ignore[no-any-return]
