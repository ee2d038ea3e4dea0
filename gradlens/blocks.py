"""The rows of consecutive moments of one stage, as one array a column: `[moments, parameters]`.

    Block     many moments      columns["sum"]  [m, n]
    Snapshot  one of them       columns["sum"]  [n]

A moment is a step and a backward. What is computed from a block's columns with operations on the last axis holds for a
snapshot's too, so a condition or a formula is written once. Histograms and single weights, nine tenths of a row, stay as
they came (`Detail`) until somebody asks.

A snapshot of a block is a view: it copies nothing and is made when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from gradlens import fields
from gradlens.records import Parameters, Snapshot, Status, Top

STATUSES = tuple(Status)
WORDS = np.array([status.value for status in STATUSES], object)  #: by code
CODES: dict[str, int] = {status.value: code for code, status in enumerate(STATUSES)}

#: What is large of one moment, made when it is asked for: its histogram and its most sensitive weights.
Detail = Callable[[], tuple[np.ndarray | None, Top | None]]


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive moments of one stage. Arrays may be shared with others: nobody writes to them."""

    stage: str
    parameters: Parameters
    step: np.ndarray  #: [m] int64, not falling
    backward: np.ndarray  #: [m] int64
    time: np.ndarray  #: [m] seconds since the epoch
    status: np.ndarray  #: [m, n] uint8, places in `STATUSES`
    scale: np.ndarray  #: [m, n]
    columns: Mapping[str, np.ndarray]  #: [m, n] each
    details: list[Detail | None]  #: [m]
    scalars: Sequence[Mapping[str, float]]  #: [m]
    rank: int = 0
    ranks: int = 1
    _given: dict[int, Snapshot] = field(default_factory=dict, repr=False)  #: moments that came as snapshots
    _views: WeakValueDictionary[int, Snapshot] = field(default_factory=WeakValueDictionary, repr=False)  #: that are in use

    def __len__(self) -> int:
        return len(self.step)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in row order."""
        return self.parameters.names

    @property
    def rows(self) -> int:
        """Moments times parameters."""
        return len(self.step) * len(self.parameters)

    def has(self, *words: str) -> np.ndarray:
        """`[m, n]` whether a row's status is one of these."""
        return _members(words)[self.status]

    def column(self, name: str) -> np.ndarray:
        """A stored or derived column, `[m, n]`."""
        if name == "scale":
            return self.scale
        if name in fields.QUANTILES and name not in self.columns:
            return np.full(self.status.shape, np.nan)
        return fields.derive(name, self.columns)

    def scalar(self, name: str) -> np.ndarray:
        """`[m]` what was observed under this name; NaN where nothing was."""
        return np.array([observed.get(name, math.nan) for observed in self.scalars], np.float64)

    def snapshot(self, moment: int) -> Snapshot:
        """One moment, as a view; the same object as long as somebody has it."""
        view = self._given.get(moment)
        if view is None:
            view = self._views.get(moment)
        if view is None:
            view = self._views[moment] = _view(self, moment)
        return view

    def snapshots(self) -> Iterator[Snapshot]:
        """Each moment."""
        return map(self.snapshot, range(len(self)))

    def part(self, start: int, stop: int) -> Block:
        """The moments from `start` to before `stop`."""
        at = slice(start, stop)
        return Block(
            self.stage,
            self.parameters,
            self.step[at],
            self.backward[at],
            self.time[at],
            self.status[at],
            self.scale[at],
            {name: values[at] for name, values in self.columns.items()},
            self.details[at],
            self.scalars[at],
            self.rank,
            self.ranks,
        )

    def lighten(self, moment: int) -> None:
        """Let go of what is large of one moment."""
        self.details[moment] = None
        if self._views:
            self._views.pop(moment, None)
        if moment in self._given:
            self._given[moment] = replace(self._given[moment], histogram=None, top=None)


def block_of(snapshot: Snapshot) -> Block:
    """A block of one moment, whose view is the given snapshot itself."""
    home = getattr(snapshot, "_home", None)
    if home is not None and len(home[0]) == 1:
        return home[0]  # type: ignore[no-any-return]
    return Block(
        str(snapshot.stage),
        snapshot.parameters,
        np.array([snapshot.step], np.int64),
        np.array([snapshot.backward], np.int64),
        np.array([snapshot.time], np.float64),
        codes(snapshot.status)[None],
        snapshot.scale[None],
        {name: values[None] for name, values in snapshot.columns.items()},
        [lambda: (snapshot.histogram, snapshot.top)],
        [snapshot.scalars],
        snapshot.rank,
        snapshot.ranks,
        {0: snapshot},
    )


def concatenate(blocks: Sequence[Block]) -> Block:
    """Blocks of one stage and the same parameters, behind each other."""
    if len(blocks) == 1:
        return blocks[0]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(block, name) for block in blocks])

    return replace(
        blocks[0],
        step=joined("step"),
        backward=joined("backward"),
        time=joined("time"),
        status=joined("status"),
        scale=joined("scale"),
        columns={name: np.concatenate([block.columns[name] for block in blocks]) for name in blocks[0].columns},
        details=[detail for block in blocks for detail in block.details],
        scalars=[observed for block in blocks for observed in block.scalars],
        _given={},
        _views=WeakValueDictionary(),
    )


def grouped(moments: Sequence[tuple[str, Parameters]]) -> list[int]:
    """Which block each moment goes into, by its stage and parameters: blocks are numbered as they begin.

    A block's moments may have others between them, of another stage, or of parameters that share none with them. Where they
    share some, the block ends: what is known of a parameter comes in order.
    """
    open_: dict[str, list[tuple[Parameters, int]]] = {}
    result, count = [], 0
    for stage, parameters in moments:
        known = open_.setdefault(stage, [])
        number = next((number for other, number in known if other is parameters), -1)
        if number < 0:
            number, count = count, count + 1
            known[:] = [(other, at) for other, at in known if not _share(other, parameters)] + [(parameters, number)]
        result.append(number)
    return result


@lru_cache(maxsize=64)
def _share(a: Parameters, b: Parameters) -> bool:
    return not a.position.keys().isdisjoint(b.names)


def codes(words: np.ndarray) -> np.ndarray:
    """Words of `Status` as places in `STATUSES`."""
    return np.fromiter(map(CODES.__getitem__, words.tolist()), np.uint8, len(words))


def _members(words: Sequence[str]) -> np.ndarray:
    """`[statuses]` which of them are among the words."""
    result = np.zeros(len(STATUSES), bool)
    result[[CODES[word] for word in words]] = True
    return result


class _Row(Mapping[str, np.ndarray]):
    """One moment of a block's columns."""

    __slots__ = ("_at", "_columns")

    def __init__(self, columns: Mapping[str, np.ndarray], at: int) -> None:
        self._columns, self._at = columns, at

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name][self._at]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __contains__(self, name: object) -> bool:
        return name in self._columns


class _View(Snapshot):
    """A moment of a block as a snapshot. What has to be made is made when it is read."""

    _home: tuple[Block, int] | None = None  #: None of a changed copy, which is a plain snapshot
    _detail: Detail | None = None  #: its own: whoever keeps the view keeps the histogram

    @cached_property
    def status(self) -> np.ndarray:  # type: ignore[override]
        block, moment = self._there
        return WORDS[block.status[moment]]

    @cached_property
    def histogram(self) -> np.ndarray | None:  # type: ignore[override]
        return self._large[0]

    @cached_property
    def top(self) -> Top | None:  # type: ignore[override]
        return self._large[1]

    @cached_property
    def _large(self) -> tuple[np.ndarray | None, Top | None]:
        return (None, None) if self._detail is None else self._detail()

    @property
    def _there(self) -> tuple[Block, int]:
        assert self._home is not None
        return self._home

    def has(self, *words: str) -> np.ndarray:
        if self._home is None:
            return super().has(*words)
        block, moment = self._home
        return _members(words)[block.status[moment]]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle is a plain snapshot: the rest of the block does not travel along."""
        values = {f.name: getattr(self, f.name) for f in dataclass_fields(Snapshot)}
        return _plain, (values | {"columns": dict(values["columns"]), "scalars": dict(values["scalars"])},)


def _plain(values: dict[str, Any]) -> Snapshot:
    return Snapshot(**values)


def _view(block: Block, moment: int) -> Snapshot:
    view = object.__new__(_View)
    view.__dict__.update(
        _home=(block, moment),
        _detail=block.details[moment],
        step=int(block.step[moment]),
        backward=int(block.backward[moment]),
        stage=block.stage,
        time=float(block.time[moment]),
        parameters=block.parameters,
        scale=block.scale[moment],
        columns=_Row(block.columns, moment),
        scalars=block.scalars[moment],
        rank=block.rank,
        ranks=block.ranks,
    )
    return view
