"""The ranks' rows as those of the whole: `gradlens.pooling`, for the rows of many steps at once.

Rows of disjoint pieces of a parameter merge as `fields` says; quantiles are empty then, as no function of quantiles gives
those of the whole. Of rows of the same piece the lowest rank's is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradlens import fields
from gradlens.pooling import PRECEDENCE
from gradlens.records import nothing
from gradlens.store.rows import Found
from gradlens.store.tables import STATUSES


def merged(found: Found, values: Sequence[str]) -> Found:
    """One row a (step, backward, stage, parameter), in this order."""
    if len(np.unique(found.columns["rank"])) < 2:
        return found
    entries, at = found.entries()
    _, name = found.names()
    pieces: dict[str, int] = {}
    piece = np.array([pieces.setdefault(piece, len(pieces)) for *_, piece in entries], np.int64)[at]
    c = found.columns
    order = np.lexsort((-c["snapshot"], c["rank"], piece, name, c["stage"], c["backward"], c["step"]))
    key = np.stack([c["step"], c["backward"], c["stage"], name, piece])[:, order]
    distinct = order[_begins(key)]  # of the same piece, the last row of the lowest rank
    whole = _begins(key[:4, _begins(key)])
    result = found.take(distinct[whole])
    if len(whole) < len(distinct):
        empty = np.array([nothing(piece) for *_, piece in entries], bool)[at]
        _merge(found.take(distinct), whole, values, empty[distinct], result)
    return result


def _begins(key: np.ndarray) -> np.ndarray:
    """Where runs of equal columns begin."""
    return np.flatnonzero(np.concatenate([[True], (key[:, 1:] != key[:, :-1]).any(axis=0)])[: key.shape[1]])


def _merge(rows: Found, begins: np.ndarray, values: Sequence[str], empty: np.ndarray, result: Found) -> None:
    """Rows from each beginning to the next become one, in `result`; those of an empty piece have no say in the status."""
    several = np.diff(begins, append=len(rows)) > 1
    for name in values:
        column = rows.columns[name]
        if name in fields.QUANTILES:
            result.columns[name][several] = np.nan
        elif fields.BY_NAME[name].merge == "sum":
            result.columns[name] = _sum(column, begins)
        else:
            result.columns[name] = {"min": np.fmin, "max": np.fmax}[fields.BY_NAME[name].merge].reduceat(column, begins)
    place = np.array([PRECEDENCE.index(word) for word in STATUSES])  # of each code of a status
    code = np.array([STATUSES.index(word) for word in PRECEDENCE], np.int8)
    first = np.minimum.reduceat(place[rows.columns["status"]] + len(code) * empty, begins)
    result.columns["status"] = code[first % len(code)]
    result.columns["scale"] = np.fmin.reduceat(rows.columns["scale"], begins)


def _sum(column: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """NaN is left out; a sum over nothing is empty, not 0. Of both infinities it is NaN, and no warning."""
    if column.dtype.kind != "f":
        return np.add.reduceat(column, begins)
    empty = np.isnan(column)
    with np.errstate(invalid="ignore"):
        sums = np.add.reduceat(np.where(empty, 0.0, column), begins)
    return np.where(np.logical_and.reduceat(empty, begins), np.nan, sums)
