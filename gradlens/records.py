"""What the stages hand on: frozen, on the host, numpy only.

A `Snapshot` is one table at one moment: a row for each parameter, at one step, backward and stage. A `Finding` is what a
rule says about it. A `Verdict` is a direction with evidence. The live half makes them, the offline half reads them, and
no record reaches back to a tensor.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import repeat
from typing import NamedTuple

import numpy as np

from gradlens import fields, markup


class Stage(enum.StrEnum):
    """Which gradient was read; in the order in which they arise."""

    BACKWARD = "backward"  #: this backward's own partials
    ACCUMULATED = "accumulated"  #: this rank's `.grad` after this backward
    REDUCED = "reduced"  #: `.grad` after averaging over ranks, everything accumulated included
    USED = "used"  #: what the optimizer consumed: unscaled, clipped, averaged


class Status(enum.StrEnum):
    """Why a parameter has no or zero partials; the first that holds."""

    FROZEN = "frozen"
    UNCAPTURED = "uncaptured"  #: `.grad` changed though no hook fired
    ABSENT = "absent"  #: the loss does not depend on it: its partials are 0
    EXCLUDED = "excluded"  #: left out by `backward(inputs=...)`, or its `.grad` was taken away before the step
    UNDEFINED = "undefined"  #: in the graph, but its backward returned None
    NONFINITE = "nonfinite"
    ZERO = "zero"  #: in the graph, all partials 0
    OK = "ok"


class Note(enum.StrEnum):
    """What capture says of a row that has no tensor, or a special one."""

    FROZEN = Status.FROZEN.value
    UNCAPTURED = Status.UNCAPTURED.value
    ABSENT = Status.ABSENT.value
    EXCLUDED = Status.EXCLUDED.value
    UNDEFINED = Status.UNDEFINED.value
    STALE = "stale"  #: left in `.grad` from an earlier step
    ELSEWHERE = "elsewhere"  #: another reading has the row
    GONE = "gone"  #: somebody used and freed the gradient before it could be read


class TableKey(NamedTuple):
    """Which table: there is one of each."""

    step: int
    backward: int
    stage: Stage


class Source(enum.Enum):
    """Whose gradient is the g in `g.dw`, the first-order change of the loss."""

    USED = "used"  #: the loss's own was used as it was
    KEPT = "kept"  #: a copy of the loss's own, which feature `flips` has kept
    RATIO = "ratio"  #: the used one, divided by what clipping multiplied all of it by, if that is one number


_BITS = {status.value: 1 << place for place, status in enumerate(Status)}


class Direction(enum.StrEnum):
    """Which way a weight should move to lower the loss."""

    INCREASE = "increase"
    DECREASE = "decrease"
    HOLD = "hold"
    UNDEFINED = "undefined"


class Verdict(enum.StrEnum):
    """A direction with evidence."""

    INCREASE = "increase"
    DECREASE = "decrease"
    UNDECIDED = "undecided"


class Severity(enum.StrEnum):
    """How much a finding matters."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @property
    def rank(self) -> int:
        """0, 1, 2: for sorting."""
        return list(Severity).index(self)


def directions(partials: np.ndarray) -> np.ndarray:
    """The direction of each partial, as an array of words of the same shape."""
    words = np.full(np.shape(partials), Direction.UNDEFINED.value, dtype=object)
    words[np.less(partials, 0, where=np.isfinite(partials), out=np.zeros(np.shape(partials), bool))] = "increase"
    words[np.greater(partials, 0, where=np.isfinite(partials), out=np.zeros(np.shape(partials), bool))] = "decrease"
    words[np.equal(partials, 0)] = "hold"
    return words


#: The dtypes whose entries count as two.
COMPLEX = ("complex32", "complex64", "complex128")

#: The piece of a row whose numbers are of one summand of the gradient.
PARTIAL = "partial"


@dataclass(frozen=True)
class Parameters:
    """The parameters that a table has rows for. One object serves every snapshot until the model changes.

    A row describes what this rank holds of a parameter. `pieces` says what that is, in the form `"4:8,0:16"`: the entries of
    the whole tensor in each dimension. Rows of different pieces of one parameter are disjoint, and merge; rows of the same
    piece are copies. `""` is all of it, and `"@5:9"` entries 5 to 8 of the flattened whole. `PARTIAL` is a summand: what the
    ranks hold has to be added before its statistics can be taken. `"~4,0:16"` has four entries that are not next to each
    other, and where they are is not known. Rows of these two kinds are of this rank alone.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  #: of the whole tensors
    dtypes: tuple[str, ...]  #: `float32`, without `torch.`
    pieces: tuple[str, ...] = ()  #: by row; empty where every row is of a whole tensor

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.shapes) == len(self.dtypes)
        assert len(self.pieces) in (0, len(self.names))

    def piece(self, row: int) -> str:
        """What this rank holds of the row's parameter."""
        return self.pieces[row] if self.pieces else ""

    def alone(self, row: int) -> bool:
        """Whether the row is of this rank alone, and merges with no other."""
        return self.piece(row) == PARTIAL or "~" in self.piece(row)

    def local_shape(self, row: int) -> tuple[int, ...]:
        """The shape of what this rank holds."""
        blocks = _blocks(self.piece(row))
        return self.shapes[row] if blocks is None else tuple(size for _, size in blocks)

    def _whole_shape(self, row: int) -> tuple[int, ...]:
        """The whole's, flattened where the piece is of that."""
        flat = self.piece(row).startswith("@")
        return ((math.prod(self.shapes[row]),) if flat else self.shapes[row]) + self._pair(row)

    def whole_index(self, row: int, index: np.ndarray) -> np.ndarray:
        """Flat indices into the whole tensor, from flat ones into what this rank holds; negative ones stay.

        A complex entry counts as two. -1 where the place in the whole is not known.
        """
        starts, pair = self._starts(row), self._pair(row)
        if starts is None:
            return index if _blocks(self.piece(row)) is None else np.full_like(index, -1)
        valid = index >= 0
        at = np.unravel_index(index[valid], self.local_shape(row) + pair)
        result = index.copy()
        moved = [part + start for part, start in zip(at, starts, strict=True)]
        result[valid] = np.ravel_multi_index(moved, self._whole_shape(row))
        return result

    def local_index(self, row: int, index: np.ndarray) -> np.ndarray:
        """The inverse, of indices into the whole: -1 for entries that other ranks hold."""
        starts, pair = self._starts(row), self._pair(row)
        if starts is None:
            return index if _blocks(self.piece(row)) is None else np.full_like(index, -1)
        shape = self.local_shape(row) + pair
        at = np.unravel_index(index, self._whole_shape(row))
        moved = [part - start for part, start in zip(at, starts, strict=True)]
        here = np.all([(part >= 0) & (part < size) for part, size in zip(moved, shape, strict=True)], axis=0)
        result = np.full_like(index, -1)
        result[here] = np.ravel_multi_index([part[here] for part in moved], shape)
        return result

    def _pair(self, row: int) -> tuple[int, ...]:
        return (2,) if self.dtypes[row] in COMPLEX else ()

    def _starts(self, row: int) -> list[int] | None:
        """Where the piece begins in each dimension; None of a whole tensor, and where that is not known."""
        blocks = _blocks(self.piece(row))
        if blocks is None or any(start is None for start, _ in blocks):
            return None
        return [start for start, _ in blocks if start is not None] + [0] * len(self._pair(row))

    def __len__(self) -> int:
        return len(self.names)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Taken once: of 10,000 parameters it takes a millisecond."""
        return hash((self.names, self.shapes, self.dtypes, self.pieces))

    @cached_property
    def position(self) -> dict[str, int]:
        """The row of each name."""
        return {name: i for i, name in enumerate(self.names)}

    def take(self, rows: Sequence[int]) -> Parameters:
        """Those of the given rows; the same object for the same rows, as long as it is asked for."""
        return _taken(self, tuple(map(int, rows)))


@lru_cache(maxsize=64)
def _taken(parameters: Parameters, rows: tuple[int, ...]) -> Parameters:
    return Parameters(
        tuple(parameters.names[i] for i in rows),
        tuple(parameters.shapes[i] for i in rows),
        tuple(parameters.dtypes[i] for i in rows),
        tuple(parameters.pieces[i] for i in rows) if parameters.pieces else (),
    )


def _blocks(piece: str) -> list[tuple[int | None, int]] | None:
    """Start and size in each dimension, without a start where that is not known; None of a whole tensor or a summand."""
    if piece in ("", PARTIAL):
        return None
    blocks: list[tuple[int | None, int]] = []
    for part in piece.removeprefix("@").split(","):
        start, _, stop = part.partition(":")
        blocks.append((None, int(start[1:])) if start.startswith("~") else (int(start), int(stop) - int(start)))
    return blocks


def nothing(piece: str) -> bool:
    """Whether a piece has no entry: other ranks hold all of the parameter."""
    return any(size == 0 for _, size in _blocks(piece) or ())


@dataclass(frozen=True, eq=False)
class Top:
    """The most sensitive weights of each parameter, `[n, k]`, falling by `|partial|`; `index` is -1 past the end."""

    index: np.ndarray  #: int64, into the flattened parameter
    partial: np.ndarray
    value: np.ndarray  #: of the weight; NaN where it was not read

    def take(self, rows: np.ndarray | Sequence[int]) -> Top:
        """Those of the given rows."""
        rows = np.asarray(rows, np.int64)
        return Top(self.index[rows], self.partial[rows], self.value[rows])


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One table on the host. `columns` holds the stored scalars and the quantiles; `column()` derives the others."""

    step: int
    backward: int
    stage: str
    time: float  #: seconds since the epoch
    parameters: Parameters
    status: np.ndarray  #: [n] words of `Status`
    scale: np.ndarray  #: [n] float64: 1.0 without a scaler, NaN if unknown
    columns: Mapping[str, np.ndarray]
    histogram: np.ndarray | None = None  #: [n, 2 * BUCKETS] counts
    top: Top | None = None
    scalars: Mapping[str, float] = field(default_factory=dict)  #: of the step, `loss` among them
    rank: int = 0
    ranks: int = 1  #: from how many ranks the rows were pooled

    def __len__(self) -> int:
        return len(self.parameters)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in row order."""
        return self.parameters.names

    @property
    def loss(self) -> float:
        """The loss that was observed at this step, or NaN."""
        return self.scalars.get("loss", math.nan)

    def has(self, *words: str) -> np.ndarray:
        """`[n]` whether a row's status is one of these."""
        return (self._bits & sum({_BITS[word] for word in words})) != 0

    @cached_property
    def _bits(self) -> np.ndarray:
        """The status as a bit each: comparing 10,000 words takes a hundred times as long."""
        return np.fromiter(map(_BITS.get, self.status.tolist(), repeat(0)), np.uint8, len(self))

    def column(self, name: str) -> np.ndarray:
        """A stored or derived column, `[n]`."""
        if name == "status":
            return self.status
        if name == "scale":
            return self.scale
        if name in fields.QUANTILES and name not in self.columns:
            return np.full(len(self), np.nan)
        return fields.derive(name, self.columns)

    def value(self, name: str, parameter: str) -> float:
        """One number of one parameter."""
        return self.column(name)[self.parameters.position[parameter]]  # type: ignore[no-any-return]

    def without_histogram(self) -> Snapshot:
        """The same without its largest part."""
        return replace(self, histogram=None)

    def without_top(self) -> Snapshot:
        """The same without single weights."""
        return replace(self, top=None)

    def take(self, rows: Sequence[int]) -> Snapshot:
        """The given rows."""
        at = np.asarray(rows, np.int64)
        return replace(
            self,
            parameters=self.parameters.take(rows),
            status=self.status[at],
            scale=self.scale[at],
            columns={name: values[at] for name, values in self.columns.items()},
            histogram=None if self.histogram is None else self.histogram[at],
            top=None if self.top is None else self.top.take(at),
        )


def total(snapshot: Snapshot, *, skip: Iterable[str] = (Status.ABSENT, Status.FROZEN)) -> dict[str, np.ndarray]:
    """The stored scalars of the whole model as one row, `[1]` a column, over parameters whose status is not skipped."""
    kept = ~np.isin(snapshot.status.astype(str), [str(word) for word in skip])
    return fields.pool({field.name: snapshot.columns[field.name][kept] for field in fields.SCALARS})


@dataclass(frozen=True)
class Finding:
    """A rule's result, written to teach: what was seen with numbers, likely causes in order, the call to make."""

    rule: str
    step: int
    severity: Severity
    seen: str
    parameter: str | None = None  #: None: the whole model
    causes: tuple[str, ...] = ()
    remedy: str = ""
    stage: str | None = None
    value: float | None = None
    parameters: tuple[str, ...] = ()  #: all of them, where one finding stands for those of several

    def __post_init__(self) -> None:
        object.__setattr__(self, "severity", Severity(self.severity))  # a rule may say "warning"
        if self.stage is not None:
            object.__setattr__(self, "stage", str(self.stage))
        if self.value is not None:
            object.__setattr__(self, "value", float(self.value))  # it may be numpy's

    def __str__(self) -> str:
        where = f" {self.parameter}" if self.parameter else ""
        lines = [f"[{self.severity}] {self.rule}{where} at step {self.step}: {self.seen}"]
        if self.causes:
            lines.append(f"  likely: {'; '.join(self.causes)}")
        if self.remedy:
            lines.append(f"  do: {self.remedy}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return markup.block(markup.finding(self))


#: A record is what writers get: a snapshot, or a finding.
Record = Snapshot | Finding
