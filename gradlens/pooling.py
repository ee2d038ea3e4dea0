"""One table from those of several ranks.

Where ranks hold disjoint *pieces* of a parameter (shards), the row of the whole is the merge of theirs: counts and sums add,
extremes compare, and the most sensitive weights are chosen anew. Where they hold *copies* (the gradients that data
parallelism has averaged), one row stands for all, that of the lowest rank. So the pooled table of a sharded model is the
table of the same model on one rank: counts exactly, sums up to rounding.

What ranks have to add before statistics can be taken (each one's own gradients before averaging, summands of a tensor) is
not pooled: no function of the rows gives the row of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradlens import fields
from gradlens.errors import ArgumentError
from gradlens.records import Parameters, Snapshot, Status, Top, nothing

#: Of several pieces' statuses the first of these holds for the whole.
PRECEDENCE = (
    Status.NONFINITE,
    Status.UNCAPTURED,
    Status.OK,
    Status.ZERO,
    Status.UNDEFINED,
    Status.EXCLUDED,
    Status.ABSENT,
    Status.FROZEN,
)


def pool(snapshots: Sequence[Snapshot]) -> Snapshot:
    """The table of all ranks, from their tables of one step, backward and stage.

    A parameter that only some ranks have gets a row from those. `ranks` counts the tables that came.

    Raises:
        ArgumentError: No tables, or tables of different moments.
    """
    moments = {(s.step, s.backward, str(s.stage)) for s in snapshots}
    if len(moments) != 1:
        raise ArgumentError(f"pool() takes the tables of one step, backward and stage, not of {sorted(moments)}")
    tables = sorted(snapshots, key=lambda snapshot: snapshot.rank)
    if len(tables) == 1:
        return tables[0]
    parameters = _whole(tables)
    parts = [_Part(table, parameters) for table in _distinct(tables)]
    columns = fields.merge([part.columns for part in parts])
    counts = [part.histogram for part in parts if part.histogram is not None]
    histogram = np.sum(counts, axis=0) if len(counts) == len(parts) else None
    if histogram is not None:
        columns.update(fields.quantiles(histogram, columns))
    return replace(
        tables[0],
        parameters=parameters,
        columns=columns,
        histogram=histogram,
        status=_status(parts),
        scale=np.fmin.reduce([part.scale for part in parts]),
        top=_top([part.top for part in parts if part.top is not None]),
        ranks=sum(table.ranks for table in tables),
    )


def _whole(tables: Sequence[Snapshot]) -> Parameters:
    """Every parameter of any table, as wholes; what merges with no other stays what it is."""
    rows: dict[str, tuple[tuple[int, ...], str, str]] = {}
    for table in tables:
        known = table.parameters
        for row, (name, shape, dtype) in enumerate(zip(known.names, known.shapes, known.dtypes, strict=True)):
            piece = known.piece(row) if known.alone(row) else ""
            rows.setdefault(name, (shape, dtype, piece))
    shapes, dtypes, pieces = zip(*rows.values(), strict=True) if rows else ((), (), ())
    return Parameters(tuple(rows), tuple(shapes), tuple(dtypes), tuple(pieces) if any(pieces) else ())


def _distinct(tables: Sequence[Snapshot]) -> list[Snapshot]:
    """The tables without the rows whose piece an earlier one has, or that merge with no other."""
    seen: set[tuple[str, str]] = set()
    result = []
    for table in tables:
        known = table.parameters
        keys = [(name, "" if known.alone(row) else known.piece(row)) for row, name in enumerate(table.names)]
        result.append(table.take([row for row, key in enumerate(keys) if key not in seen]))
        seen.update(keys)
    return result


class _Part:
    """One rank's rows, spread to the rows of all; empty where it has none."""

    def __init__(self, table: Snapshot, parameters: Parameters) -> None:
        n = len(parameters)
        rows = np.array([parameters.position[name] for name in table.names], np.int64)
        self.columns = fields.empty(n)
        for name, values in self.columns.items():
            values[rows] = table.columns[name]
        self.histogram = None if table.histogram is None else _spread(table.histogram, rows, n, 0)
        self.status = _spread(table.status, rows, n, "")
        empty = [nothing(table.parameters.piece(row)) for row in range(len(table))]
        self.nothing = _spread(np.array(empty, bool), rows, n, True)
        self.scale = _spread(table.scale, rows, n, np.nan)
        top = table.top
        self.top = top and Top(
            _spread(top.index, rows, n, -1), _spread(top.partial, rows, n, np.nan), _spread(top.value, rows, n, np.nan)
        )


def _spread(values: np.ndarray, rows: np.ndarray, n: int, fill: object) -> np.ndarray:
    result = np.full((n, *values.shape[1:]), fill, dtype=values.dtype)
    result[rows] = values
    return result


def _status(parts: Sequence[_Part]) -> np.ndarray:
    """What the first in precedence says; an empty piece is asked only where all are."""
    result = np.full(len(parts[0].status), Status.FROZEN.value, dtype=object)
    for asked in ([part.status for part in parts], [np.where(part.nothing, "", part.status) for part in parts]):
        for word in reversed(PRECEDENCE):
            result[np.any([status == word.value for status in asked], axis=0)] = word.value
    return result


def _top(parts: Sequence[Top]) -> Top | None:
    if not parts:
        return None
    index, partial, value = (np.concatenate([getattr(part, name) for part in parts], axis=1) for name in Top.__annotations__)
    size = np.where(index < 0, -1.0, np.abs(partial))
    order = np.lexsort((index, -size), axis=1)[:, : fields.TOP]
    return Top(*(np.take_along_axis(values, order, axis=1) for values in (index, partial, value)))
