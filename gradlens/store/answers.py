"""Rows as what a user asked for: frames with derived columns, weights, scalars, and the records that were written."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from gradlens import fields, frames
from gradlens.activations import SUMS, added, frame_of, measured
from gradlens.errors import ArgumentError, CorruptRunError, nearest
from gradlens.records import COMPLEX, Parameters, Snapshot, Top
from gradlens.store.filters import fitting
from gradlens.store.rows import Found
from gradlens.store.tables import STAGES, STATUSES

if TYPE_CHECKING:
    import pandas as pd

STORED = (*fields.BY_NAME, *fields.QUANTILES)


class Columns:
    """The columns of a frame, and what has to be read for them."""

    def __init__(self, asked: Iterable[str] | None) -> None:
        self._asked = list(fields.FRAME) if asked is None else [asked] if isinstance(asked, str) else list(asked)
        for name in self._asked:
            if name not in fields.FRAME and name not in fields.BY_NAME:
                raise ArgumentError(f"there is no column {name!r}{nearest(str(name), fields.FRAME)}")
        needed: set[str] = set()
        for name in self._asked:
            needed |= _raw_of(name) if name in fields.DERIVED_BY_NAME else {name}
        self.stored = [name for name in STORED if name in needed]

    def frame(self, found: Found) -> pd.DataFrame:
        """The answer."""
        import pandas as pd

        entries, at = found.entries()
        result: dict[str, pd.Series | np.ndarray] = {}
        for name in self._asked:
            if name == "shape":
                result[name] = pd.Series(objects([shape for _, shape, *_ in entries])[at], dtype=object)
            elif name in ("parameter", "dtype"):
                result[name] = texts([word if name == "parameter" else dtype for word, _, dtype, _ in entries], at)
            elif name in ("stage", "status"):
                result[name] = texts(STAGES if name == "stage" else STATUSES, found.columns[name])
            elif name in ("step", "backward"):
                result[name] = found.columns[name].astype(np.int64)
            else:
                result[name] = fields.derive(name, found.columns)
        return pd.DataFrame(result, columns=self._asked)


def texts(words: Sequence[str], codes: np.ndarray) -> pd.Series:
    """Words by their place, as text: Arrow puts 200,000 together in 2 ms, where pandas takes 11."""
    import pandas as pd

    coded = pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(list(words), pa.large_string()))
    return pd.Series(coded.cast(pa.large_string()), dtype="str")


@functools.cache
def _raw_of(derived: str) -> frozenset[str]:
    """The stored columns that a derived one is computed from: those that its formula looks at."""
    seen: set[str] = set()

    class Watched(dict[str, np.ndarray]):
        def __getitem__(self, name: str) -> np.ndarray:
            seen.add(name)
            return super().__getitem__(name)

    with np.errstate(all="ignore"):
        fields.DERIVED_BY_NAME[derived].formula(Watched(fields.empty(1)))
    return frozenset(seen)


def latest(found: Found) -> Found:
    """For each parameter the last row, in model order."""
    _, at = found.names()
    _, back = np.unique(at[::-1], return_index=True)
    return found.take(len(found) - 1 - back)


def objects(values: Sequence[object]) -> np.ndarray:
    """An array of objects, tuples among them."""
    result = np.empty(len(values), object)
    result[:] = values
    return result


# --- weights --------------------------------------------------------------------------------------------------------


def weights(found: Found, top: int | None, by: str) -> pd.DataFrame:
    """Of each parameter the most sensitive weights of its last snapshot, over all ranks; a weight once."""
    c = found.columns
    names, name = found.names()
    moment = c["backward"].astype(np.int64) << 8 | c["stage"]
    last = np.full(len(names), np.iinfo(np.int64).min)
    np.maximum.at(last, name, moment)
    rows = np.flatnonzero(moment == last[name])
    rows = rows[np.lexsort((c["rank"][rows], c["index"][rows], name[rows]))]
    key = np.stack([name[rows], c["index"][rows]])
    once = rows[np.flatnonzero(np.concatenate([[True], (key[:, 1:] != key[:, :-1]).any(axis=0)])[: len(rows)])]
    once = once[np.lexsort((-np.abs(c["partial"][once]), name[once]))]
    bounds = np.searchsorted(name[once], np.arange(len(names) + 1))
    entries, entry = found.entries()
    parts = []
    for start, stop in pairwise(bounds):
        own = once[start : min(stop, start + fields.TOP)]
        word, shape, dtype, _ = entries[entry[own[0]]]
        whole = (*shape, 2) if dtype in COMPLEX else shape
        index, size = c["index"][own], int(np.prod(whole, dtype=object))
        if not (index.min() >= 0 and index.max() < size):
            raise CorruptRunError(f"the weights of {word} are numbered {index.min()} to {index.max()}; it has {size}")
        parts.append((word, whole, index, c["value"][own], c["partial"][own]))
    result = frames.weights_of(parts)
    if top is not None:
        order = result[by].abs().sort_values(ascending=False, kind="stable", na_position="last").index[:top]
        result = result.loc[order].reset_index(drop=True)
    if len(once):
        newest = once[np.argmax(moment[once])]
        result.attrs.update(step=int(c["step"][newest]), stage=STAGES[c["stage"][newest]])
    return result


def signs(found: Found) -> dict[tuple[str, int], tuple[int, int]]:
    """By name and flat index: at how many of the steps that kept a weight its partial was above 0, and below.

    Of a step the last backward counts, of several ranks the lowest one. Steps whose partial was 0 or NaN are left out.
    """
    c = found.columns
    names, name = found.names()
    order = np.lexsort((c["rank"], -c["backward"].astype(np.int64), c["step"], c["index"], name))
    weight = np.stack([name, c["index"]])[:, order]
    moment = np.concatenate([weight, c["step"][order][None].astype(np.int64)])
    once = np.append(True, (moment[:, 1:] != moment[:, :-1]).any(axis=0))[: len(order)]
    weight, partial = weight[:, once], c["partial"][order][once]
    starts = np.flatnonzero(np.append(True, (weight[:, 1:] != weight[:, :-1]).any(axis=0))[: len(partial)])
    if not len(starts):
        return {}
    above, below = (
        np.add.reduceat(each, starts).tolist() for each in ((partial > 0).astype(int), (partial < 0).astype(int))
    )
    keys = [(names[place], index) for place, index in weight[:, starts].T.tolist()]
    return dict(zip(keys, zip(above, below, strict=True), strict=True))


# --- activations ----------------------------------------------------------------------------------------------------


def modules(found: Found, patterns: Sequence[str] | None) -> pd.DataFrame:
    """One row a (step, backward, module), in the order in which they were recorded; of several ranks the sums of all."""
    c = found.columns
    starts = np.cumsum([0, *(len(each.modules) for each in found.segments)])
    everyone = [module for each in found.segments for module in each.modules]
    known: dict[tuple[str, str], int] = {}
    place = np.array([known.setdefault(module, len(known)) for module in everyone], np.int64)
    module = place[starts[c["owner"]] + c["entry"]] if len(found) else np.empty(0, np.int64)
    if patterns is not None:
        fits = fitting(patterns)
        wanted = [fits(name) for name, _ in known]
        kept = np.array(wanted, bool)[module] if known else np.zeros(len(module), bool)
        c, module = {name: values[kept] for name, values in c.items()}, module[kept]
    rows = np.stack([c["step"].astype(np.int64), c["backward"].astype(np.int64), module])
    (step, backward, module), at = np.unique(rows, axis=1, return_inverse=True)
    calls = np.bincount(at.reshape(-1), c["calls"], len(step)).astype(np.int64)
    sums = added(np.stack([c[name] for name in SUMS], 1), at.reshape(-1), len(step))
    words = list(known)
    keys = {"step": step, "backward": backward}
    keys |= {name: [words[i][j] for i in module.tolist()] for j, name in enumerate(("module", "type"))}
    return frame_of(keys, measured(calls, dict(zip(SUMS, sums.T, strict=True))))


# --- scalars --------------------------------------------------------------------------------------------------------


def scalars(found: Found) -> pd.DataFrame:
    """One row a step, one column a name, in the order in which they were first observed; the lowest rank's."""
    import pandas as pd

    names = [frames.scalar_name(name) for name in _scalar_names(found)]
    long = pd.DataFrame({"step": found.columns["step"], "name": names, "value": found.columns["value"]})
    last = long.iloc[np.argsort(-found.columns["rank"], kind="stable")].drop_duplicates(["step", "name"], keep="last")
    wide = last.pivot(index="step", columns="name", values="value")
    wide.columns.name = None
    return wide[list(dict.fromkeys(names))].reset_index()


def scalar(found: Found, name: str) -> tuple[np.ndarray, np.ndarray]:
    """One observed number: steps, rising, and values; of several ranks the lowest one's, of one step the last."""
    owner, entry = found.columns["owner"], found.columns["entry"]
    known = np.zeros(len(entry), bool)
    for place, segment in enumerate(found.segments):
        known |= (owner == place) & np.isin(entry, [code for code, word in enumerate(segment.scalars) if word == name])
    step, value = found.columns["step"][known].astype(np.int64), found.columns["value"][known]
    order = np.lexsort((np.arange(len(step)), -found.columns["rank"][known], step))
    last = np.flatnonzero(np.append(step[order][1:] != step[order][:-1], True)[: len(step)])
    return step[order][last], value[order][last]


def _scalar_names(found: Found) -> list[str]:
    owners, entries = found.columns["owner"].tolist(), found.columns["entry"].tolist()
    return [found.segments[owner].scalars[entry] for owner, entry in zip(owners, entries, strict=True)]


# --- records --------------------------------------------------------------------------------------------------------

#: A snapshot: its segment, and its number there.
_Moment = tuple[int, int]


def snapshots(history: Found, observed: Found, histograms: Found, tops: Found) -> list[Snapshot]:
    """Records as they were written, of each rank apart; histograms and weights where they were kept."""
    scalar_names = _scalar_names(observed)
    kept_scalars = {
        moment: {scalar_names[row]: float(observed.columns["value"][row]) for row in rows}
        for moment, rows in _by_moment(observed).items()
    }
    kept_histograms, kept_tops = _by_moment(histograms), _by_moment(tops)
    entries, at = history.entries()
    known: dict[bytes, Parameters] = {}
    c = history.columns
    result = []
    for moment, rows in _by_moment(history).items():
        places = at[rows]
        parameters = known.get(places.tobytes())
        if parameters is None:
            names, shapes, dtypes, pieces = zip(*(entries[i] for i in places), strict=True)
            parameters = known[places.tobytes()] = Parameters(names, shapes, dtypes, pieces if any(pieces) else ())
        first = rows[0]
        result.append(
            Snapshot(
                step=int(c["step"][first]),
                backward=int(c["backward"][first]),
                stage=STAGES[c["stage"][first]],
                time=float(c["time"][first]) / 1e6,
                parameters=parameters,
                status=history.words("status", STATUSES)[rows],
                scale=c["scale"][rows],
                columns={name: c[name][rows] for name in STORED if name in c},
                histogram=_histogram(histograms, kept_histograms.get(moment), c["entry"][rows]),
                top=_top(tops, kept_tops.get(moment), c["entry"][rows]),
                scalars=kept_scalars.get(moment, {}),
                rank=int(c["rank"][first]),
            )
        )
    return result


def _by_moment(found: Found) -> dict[_Moment, np.ndarray]:
    """The rows of each snapshot; these follow each other."""
    keys = zip(found.columns["owner"].tolist(), found.columns["snapshot"].tolist(), strict=True)
    return {
        moment: np.array([row for row, _ in rows]) for moment, rows in groupby(enumerate(keys), key=lambda each: each[1])
    }


def _histogram(found: Found, rows: np.ndarray | None, entries: np.ndarray) -> np.ndarray | None:
    if rows is None:
        return None
    result = np.zeros((len(entries), 2 * fields.BUCKETS), np.int64)
    place, there = _places(entries, found.columns["entry"][rows])
    result[place, found.columns["bucket"][rows][there]] = found.columns["count"][rows][there]
    return result


def _top(found: Found, rows: np.ndarray | None, entries: np.ndarray) -> Top | None:
    if rows is None:
        return None
    shape = (len(entries), fields.TOP)
    top = Top(np.full(shape, -1, np.int64), np.full(shape, np.nan), np.full(shape, np.nan))
    place, there = _places(entries, found.columns["entry"][rows])
    order = np.argsort(place, kind="stable")
    place, at = place[order], rows[there][order]
    column = np.arange(len(place)) - np.searchsorted(place, place)  # as they were written: falling
    kept = column < fields.TOP
    for name in ("index", "partial", "value"):
        getattr(top, name)[place[kept], column[kept]] = found.columns[name][at[kept]]
    return top


def _places(entries: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where among `entries` those asked for are, and which of them are there at all."""
    order = np.argsort(entries)
    at = np.minimum(np.searchsorted(entries, asked, sorter=order), len(entries) - 1)
    there = np.flatnonzero(entries[order[at]] == asked)
    return order[at][there], there
