"""Event files, as TensorBoard reads them: a file is a sequence of records, a record one `Event` of one step.

    record  =  length (uint64) | crc(length) | event | crc(event)
    crc(x)  =  rotated CRC-32C of x + constant, so that the checksum of data that holds checksums stays a good one

Each record reaches the operating system in one call, when it is written: a process that is killed loses none of them, and
one that is torn is the last. Records are not forced to the disk, so a power cut may lose the last seconds.

Floats are those of TensorBoard: a scalar is kept as float32, a histogram in float64.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from io import FileIO
from pathlib import Path

import google_crc32c
import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_BLOB_SEQUENCE,
    DATA_CLASS_SCALAR,
    DATA_CLASS_TENSOR,
    SummaryMetadata,
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_STRING
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

FILE_VERSION = "brain.Event:2"

_CREATED = re.compile(r"tfevents\.(\d+)\.")


def checksum(data: bytes) -> int:
    """The masked CRC-32C of the record format."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record(data: bytes) -> bytes:
    """The bytes of one record."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", checksum(length)), data, struct.pack("<I", checksum(data))))


class EventFile:
    """A new event file in a directory, which is made if missing.

    Args:
        purge_step: The run is resumed at this step: TensorBoard then drops what earlier files say of it and later steps.
    """

    def __init__(self, directory: Path, purge_step: int | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self._file, self.path = _create(directory, int(now))
        self.write(Event(wall_time=now, file_version=FILE_VERSION))
        for _ in range(0 if purge_step is None else 2):  # TensorBoard takes the first start of a directory for no restart
            self.write(Event(wall_time=now, step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, event: Event) -> None:
        """Append one record. Raises `OSError` where the disk does; the file then ends in a torn record, and is closed."""
        rest = memoryview(record(event.SerializeToString()))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:
            self._file.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether nothing can be written any more."""
        return self._file.closed

    def close(self) -> None:
        """Let go of the file. May be called again."""
        self._file.close()


def _create(directory: Path, now: int) -> tuple[FileIO, Path]:
    """A file whose name sorts behind those that are there, even if the clock was set back: that is how they are read."""
    there = [int(found[1]) for path in directory.glob("*tfevents*") if (found := _CREATED.search(path.name))]
    created = max([now, *(time + 1 for time in there)])
    while True:
        path = directory / f"events.out.tfevents.{created:010d}.{socket.gethostname()}.{os.getpid()}.gradlens"
        try:
            return FileIO(path, "xb"), path
        except FileExistsError:
            created += 1


# --- values: what an event holds of one tag -------------------------------------------------------------------------


def add_scalar(event: Event, tag: str, value: float, about: str = "") -> None:
    """A number. `about` describes the tag in Markdown: TensorBoard wants to be told once a file."""
    added = event.summary.value.add(tag=tag, simple_value=value)
    if about:
        added.metadata.CopyFrom(_metadata("scalars", DATA_CLASS_SCALAR, about))


def add_image(event: Event, tag: str, png: bytes, size: tuple[int, int], about: str = "") -> None:
    """An encoded picture of `(width, height)`."""
    strings = [str(size[0]).encode(), str(size[1]).encode(), png]
    tensor = TensorProto(dtype=DT_STRING, string_val=strings, tensor_shape=_shape(3))
    event.summary.value.add(tag=tag, metadata=_metadata("images", DATA_CLASS_BLOB_SEQUENCE, about), tensor=tensor)


def add_histogram(event: Event, tag: str, buckets: np.ndarray, about: str = "") -> None:
    """Buckets `[k, 3]` by rising value: left edge, right edge, count."""
    content = np.ascontiguousarray(buckets, "<f8").tobytes()
    tensor = TensorProto(dtype=DT_DOUBLE, tensor_content=content, tensor_shape=_shape(len(buckets), 3))
    event.summary.value.add(tag=tag, metadata=_metadata("histograms", DATA_CLASS_TENSOR, about), tensor=tensor)


def add_text(event: Event, tag: str, markdown: str) -> None:
    """A text in Markdown."""
    tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode()], tensor_shape=_shape())
    event.summary.value.add(tag=tag, metadata=_metadata("text", DATA_CLASS_TENSOR, ""), tensor=tensor)


def add_layout(event: Event, layout: Layout) -> None:
    """What the Custom Scalars page shows."""
    tensor = TensorProto(dtype=DT_STRING, string_val=[layout.SerializeToString()], tensor_shape=_shape())
    metadata = _metadata("custom_scalars", DATA_CLASS_TENSOR, "")
    event.summary.value.add(tag="custom_scalars__config__", metadata=metadata, tensor=tensor)


def _metadata(plugin: str, kind: int, about: str) -> SummaryMetadata:
    data = SummaryMetadata.PluginData(plugin_name=plugin)
    return SummaryMetadata(plugin_data=data, data_class=kind, summary_description=about)


def _shape(*sizes: int) -> TensorShapeProto:
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in sizes])
