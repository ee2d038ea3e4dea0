"""Whole partials of chosen parameters at some steps, for heat maps: a file a step, within an allowance.

    partials/0000-rank0-000000000120-0.partials       segment, rank, step, which optimizer's

    file = magic, length of the header, checksum of the header, header as JSON, arrays
    header = for each parameter its name, shape, dtype, piece and stage, and where its two arrays are, with their checksum

A file is written under another name and renamed: there is no half of one. When all files together would exceed the
allowance, every second one is removed, and from then on twice as few steps are kept (growth squared), so the steps stay
spread over the run as it grows. Files of others are not trusted: sizes are checked before memory is taken.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradlens import frames
from gradlens.errors import CorruptRunError
from gradlens.records import COMPLEX, Parameters
from gradlens.store import segment
from gradlens.store.segment import Entry
from gradlens.store.tables import STAGES, Key, files

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "partials"
ALLOWANCE = 256 << 20  #: bytes that a rank's files may take together
GROWTH = 1.1  #: of the run, between two steps that are kept
MAX_BYTES = 1 << 30  #: of a file; and of one parameter's arrays, whole

_MAGIC = b"GRADPART"
_HEAD = struct.Struct("<8sII")
_MAX_HEADER = 8 << 20
_NAME = re.compile(r"(\d{4,9})-rank(\d{1,9})-(\d{12,18})-(\d{1,6})\.partials")
_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float64": np.dtype("<f8")}


@dataclass(frozen=True, eq=False)
class Partials:
    """All partials of one parameter at one step, and its weights before the step; NaN where no rank kept them."""

    parameter: str
    step: int
    stage: str
    partial: np.ndarray  #: in the parameter's shape; a complex one ends with an axis of 2
    value: np.ndarray

    def frame(self) -> pd.DataFrame:
        """One row a weight, with the columns of `lens.weights()`."""
        flat = np.arange(self.partial.size)
        return frames.weights(self.parameter, self.partial.shape, flat, self.value.ravel(), self.partial.ravel())

    def __repr__(self) -> str:
        return f"<Partials {self.parameter} {self.partial.shape} step {self.step} stage {self.stage}>"


@dataclass(frozen=True, eq=False)
class Kept:
    """What a rank holds of one parameter: flat arrays of the same length."""

    entry: Entry
    stage: str
    partial: np.ndarray
    value: np.ndarray


# --- writing --------------------------------------------------------------------------------------------------------


def width(dtype: str) -> int:
    """Bytes of one number of a parameter of this dtype: single precision but for double parameters."""
    return 8 if dtype in ("float64", "complex128") else 4


class PartialStore:
    """Writes files of partials, and removes some when they exceed the allowance."""

    def __init__(self, run: Path, key: Key, allowance: int = ALLOWANCE) -> None:
        self._folder, self._key, self._allowance = run / FOLDER, key, allowance
        self._folder.mkdir(parents=True, exist_ok=True)
        self.growth = GROWTH
        self._sizes: dict[Path, int] = {
            path: path.stat().st_size for path, of in _listed(self._folder) if of[0].rank == key.rank
        }

    def write(self, step: int, number: int, kept: Sequence[Kept]) -> None:
        """A file of this step's parameters."""
        path = self._folder / f"{self._key}-{step:012d}-{number}.partials"
        data = _packed(kept)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self._sizes[path] = len(data)
        while sum(self._sizes.values()) > self._allowance and len(self._sizes) > 1:
            self._thin()

    def _thin(self) -> None:
        """Remove every second step but the newest."""
        steps = sorted({_at(path) for path in self._sizes})
        for gone in steps[-2::-2]:
            for path in [path for path in self._sizes if _at(path) == gone]:
                path.unlink(missing_ok=True)
                del self._sizes[path]
        self.growth = min(self.growth**2, 4.0)


def _at(path: Path) -> tuple[int, int]:
    """Segment and step."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[3])


def _packed(kept: Sequence[Kept]) -> bytes:
    described, bodies, offset = [], [], 0
    for each in kept:
        name, shape, dtype, piece = each.entry
        to = _DTYPES["float64" if width(dtype) == 8 else "float32"]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            arrays = [np.ascontiguousarray(array.ravel(), to) for array in (each.partial, each.value)]
        body = b"".join(array.tobytes() for array in arrays)
        described.append(
            {
                "name": name,
                "shape": list(shape),
                "dtype": dtype,
                "piece": piece,
                "stage": each.stage,
                "numbers": to.name,
                "count": len(arrays[0]),
                "offset": offset,
                "checksum": zlib.crc32(body),
            }
        )
        bodies.append(body)
        offset += len(body)
    header = json.dumps(described).encode()
    return b"".join([_HEAD.pack(_MAGIC, len(header), zlib.crc32(header)), header, *bodies])


# --- reading --------------------------------------------------------------------------------------------------------

#: Where one parameter's arrays are: the file, its step, and the header's entry.
_Place = tuple[Path, int, Mapping[str, Any]]


def places(run: Path, stop: Mapping[Key, int | None]) -> list[_Place]:
    """Every parameter of every file, by rising step; without steps that a resumed run has replaced.

    Raises:
        CorruptRunError: A file is damaged.
    """
    found: list[_Place] = []
    for path, (key, step) in _listed(run / FOLDER):
        until = stop.get(key)
        if key not in stop or (until is not None and step >= until):
            continue
        found += [(path, step, entry) for entry in _header(path)]
    return sorted(found, key=lambda place: (place[1], place[0]))


def load(asked: Sequence[_Place]) -> Partials:
    """One parameter at one step and stage, from what each rank holds of it."""
    first = asked[0][2]
    entries = [segment.checked_entry(e["name"], e["shape"], e["dtype"], e["piece"]) for _, _, e in asked]
    name, shape, dtype, _ = entries[0]
    whole = (*shape, 2) if dtype in COMPLEX else shape
    count = math.prod(whole)
    if count * 16 > MAX_BYTES:
        raise CorruptRunError(f"{asked[0][0]} says that {name} has {count:,} weights, more than are ever kept")
    partial, value = np.full(count, np.nan), np.full(count, np.nan)
    for (path, _, described), entry in reversed(list(zip(asked, entries, strict=True))):  # the lowest rank's counts
        if entry[1:3] != (shape, dtype):
            raise CorruptRunError(f"{path} has {name} in another shape than {asked[0][0]}")
        at = _whole_index(path, entry, described["count"])
        arrays = _arrays(path, described)
        partial[at], value[at] = arrays
    return Partials(name, asked[0][1], str(first["stage"]), partial.reshape(whole), value.reshape(whole))


def _whole_index(path: Path, entry: Entry, count: int) -> np.ndarray:
    name, shape, dtype, piece = entry
    place = Parameters((name,), (shape,), (dtype,), (piece,))
    here = math.prod(place.local_shape(0)) * (2 if dtype in COMPLEX else 1)
    if here != count:
        raise CorruptRunError(f"{path} has {count:,} of the {here:,} weights of {name}. Move it away to read the rest")
    index = place.whole_index(0, np.arange(count))
    return index[index >= 0] if (index < 0).any() else index


def _arrays(path: Path, described: Mapping[str, Any]) -> np.ndarray:
    dtype, count, start = _DTYPES[described["numbers"]], described["count"], described["start"]
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(2 * count * dtype.itemsize)
    if len(data) != 2 * count * dtype.itemsize or zlib.crc32(data) != described["checksum"]:
        raise CorruptRunError(f"{path} is damaged. Move it away to read the rest of the run")
    return np.frombuffer(data, dtype).reshape(2, count).astype(np.float64)


def _listed(folder: Path) -> list[tuple[Path, tuple[Key, int]]]:
    found = []
    for path in files(folder):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((path, (Key(int(match[1]), int(match[2])), int(match[3]))))
    return sorted(found)


def _header(path: Path) -> list[dict[str, Any]]:
    """What a file has; nothing of one that was removed meanwhile."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            magic, length, checksum = _HEAD.unpack(file.read(_HEAD.size))
            if magic != _MAGIC or length > _MAX_HEADER or size > MAX_BYTES:
                raise ValueError("it does not begin as one of gradlens, or is too large")
            text = file.read(length)
        if zlib.crc32(text) != checksum:
            raise ValueError("the checksum of its header is another")
        return [_described(entry, _HEAD.size + length, size) for entry in json.loads(text)]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, struct.error, RecursionError, OverflowError) as error:
        raise CorruptRunError(f"{path} does not read: {error}. Move it away to read the rest of the run") from None


def _described(entry: Any, begin: int, size: int) -> dict[str, Any]:
    segment.checked_entry(entry["name"], entry["shape"], entry["dtype"], entry["piece"])
    if entry["stage"] not in STAGES or entry["numbers"] not in _DTYPES or type(entry["checksum"]) is not int:
        raise ValueError("it has an unknown stage or kind of number")
    count, offset = entry["count"], entry["offset"]
    if type(count) is not int or type(offset) is not int or count < 0 or offset < 0:
        raise ValueError("its arrays have no place")
    if begin + offset + 2 * count * _DTYPES[entry["numbers"]].itemsize > size:
        raise ValueError("its arrays end behind it")
    return {**entry, "start": begin + offset}
