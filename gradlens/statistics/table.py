"""One row a parameter, on the device until it is packed; then a snapshot.

A table is filled in pieces as readings arrive: rows of `kernels.summarize`, rows of `kernels.compare`, and fixed samples of
the gradients that tell what happened to them between backward and the optimizer. `pack()` lists its device tensors for one
transfer; `unpack()` takes the numbers back, on another thread, and gives the snapshot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gradlens import fields
from gradlens.records import COMPLEX, Note, Parameters, Snapshot, Status, Top

UNTOUCHED = (Status.FROZEN, Status.EXCLUDED, Status.ABSENT, Status.UNDEFINED)


@dataclass(eq=False)
class Piece:
    """The numbers of some of the table's rows."""

    rows: Sequence[int]
    numbers: Tensor  # [len(rows), width]
    skipped: bool | Tensor = False  # the scaler found inf in these gradients' optimizer, which did nothing
    divisor: float | Tensor | None = None  # where it is not the table's


@dataclass(eq=False)
class UpdatePiece:
    """What the optimizer did to the parameters of some of the table's rows."""

    piece: Piece
    moved: Sequence[bool]
    skipped: bool | Tensor
    kept: bool  # update_loss_dot rests on a kept gradient, still times the loss scale
    ended: Piece | None  # samples of `.grad` as the last backward left it
    used: Piece | None  # samples of what the optimizer consumed
    same: bool  # nothing wrote to `.grad` in between
    scale: float | Tensor = 1.0


@dataclass(eq=False)
class Table:
    """One step, backward and stage."""

    step: int
    backward: int
    stage: str
    parameters: Parameters
    time: float
    scale: float | Tensor = 1.0
    divisor: float | Tensor = 1.0  # what the numbers still have to be divided by
    notes: list[str | None] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    flips: list[Piece] = field(default_factory=list)  # of sampled parameters
    updates: list[UpdatePiece] = field(default_factory=list)
    complete: bool = False
    rank: int = 0
    summands: set[int] = field(default_factory=set)  # rows of which this rank has one summand
    host: bool = False  # known to be on the host, all of it

    # --- packing ----------------------------------------------------------------------------------------------------

    def pack(self) -> list[Tensor]:
        """Every tensor of the table, in the order in which `unpack` wants the numbers."""
        return [tensor for holder, name in self._slots() if isinstance(tensor := getattr(holder, name), Tensor)]

    def _slots(self) -> list[tuple[object, str]]:
        slots: list[tuple[object, str]] = [(self, "scale"), (self, "divisor")]
        slots += [(piece, name) for piece in self.pieces for name in ("numbers", "skipped", "divisor")]
        slots += [(piece, "numbers") for piece in self.flips]
        for update in self.updates:
            slots += [(update, "skipped"), (update, "scale"), (update.piece, "numbers")]
            slots += [(piece, "numbers") for piece in (update.ended, update.used) if piece is not None]
        return slots

    def slots(self) -> list[tuple[object, str]]:
        """Which attribute of which object holds each tensor of `pack`; tables may share these objects."""
        return [(holder, name) for holder, name in self._slots() if isinstance(getattr(holder, name), Tensor)]

    def on_host(self) -> bool:
        """Whether every number of it is on the host already."""
        if self.host:
            return True
        if isinstance(self.scale, Tensor) or isinstance(self.divisor, Tensor):
            return False
        for piece in (*self.pieces, *self.flips):
            if not piece.numbers.is_cpu or isinstance(piece.skipped, Tensor) or isinstance(piece.divisor, Tensor):
                return False
        return all(each.piece.numbers.is_cpu and not isinstance(each.skipped, Tensor) for each in self.updates)

    def unpack(
        self, arrays: Sequence[np.ndarray], scalars: Mapping[str, float], before: tuple[Table, Snapshot] | None = None
    ) -> Snapshot:
        """The snapshot, from the numbers of `pack`. What another table has of the same pieces is taken from its snapshot."""
        given = iter(arrays)
        numbers = {
            (id(holder), name): next(given) if isinstance(value := getattr(holder, name), Tensor) else value
            for holder, name in self._slots()
        }
        return _Assembly(self, numbers).snapshot(scalars, before)


class _Assembly:
    """A snapshot in the making."""

    def __init__(self, table: Table, numbers: Mapping[tuple[int, str], object]) -> None:
        self.table, self._numbers = table, numbers
        n = len(table.parameters)
        self.columns = fields.empty(n)
        detailed = all(self._array(piece).shape[1] == fields.WIDTH for piece in table.pieces)
        self.histogram = np.zeros((n, 2 * fields.BUCKETS), np.int64) if detailed else None
        self.top = Top(np.full((n, fields.TOP), -1), np.full((n, fields.TOP), np.nan), np.full((n, fields.TOP), np.nan))
        self.covered = np.zeros(n, bool)

    def _number(self, holder: object, name: str) -> float:
        return float(np.asarray(self._numbers[id(holder), name]).reshape(-1)[0])

    def _array(self, piece: Piece) -> np.ndarray:
        return np.asarray(self._numbers[id(piece), "numbers"], np.float64)

    def _rows(self, piece: Piece) -> np.ndarray | slice:
        """Where a piece's numbers go; all rows in order, which is the rule, as a slice: that is ten times as fast."""
        n = len(self.covered)
        return slice(n) if len(piece.rows) == n and list(piece.rows) == list(range(n)) else np.asarray(piece.rows, np.int64)

    def snapshot(self, scalars: Mapping[str, float], before: tuple[Table, Snapshot] | None) -> Snapshot:
        table = self.table
        if before is not None and self._same(*before):
            self._take(before[1])
        else:
            self._read()
        for update in table.updates:
            if not self._number(update, "skipped"):
                self._fill_update(update)
        status = self._status()
        self._empty_unknown()
        snapshot = Snapshot(
            step=table.step,
            backward=table.backward,
            stage=table.stage,
            time=table.time,
            parameters=table.parameters,
            status=status,
            scale=np.full(len(status), self._number(table, "scale")),
            columns=self.columns,
            histogram=self.histogram,
            top=self.top,
            scalars=dict(scalars),
            rank=table.rank,
        )
        elsewhere = [i for i, note in enumerate(table.notes) if note == "elsewhere" and not self.covered[i]]
        if not elsewhere:
            return snapshot
        return snapshot.take([i for i in range(len(status)) if i not in set(elsewhere)])

    def _same(self, table: Table, snapshot: Snapshot) -> bool:
        """Whether the other table rests on the same numbers: the `used` one as a rule, on those of `backward`."""
        mine = self.table
        return (
            len(snapshot) == len(self.covered)
            and table.parameters is mine.parameters
            and Note.GONE not in (*table.notes, *mine.notes)
            and (table.pieces, table.flips) == (mine.pieces, mine.flips)
            and self._number(mine, "divisor") == 1.0
            and isinstance(table.divisor, float)
            and table.divisor == 1.0
        )

    def _take(self, other: Snapshot) -> None:
        """What does not depend on updates: frozen, so that it can be shared."""
        updates = {field.name for field in fields.UPDATES}
        self.columns.update({name: values for name, values in other.columns.items() if name not in updates})
        assert other.top is not None
        self.histogram, self.top = other.histogram, other.top
        for piece in self.table.pieces:
            self.covered[self._rows(piece)] = True

    def _read(self) -> None:
        self._fill_absent()
        for piece in self.table.pieces:
            self._fill(piece)
        for piece in self.table.flips:
            self._fill_group(piece, self._array(piece), fields.FLIPS)
        divisors = np.full(len(self.covered), self._number(self.table, "divisor"))
        for piece in self.table.pieces:
            if piece.divisor is not None:
                divisors[self._rows(piece)] = self._number(piece, "divisor")
        self._unscale(divisors)
        self.columns = fields.without_nothing(self.columns)

    def _fill_absent(self) -> None:
        """A row that no gradient reached: its partials are 0."""
        numel = numel_of(self.table.parameters)
        self.columns["numel"][:] = self.columns["zero"][:] = numel
        for name in ("sum", "abs_sum", "square_sum"):
            self.columns[name][:] = 0.0
        for name in fields.QUANTILES:
            self.columns[name] = np.full(len(numel), np.nan)
        for name in ("min", "max", "abs_max", *fields.QUANTILES):
            self.columns[name][numel > 0] = 0.0

    def _empty_unknown(self) -> None:
        """What nobody could read is empty, not the 0 of a parameter that no gradient reached."""
        rows = [row for row, note in enumerate(self.table.notes) if note == Note.GONE and not self.covered[row]]
        if rows:
            self.columns = fields.unknown(self.columns, np.asarray(rows))

    def _fill_group(self, piece: Piece, array: np.ndarray, group: Sequence[fields.Field], first: int = 0) -> None:
        rows = self._rows(piece)
        for at, column in enumerate(group, start=first):
            self.columns[column.name][rows] = array[:, at]

    def _fill(self, piece: Piece) -> None:
        array, rows = self._array(piece), self._rows(piece)
        self._fill_group(piece, array, fields.SUMMARY)
        for at, name in enumerate(fields.QUANTILES, start=fields.QUANTILE.start):
            self.columns[name][rows] = array[:, at]
        if self.histogram is not None:
            self.histogram[rows] = array[:, fields.HISTOGRAM]
        self.top.partial[rows] = array[:, fields.TOP_PARTIAL]
        index = array[:, fields.TOP_INDEX]
        self.top.index[rows] = whole_index(
            self.table.parameters, piece.rows, np.where(np.isnan(index), -1, index).astype(np.int64)
        )
        self.top.value[rows] = array[:, fields.TOP_VALUE]
        self.covered[rows] = True

    def _unscale(self, divisors: np.ndarray) -> None:
        known = np.where(np.isnan(divisors), 1.0, divisors)
        if (known == 1.0).all():
            return
        self.columns = fields.unscale(self.columns, known)
        self.top = Top(self.top.index, self.top.partial / known[:, None], self.top.value)
        if self.histogram is None:
            return
        for scale in set(known.tolist()) - {1.0}:
            rows = known == scale
            self.histogram[rows] = fields.shift(self.histogram[rows], round(math.log2(scale)))

    def _fill_update(self, update: UpdatePiece) -> None:
        array = self._array(update.piece).copy()
        at = {column.name: i for i, column in enumerate(fields.UPDATES)}
        array[~np.asarray(update.moved, bool), at["update_stuck"]] = 0
        dot, exact = at["update_loss_dot"], at["update_loss_exact"]
        if update.same and _same_samples(self, update):
            array[:, dot], array[:, exact] = array[:, at["update_dot"]], 1.0
        elif update.kept:
            array[:, dot] /= self._number(update, "scale")
        else:
            clip = self._clip(update)
            array[:, dot] = array[:, at["update_dot"]] / clip
            array[:, exact] = np.nan if math.isnan(clip) else 0.0
        array[np.isnan(array[:, dot]), exact] = np.nan
        self._fill_group(update.piece, array, fields.UPDATES)

    def _clip(self, update: UpdatePiece) -> float:
        """What the whole gradient was multiplied by between backward and optimizer; NaN if that was not one number."""
        if update.ended is None or update.used is None:
            return math.nan
        ended = dict(zip(update.ended.rows, self._array(update.ended), strict=True))
        rows = [i for i in update.used.rows if i in ended]
        if not rows:
            return math.nan
        before = np.stack([ended[i] for i in rows]) / self._number(update, "scale")
        after = np.stack([row for i, row in zip(update.used.rows, self._array(update.used), strict=True) if i in ended])
        return _uniform_ratio(before, after, precision_of([self.table.parameters.dtypes[i] for i in rows]))

    def _status(self) -> np.ndarray:
        c = self.columns
        status = np.full(len(self.covered), Status.OK.value, dtype=object)
        status[c["zero"] == c["numel"]] = Status.ZERO.value
        status[c["nan"] + c["inf"] > 0] = Status.NONFINITE.value
        for piece in self.table.pieces:
            if self._number(piece, "skipped"):
                status[self._rows(piece)] = Status.NONFINITE.value
        for i, note in enumerate(self.table.notes):
            if note is None:
                continue
            if note in UNTOUCHED:
                status[i] = str(note)
            elif note in ("stale", Status.UNCAPTURED):
                untouched = c["zero"][i] == c["numel"][i]
                status[i] = Status.ABSENT.value if untouched else str(note) if note == Status.UNCAPTURED else status[i]
            elif note == "gone":
                status[i] = Status.UNCAPTURED.value
        return status


def settle(slots: Iterable[tuple[object, str]], arrays: Iterable[np.ndarray]) -> None:
    """Replace device tensors by the arrays that have arrived on the host."""
    for (holder, name), array in zip(slots, arrays, strict=True):
        setattr(holder, name, torch.from_numpy(array) if name == "numbers" else float(array.reshape(-1)[0]))


def whole_index(parameters: Parameters, rows: Sequence[int], index: np.ndarray) -> np.ndarray:
    """Indices into whole parameters, `[rows, k]`, where a rank holds a piece."""
    if not any(parameters.pieces):
        return index
    return np.stack([parameters.whole_index(row, at) for row, at in zip(rows, index, strict=True)])


@lru_cache(maxsize=8)
def numel_of(parameters: Parameters) -> np.ndarray:
    """`[n]` the numbers that a rank holds of each parameter: a complex entry is two."""
    sizes = [math.prod(parameters.local_shape(row)) for row in range(len(parameters))]
    return np.asarray(sizes, np.int64) * [2 if dtype in COMPLEX else 1 for dtype in parameters.dtypes]


def _same_samples(assembly: _Assembly, update: UpdatePiece) -> bool:
    """Whether the samples agree bit for bit: `p.grad.data.mul_()` leaves no other trace."""
    if update.ended is None or update.used is None:
        return False
    ended, used = (assembly._array(piece).view(np.int64) for piece in (update.ended, update.used))
    position = {row: i for i, row in enumerate(update.ended.rows)}
    at = [position.get(row, -1) for row in update.used.rows]
    return min(at, default=0) >= 0 and np.array_equal(ended[at], used)


def precision_of(dtypes: Sequence[str]) -> float:
    return max(torch.finfo(getattr(torch, dtype)).eps for dtype in dtypes)


def _uniform_ratio(before: np.ndarray, after: np.ndarray, precision: float) -> float:
    """`c` with `after = c * before` for every entry, up to rounding; NaN if there is none."""
    seen = np.isfinite(before) & (before != 0) & np.isfinite(after)
    if not seen.any():
        return math.nan
    ratios = after[seen] / before[seen]
    middle = float(np.median(ratios))
    return middle if middle > 0 and np.abs(ratios - middle).max() <= 4 * precision * middle else math.nan
