"""Parquet parts: written whole, under another name, then renamed; sorted by parameter, so that its rows lie together.

    pages | mark, checksum of what follows | footer, its length, PAR1

The footer of a Parquet file has no checksum, and Arrow ends the process on some that are damaged: so ours has one, in front
of it, where no other reader looks. It is checked before Arrow sees the file.

Strings are dictionary columns. Floats are split by byte and integers stored as differences, which is what compresses them.
Each row group says which entries and steps it has; what a question does not ask for is not read.
"""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradlens.errors import CorruptRunError
from gradlens.store.tables import NAMED, STAGES, STATUSES, TABLES, Key
from gradlens.store.tail import Rows

#: Rows of a group. One is read whole for one parameter, so small parts have smaller ones: 64 of them, if that leaves 16,384.
#: Of 4,096 rows, writing takes half as long again.
GROUP, LEAST, GROUPS = 32_768, 16_384, 64
CHUNK = 200_000  #: rows that merging holds in memory: about 70 MB
LARGEST_FOOTER = 8 << 20  #: bytes from the end, within which a mark is looked for
MAX_GROUP, MAX_ROWS = 1 << 18, 1 << 28  #: what is larger was not written by gradlens

_WORDS = {"stage": STAGES, "status": STATUSES}
#: Columns by whose bounds one looks for rows; bounds of all would make a file take half as long again to open.
_BOUNDED = {"segment", "rank", "snapshot", "step", "backward", "stage", "time", "entry", "parameter", *NAMED.values()}


def write(path: Path, table: str, key: Key, names: Sequence[str], chunks: Iterable[Rows], count: int) -> None:
    """A part of `count` rows, in chunks that follow each other by entry, each sorted here. Appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    schema = _schema(table)
    size = min(GROUP, max(LEAST, count // GROUPS))
    try:
        with pq.ParquetWriter(temporary, schema, **_options(schema)) as writer:
            for rows in chunks:
                order = np.lexsort((rows["snapshot"], rows["entry"]))
                for start in range(0, len(order), size):
                    group = {name: values[order[start : start + size]] for name, values in rows.items()}
                    writer.write_table(_arrow(group, key, names, schema), row_group_size=size)
        _mark(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_MARK = b"GRADLENS-FOOTER:"
_END = struct.Struct("<I4s")  # the footer's length, and PAR1


def _mark(path: Path) -> None:
    """Put the footer's checksum in front of it: what a footer points at lies before it, and stays where it is."""
    with open(path, "r+b") as file:
        start, footer = _footer(file)
        file.seek(start)
        file.write(_MARK + struct.pack("<I", zlib.crc32(footer)) + footer)


def _footer(file: IO[bytes]) -> tuple[int, bytes]:
    """Where the footer begins, and the bytes from there to the end.

    Raises:
        ValueError: There is none.
    """
    size = file.seek(0, os.SEEK_END)
    if size < 12:
        raise ValueError("it is too short")
    file.seek(size - _END.size)
    length, magic = _END.unpack(file.read(_END.size))
    start = size - _END.size - length
    if magic != b"PAR1" or start < 4:
        raise ValueError("its end is not that of a Parquet file")
    file.seek(start)
    return start, file.read()


def _check_footer(path: Path) -> None:
    """What pyarrow may be given to read. A file of another program has no mark, and is not checked."""
    with open(path, "rb") as file:
        start, footer = _footer(file)
        before = start - len(_MARK) - 4
        file.seek(max(before, 0))
        mark = file.read(start - max(before, 0))
        if before >= 0 and mark.startswith(_MARK):
            if struct.pack("<I", zlib.crc32(footer)) != mark[len(_MARK) :]:
                raise ValueError("its footer has another checksum")
            return
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - LARGEST_FOOTER, 0))
        if _MARK in file.read():
            raise ValueError("its footer is not where it was")


def _schema(table: str) -> pa.Schema:
    columns = [("segment", pa.int32()), ("rank", pa.int32())]
    for name, dtype in TABLES[table].items():
        if name in _WORDS:
            columns.append((name, pa.dictionary(pa.int32(), pa.string())))
        elif name == "entry":
            named = NAMED.get(table, "parameter")
            columns += [("entry", pa.int32()), (named, pa.dictionary(pa.int32(), pa.string()))]
        elif name == "time":
            columns.append(("time", pa.timestamp("us", tz="UTC")))
        else:
            columns.append((name, pa.from_numpy_dtype(np.dtype(dtype))))
    return pa.schema(columns, metadata={"gradlens": table})


def _options(schema: pa.Schema) -> dict[str, object]:
    words = [field.name for field in schema if pa.types.is_dictionary(field.type)]
    floats = {field.name: "BYTE_STREAM_SPLIT" for field in schema if pa.types.is_floating(field.type)}
    others = {field.name: "DELTA_BINARY_PACKED" for field in schema if field.name not in floats and field.name not in words}
    for narrow in (field.name for field in schema if field.type in (pa.int16(), pa.int8())):
        others[narrow] = "PLAIN"
    return {
        "compression": "zstd",
        "use_dictionary": words,
        "column_encoding": {**floats, **others},
        "write_page_checksum": True,
        "write_statistics": [field.name for field in schema if field.name in _BOUNDED],
    }


def _arrow(rows: Rows, key: Key, names: Sequence[str], schema: pa.Schema) -> pa.Table:
    count = len(rows["step"])
    columns = []
    for field in schema:
        if field.name in ("segment", "rank"):
            columns.append(_array(np.full(count, getattr(key, field.name)), field.type))
        elif field.name in ("parameter", *NAMED.values()):
            columns.append(_words(rows["entry"], names))
        elif field.name in _WORDS:
            columns.append(_words(rows[field.name], _WORDS[field.name]))
        else:
            columns.append(_array(rows[field.name], field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Numbers as they are. `pa.array` would import pandas, and `cast` pyarrow.compute, while somebody trains."""
    dtype = np.dtype(np.int64) if pa.types.is_timestamp(kind) else np.dtype(kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values, dtype))])


def _words(codes: np.ndarray, words: Sequence[str]) -> pa.DictionaryArray:
    """With those that occur alone: a group's dictionary is written out."""
    occurring, places = np.unique(codes, return_inverse=True)
    chosen = [words[code].encode() for code in occurring.tolist()]
    ends = np.cumsum([0, *map(len, chosen)])
    buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(chosen))]
    text = pa.Array.from_buffers(pa.string(), len(chosen), buffers)
    return pa.DictionaryArray.from_arrays(_array(places, pa.int32()), text)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- reading --------------------------------------------------------------------------------------------------------


class Reader:
    """A part that is read, group by group.

    Raises:
        CorruptRunError: It is no Parquet file, a damaged one, or one that gradlens has not written.
    """

    def __init__(self, path: Path, table: str) -> None:
        self._path, self._table = path, table
        with self._guard():
            _check_footer(path)
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            meta = self._file.metadata
            self.rows: int = meta.num_rows
            groups = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
            if self.rows > MAX_ROWS or any(not 0 <= n <= MAX_GROUP for n in groups) or sum(groups) != self.rows:
                raise ValueError(f"it has {self.rows:,} rows in {len(groups)} groups")
            expected, found = _schema(table), self._file.schema_arrow
            for field in expected:
                if field.name not in found.names or not _alike(field.type, found.field(field.name).type):
                    raise ValueError(f"the column {field.name} is not there as {field.type}")
            self._column = {meta.schema.column(i).name: i for i in range(meta.num_columns)}

    def _guard(self) -> _Guard:
        return _Guard(self._path)

    def bounds(self, column: str) -> tuple[int, int] | None:
        """The smallest and largest of a column; None of no rows, or where the file does not say."""
        found = [self._bounds(group, column) for group in range(self._file.metadata.num_row_groups)]
        known = [bound for bound in found if bound is not None]
        if not known or len(known) < len(found):
            return None
        return min(low for low, _ in known), max(high for _, high in known)

    def _bounds(self, group: int, column: str) -> tuple[int, int] | None:
        with self._guard():
            statistics = self._file.metadata.row_group(group).column(self._column[column]).statistics
            if statistics is None or not statistics.has_min_max:
                return None
            return int(statistics.min), int(statistics.max)

    def read(self, columns: Sequence[str], keep: Callable[[str, int, int], bool]) -> Iterator[Rows]:
        """Groups of rows; those are left out of which `keep(column, low, high)` of `entry` or `step` says no."""
        for group in range(self._file.metadata.num_row_groups):
            known = ((name, self._bounds(group, name)) for name in ("entry", "step"))
            if all(bound is None or keep(name, *bound) for name, bound in known):
                with self._guard():
                    self._check_size(group, columns)
                    table = self._file.read_row_group(group, columns=list(columns))
                    rows = {name: self._numbers(name, table.column(name)) for name in columns}
                yield rows

    def _check_size(self, group: int, columns: Sequence[str]) -> None:
        """A few bytes may say that they unfold to gigabytes: numbers take 8 a row, and words fewer."""
        meta = self._file.metadata.row_group(group)
        for name in columns:
            size = meta.column(self._column[name]).total_uncompressed_size
            if not 0 <= size <= 16 * meta.num_rows + (1 << 16):
                raise ValueError(f"the column {name} takes {size:,} bytes of {meta.num_rows:,} rows")

    def _numbers(self, name: str, column: pa.ChunkedArray) -> np.ndarray:
        if column.null_count:
            raise ValueError(f"the column {name} has holes")
        if name in _WORDS:
            codes = {word: code for code, word in enumerate(_WORDS[name])}
            coded = column.unify_dictionaries() if pa.types.is_dictionary(column.type) else column.dictionary_encode()
            if not coded.num_chunks:
                return np.empty(0, np.int8)
            coded = pa.concat_arrays(coded.unify_dictionaries().chunks)
            known = np.array([codes.get(word, -1) for word in coded.dictionary.to_pylist()], np.int8)
            values = known[np.from_dlpack(coded.indices)]
            if (values < 0).any():
                raise ValueError(f"the column {name} has unknown words")
            return values
        # `to_numpy` would import pandas, if it is there, and `cast` pyarrow.compute: a third of a second at each start.
        numbers = [np.from_dlpack(chunk.view(pa.int64()) if name == "time" else chunk) for chunk in column.chunks]
        dtype = TABLES[self._table][name]
        return numbers[0].astype(dtype, copy=False) if len(numbers) == 1 else np.concatenate([np.empty(0, dtype), *numbers])

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _alike(a: pa.DataType, b: pa.DataType) -> bool:
    return a == b or (pa.types.is_dictionary(a) and (pa.types.is_string(b) or pa.types.is_dictionary(b)))


class _Guard:
    """Whatever goes wrong in decoding is said of the file. A file that is gone stays FileNotFoundError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, pa.ArrowException | OSError | ValueError | TypeError | KeyError | IndexError | OverflowError):
            if isinstance(error, FileNotFoundError | CorruptRunError | PermissionError):
                return
            text = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise CorruptRunError(f"{self._path} does not read: {text}. Move it away to read the rest of the run") from error


# --- merging --------------------------------------------------------------------------------------------------------


def merge(
    inputs: Sequence[Path], output: Path, table: str, key: Key, names: Sequence[str], go_on: Callable[[], bool]
) -> bool:
    """One part of several, `CHUNK` rows at a time. False when `go_on` said to stop; nothing has changed then."""
    readers = [Reader(path, table) for path in inputs]
    columns = list(TABLES[table])
    try:
        total = sum(reader.rows for reader in readers)
        pieces = max(1, min(-(-total // CHUNK), len(names)))
        edges = np.linspace(0, len(names), pieces + 1).round().astype(int)

        def chunks() -> Iterator[Rows]:
            for low, high in itertools.pairwise(edges):
                if not go_on():
                    raise InterruptedError
                there = (rows for reader in readers for rows in reader.read(columns, _touching(low, high)))
                found = [_between(rows, low, high) for rows in there]
                if any(len(rows["step"]) for rows in found):
                    yield {name: np.concatenate([rows[name] for rows in found]) for name in columns}

        write(output, table, key, names, chunks(), total)
        return True
    except InterruptedError:
        return False
    finally:
        for reader in readers:
            reader.close()


def _touching(low: int, high: int) -> Callable[[str, int, int], bool]:
    return lambda column, least, most: column != "entry" or (least < high and most >= low)


def _between(rows: Rows, low: int, high: int) -> Rows:
    kept = (rows["entry"] >= low) & (rows["entry"] < high)
    return rows if kept.all() else {name: values[kept] for name, values in rows.items()}
