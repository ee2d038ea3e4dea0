"""The newest rows of a table, durable at once: a file of frames.

    header = magic, checksum, JSON that names the columns, spaces up to 4,096 bytes
    frame = mark, number of rows, checksum of the columns, checksum of these three, the columns' bytes

A frame is written with one call, so a killed process leaves whole frames and at most the beginning of one more. Its length
follows from the number of rows, which has a checksum of its own: a damaged number is not taken for a torn end.
"""

from __future__ import annotations

import functools
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gradlens.errors import CorruptRunError

MAGIC = b"GRADLENS"
_FRAME = struct.Struct("<4sIII")
_MARK = b"ROWS"
HEADER = 4096  #: bytes
MAX_BYTES = 1 << 30  #: a tail is some 35 MB
DTYPES = {"int8", "int16", "int32", "int64", "float64"}

MOST_PIECES = 1024  #: that Linux writes with one call

Rows = dict[str, np.ndarray]
Buffer = bytes | memoryview


class Tail:
    """A tail that is written. A failed write leaves the frames before it."""

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self.path, self.columns = path, dict(columns)
        self.rows = self.frames = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._end = self._write([header({"columns": self.columns})], 0)
        except OSError:
            self.close()
            raise

    def append(self, batches: Sequence[Rows]) -> None:
        """One frame with the rows of all batches; in the file when this returns."""
        body = [_bytes(batch[name], dtype) for name, dtype in self.columns.items() for batch in batches]
        count = sum(len(batch["step"]) for batch in batches)
        checksum = functools.reduce(lambda crc, data: zlib.crc32(data, crc), body, 0)
        self._end = self._write([_frame(count, checksum), *body], self._end)
        self.rows, self.frames = self.rows + count, self.frames + 1

    def _write(self, pieces: Sequence[Buffer], at: int) -> int:
        """Behind each other, with one call where the system takes them all: their bytes are copied nowhere before."""
        size = sum(len(piece) for piece in pieces)
        try:
            written = os.writev(self._fd, pieces) if len(pieces) <= MOST_PIECES and hasattr(os, "writev") else 0
            rest = memoryview(b"" if written == size else b"".join(pieces)[written:])
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            os.ftruncate(self._fd, at)
            raise
        return at + size

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _bytes(values: np.ndarray, dtype: str) -> Buffer:
    """A column as a frame has it."""
    return np.ascontiguousarray(values, f"<{np.dtype(dtype).str[1:]}").data.cast("B") if len(values) else b""


def header(content: object) -> bytes:
    """What a tail begins with."""
    size = HEADER - len(MAGIC) - 4
    text = json.dumps(content).encode().ljust(size)
    assert len(text) == size
    return MAGIC + struct.pack("<I", zlib.crc32(text)) + text


def _frame(count: int, checksum: int) -> bytes:
    head = _FRAME.pack(_MARK, count, checksum, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head))


def read(path: Path, columns: Mapping[str, str]) -> tuple[Rows, int]:
    """These columns of all whole frames, and how many bytes of a torn one follow them.

    Raises:
        CorruptRunError: What is there is no tail with such columns, or it is damaged before its end.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise CorruptRunError(f"{path} is larger than {MAX_BYTES >> 20} MB, which no tail is")
    there, at = _columns(path, data, columns)
    width = sum(np.dtype(dtype).itemsize for dtype in there.values())
    found: dict[str, list[np.ndarray]] = {name: [np.empty(0, dtype)] for name, dtype in columns.items()}
    while there and at + _FRAME.size <= len(data):
        _, count, checksum, _ = _FRAME.unpack_from(data, at)
        start, stop = at + _FRAME.size, at + _FRAME.size + count * width
        if data[at:start] != _frame(count, checksum) or not count:
            if not data[at:].strip(b"\0"):
                break  # the machine stopped: the file had grown, and nothing of it had come to the disk
            raise _damaged(path, at)
        if stop > len(data):
            break
        if zlib.crc32(memoryview(data)[start:stop]) != checksum:
            if stop == len(data):
                break  # the machine stopped, and not every page had come to the disk
            raise _damaged(path, at)
        for name, dtype in there.items():
            if name in found:
                found[name].append(np.frombuffer(data, f"<{np.dtype(dtype).str[1:]}", count, start))
            start += count * np.dtype(dtype).itemsize
        at = stop
    return {name: np.concatenate(values) for name, values in found.items()}, len(data) - at


def _damaged(path: Path, at: int) -> CorruptRunError:
    return CorruptRunError(f"{path} is damaged at byte {at}: move it away to read the rest of the run")


def _columns(path: Path, data: bytes, expected: Mapping[str, str]) -> tuple[dict[str, str], int]:
    """The columns, and where frames begin; none of a header that is torn."""
    if data[: len(MAGIC)] != MAGIC[: len(data)] and data.strip(b"\0"):
        raise CorruptRunError(f"{path} does not begin as a tail of gradlens does")
    if len(data) < HEADER or not data.strip(b"\0"):
        return {}, 0
    text = data[len(MAGIC) + 4 : HEADER]
    try:
        if struct.pack("<I", zlib.crc32(text)) != data[len(MAGIC) : len(MAGIC) + 4]:
            raise ValueError("its checksum is another")
        columns = json.loads(text)["columns"]
        if not all(isinstance(name, str) and dtype in DTYPES for name, dtype in columns.items()) or not columns:
            raise ValueError("unknown columns")
        for name, dtype in expected.items():
            if columns.get(name) != dtype:
                raise ValueError(f"the column {name} is not there as {dtype}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptRunError(f"the header of {path} is damaged: {error}") from None
    return columns, HEADER
