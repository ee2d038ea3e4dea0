"""What a run directory holds, and how its files are called.

    run.json                                     marks the directory: format, schema, when it was made
    segments/0000-rank0.json                     of each lens and rank: settings, versions, parameters and their shapes
    history/0000-rank0-000000-000007.parquet     tails 0 to 7 of that segment, sorted by parameter
    history/_0000-rank0-000008.tail              the newest rows, in frames with a checksum
    history/_0000-rank0-000000-000007.merged     a part of several, whole, while those that it is made of are removed
    histograms/, weights/, scalars/              the same
    activations/                                 the same, where the feature was asked for
    findings/0000-rank0.jsonl                    one finding a line

A *segment* is what one lens wrote on one rank; resuming begins the next. Within it snapshots are numbered, and their steps
do not fall. Rows refer to parameters by `entry`, their place in the segment's list; Parquet files spell the name too, as a
dictionary column.

In tails every column is a number of fixed width, so that their length follows from the number of rows alone. Readers of
Parquet pass over names that begin with `_` or `.`, so each folder is a data set to them while it is written.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from gradlens import activations, fields
from gradlens.records import Stage, Status

FORMAT, SCHEMA = "gradlens-run", 1
STAGES = [stage.value for stage in Stage]
STATUSES = [status.value for status in Status]

_KEYS = {"snapshot": "int64", "step": "int64", "backward": "int32", "stage": "int8", "time": "int64"}
_ROW = {**_KEYS, "entry": "int32"}

#: The numbers of each table, by name. `time` is in microseconds since the epoch.
TABLES: dict[str, dict[str, str]] = {
    "history": {
        **_ROW,
        "status": "int8",
        "scale": "float64",
        **{field.name: field.dtype for field in fields.SCALARS},
        **dict.fromkeys(fields.QUANTILES, "float64"),
    },
    "histograms": {**_ROW, "bucket": "int16", "count": "int64"},
    "weights": {**_ROW, "index": "int64", "partial": "float64", "value": "float64"},
    "scalars": {**_KEYS, "entry": "int32", "value": "float64"},  # entry: into the segment's names of scalars
    "activations": {  # entry: into the segment's modules
        **{name: dtype for name, dtype in _KEYS.items() if name != "stage"},
        "entry": "int32",
        "calls": "int32",
        **dict.fromkeys(activations.SUMS, "float64"),
    },
}

#: What the entries of a table number, where they are not the parameters; and what its files call those names.
NAMED = {"scalars": "name", "activations": "module"}

_NAME = re.compile(r"_?(\d{4,9})-rank(\d{1,9})-(\d{6,12})(?:-(\d{6,12}))?\.(parquet|merged|tail)")


@dataclass(frozen=True, order=True)
class Key:
    """A segment: the n-th lens of a rank."""

    segment: int
    rank: int

    def __str__(self) -> str:
        return f"{self.segment:04d}-rank{self.rank}"


@dataclass(frozen=True)
class Part:
    """A file of rows: tails `first` to `last` of a segment, rolled (`parquet`) or not (`tail`)."""

    path: Path
    key: Key
    first: int
    last: int

    @property
    def tail(self) -> bool:
        """Whether it is still in frames."""
        return self.path.suffix == ".tail"


def part(folder: Path, key: Key, first: int, last: int | None = None) -> Path:
    """The path of a part; without `last`, of a tail."""
    return folder / (f"_{key}-{first:06d}.tail" if last is None else f"{key}-{first:06d}-{last:06d}.parquet")


def hidden(path: Path) -> Path:
    """What a part is called while those that it is made of are removed: no reader of Parquet sees both."""
    return path.with_name(f"_{path.stem}.merged")


def shown(path: Path) -> Path:
    """What a hidden part is called from then on."""
    return path.with_name(f"{path.stem[1:]}.parquet")


def parts(folder: Path) -> list[Part]:
    """The files of a table that count, oldest first: without those whose rows a merged file has too."""
    return _divided(folder)[0]


def settle(folder: Path, rank: int) -> None:
    """Finish what a killed writer of this rank has begun: files whose rows a merged one has, and the merged one's name."""
    for path in leftovers(folder, rank):
        path.unlink(missing_ok=True)
    for part in parts(folder):
        if part.path.suffix == ".merged" and part.key.rank == rank:
            os.replace(part.path, shown(part.path))


def leftovers(folder: Path, rank: int) -> list[Path]:
    """What a killed writer of this rank has left behind: files that do not count, and half-written ones."""
    half = [
        path for path in files(folder) if path.name.startswith(".") and path.suffix == ".tmp" and f"-rank{rank}" in path.name
    ]
    return [each.path for each in _divided(folder)[1] if each.key.rank == rank] + half


def _divided(folder: Path) -> tuple[list[Part], list[Part]]:
    """The files that count and those that do not, listed until they stand still: a listing is no single moment, and files
    are merged meanwhile."""
    found, before = _listed(folder), None
    while found != before:
        found, before = _listed(folder), found
    result: list[Part] = []
    covered: list[Part] = []
    for each in found:
        inside = result and result[-1].key == each.key and each.last <= result[-1].last
        (covered if inside else result).append(each)
    return result, covered


def _listed(folder: Path) -> list[Part]:
    found = []
    for path in files(folder):
        match = _NAME.fullmatch(path.name)
        if match:
            segment, rank, first, last, _ = match.groups()
            found.append(Part(path, Key(int(segment), int(rank)), int(first), int(last or first)))
    return sorted(found, key=lambda p: (p.key, p.first, -p.last, p.path.suffix != ".parquet", p.tail))


def files(folder: Path) -> list[Path]:
    """Regular files alone: to open a pipe would wait for ever."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [folder / entry.name for entry in entries if entry.is_file()]
