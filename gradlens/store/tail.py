"""The newest rows of a table, durable at once: a file of frames.

    magic, header (JSON: the columns), frame, frame, ...        frame = number of rows, checksum, the columns' bytes

A frame is written with one call, so a killed process leaves whole frames and at most one torn one, at the end. Its length
follows from the number of rows, and is checked against the file's before anything is read.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gradlens.errors import CorruptRunError

MAGIC = b"GRADLENS"
_FRAME = struct.Struct("<4sII")
_MARK = b"ROWS"
_HEADER = 1 << 16  #: a header is no longer
DTYPES = {"int8", "int16", "int32", "int64", "float64"}

Rows = dict[str, np.ndarray]


class Tail:
    """A tail that is written. A failed write leaves the frames before it."""

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self.path, self.columns = path, dict(columns)
        self.rows = self.frames = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        header = json.dumps({"columns": self.columns}).encode()
        self._end = self._write(MAGIC + struct.pack("<I", len(header)) + header, 0)

    def append(self, batches: Sequence[Rows]) -> None:
        """One frame with the rows of all batches; in the file when this returns."""
        body = b"".join(
            np.concatenate([batch[name] for batch in batches]).astype(f"<{np.dtype(dtype).str[1:]}", copy=False).tobytes()
            for name, dtype in self.columns.items()
        )
        count = sum(len(batch["step"]) for batch in batches)
        self._end = self._write(_FRAME.pack(_MARK, count, zlib.crc32(body)) + body, self._end)
        self.rows, self.frames = self.rows + count, self.frames + 1

    def _write(self, data: bytes, at: int) -> int:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            os.ftruncate(self._fd, at)
            raise
        return at + len(data)

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read(path: Path) -> tuple[Rows, int]:
    """The rows of all whole frames, and how many bytes of a torn one follow them.

    Raises:
        CorruptRunError: What is there is no tail, or a frame before the end is damaged.
    """
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    if len(data) < len(MAGIC) + 4:
        return {}, len(data)
    columns, at = _columns(path, data)
    if not columns:
        return {}, len(data)
    width = sum(np.dtype(dtype).itemsize for dtype in columns.values())
    frames: list[Rows] = []
    while at + _FRAME.size <= len(data):
        mark, count, checksum = _FRAME.unpack(data[at : at + _FRAME.size].tobytes())
        start, stop = at + _FRAME.size, at + _FRAME.size + count * width
        if mark == _MARK and stop > len(data):
            break
        if mark != _MARK or zlib.crc32(data[start:stop].data) != checksum:
            if stop == len(data) and mark == _MARK:
                break  # the last one, of which not every page came to the disk
            raise CorruptRunError(f"{path} is damaged at byte {at}: move it away to read the rest of the run")
        frame, at = {}, start
        for name, dtype in columns.items():
            size = count * np.dtype(dtype).itemsize
            frame[name] = data[at : at + size].view(f"<{np.dtype(dtype).str[1:]}")
            at += size
        frames.append(frame)
    joined = {name: np.concatenate([f[name] for f in frames]) if frames else np.empty(0, d) for name, d in columns.items()}
    return joined, len(data) - at


def _columns(path: Path, data: np.ndarray) -> tuple[dict[str, str], int]:
    start = len(MAGIC) + 4
    (size,) = struct.unpack("<I", data[len(MAGIC) : start].tobytes())
    if data[: len(MAGIC)].tobytes() != MAGIC or size > _HEADER:
        raise CorruptRunError(f"{path} does not begin as a tail of gradlens does")
    if len(data) < start + size:
        return {}, start
    try:
        columns = json.loads(data[start : start + size].tobytes())["columns"]
        if not all(isinstance(name, str) and dtype in DTYPES for name, dtype in columns.items()) or "step" not in columns:
            raise ValueError("unknown columns")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptRunError(f"the header of {path} is damaged: {error}") from None
    return columns, start + size
