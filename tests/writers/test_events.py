"""Event files: what TensorBoard's own loader reads is what was written."""

import os
import resource
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Layout

from gradlens.writers.events import (
    EventFile,
    add_histogram,
    add_image,
    add_layout,
    add_scalar,
    add_text,
    checksum,
    record,
)
from tests.writers.reading import events, points


@given(st.binary(max_size=200))
def test_checksums_are_tensorboards(data):
    """The checksum computed at native speed is the one that TensorBoard computes byte by byte."""
    assert checksum(data) == masked_crc32c(data)


def test_what_was_written_is_read(tmp_path):
    """A file begins with its version; each event keeps its step, time, tags and values."""
    file = EventFile(tmp_path / "new" / "run")
    event = Event(step=7, wall_time=12.5)
    add_scalar(event, "a/b", 0.25, "about it")
    add_histogram(event, "h", np.array([[-1.0, 0.0, 3.0], [0.0, 2.0, 4.0]]))
    add_image(event, "i", b"png", (30, 20))
    add_text(event, "t", "*words*")
    add_layout(event, Layout(category=[Category(title="c")]))
    file.write(event)
    file.close()
    first, second = events(file.path)
    assert first.file_version == "brain.Event:2"
    assert (second.step, second.wall_time) == (7, 12.5)
    read = points(file.path)
    assert read["a/b"] == [(7, 0.25)]
    assert read["h"][0][1].tolist() == [[-1.0, 0.0, 3.0], [0.0, 2.0, 4.0]]
    assert read["i"][0][1].tolist() == [b"30", b"20", b"png"]
    assert read["t"][0][1].item() == b"*words*"
    assert Layout.FromString(read["custom_scalars__config__"][0][1].item()).category[0].title == "c"
    plugins = {value.tag: value.metadata.plugin_data.plugin_name for value in second.summary.value}
    assert plugins == {
        "a/b": "scalars", "h": "histograms", "i": "images", "t": "text", "custom_scalars__config__": "custom_scalars",
    }  # fmt: skip


def test_a_restart_comes_first(tmp_path):
    """A resumed run says at which step it begins anew before anything else, and twice, as the first may not count."""
    file = EventFile(tmp_path, purge_step=300)
    file.close()
    _, *starts = events(file.path)
    assert [(start.step, start.session_log.status) for start in starts] == [(300, SessionLog.START)] * 2


def test_a_later_file_sorts_behind(tmp_path):
    """Files are read in the order of their names: a new one is the last, also if the clock was set back."""
    ahead = tmp_path / "events.out.tfevents.9999999990.other.1"
    ahead.touch()
    files = [EventFile(tmp_path) for _ in range(3)]
    for file in files:
        file.close()
    names = [ahead.name, *(file.path.name for file in files)]
    assert names == sorted(names)
    assert len(set(names)) == 4


def test_a_torn_file_reads_up_to_the_tear(tmp_path):
    """Cut at any byte, a file gives the events that are whole."""
    file = EventFile(tmp_path)
    for step in range(3):
        event = Event(step=step)
        add_scalar(event, "x", float(step))
        file.write(event)
    file.close()
    whole = file.path.read_bytes()
    ends = np.cumsum([len(record(event.SerializeToString())) for event in events(file.path)])
    assert ends[-1] == len(whole)
    torn = tmp_path / "torn"
    for cut in range(len(whole) + 1):
        torn.write_bytes(whole[:cut])
        assert len(events(torn)) == (ends <= cut).sum()


def test_a_flipped_bit_is_noticed(tmp_path):
    """A record whose bytes were changed is not read."""
    file = EventFile(tmp_path)
    file.write(Event(step=1))
    file.close()
    data = bytearray(file.path.read_bytes())
    data[-6] ^= 1
    file.path.write_bytes(data)
    assert len(events(file.path)) == 1


def test_a_full_disk_raises_and_closes(tmp_path):
    """When the system takes no more bytes the error is told, and nothing is appended to the torn record."""
    file = EventFile(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    event = Event(step=1)
    add_text(event, "t", "x" * 1000)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 100, before[1]))
        with pytest.raises(OSError):
            file.write(event)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.closed
    assert len(events(file.path)) == 1
    assert file.path.stat().st_size <= 200


@pytest.mark.distributed
def test_a_killed_process_loses_nothing_that_was_written(tmp_path):
    """What `write` has returned from is in the file after `kill -9`."""
    code = f"""
        import os, signal
        from pathlib import Path
        from tensorboard.compat.proto.event_pb2 import Event
        from gradlens.writers.events import EventFile, add_scalar
        file = EventFile(Path({str(tmp_path)!r}))
        for step in range(1000):
            event = Event(step=step)
            add_scalar(event, "x", float(step))
            file.write(event)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert killed.returncode == -9
    (path,) = tmp_path.iterdir()
    assert points(path)["x"] == [(step, float(step)) for step in range(1000)]
