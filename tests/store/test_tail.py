"""A tail gives back whole frames, whatever happened to its end."""

import os
import re
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens.errors import CorruptRunError
from gradlens.store import tail
from gradlens.store.tail import Tail

COLUMNS = {"step": "int64", "stage": "int8", "entry": "int32", "bucket": "int16", "sum": "float64"}


def batch(rows, start=0):
    numbers = np.arange(start, start + rows)
    values = {name: numbers.astype(dtype) for name, dtype in COLUMNS.items()}
    return values | {"sum": np.where(numbers % 3 == 0, np.nan, -numbers / 7)}


def write(path, frames):
    """A tail of these frames, and where each ends."""
    made = Tail(path, COLUMNS)
    ends = [path.stat().st_size]
    for rows in frames:
        made.append([batch(rows)])
        ends.append(path.stat().st_size)
    made.close()
    return ends


def same(read, frames):
    for name in COLUMNS:
        expected = np.concatenate([np.empty(0, COLUMNS[name]), *(batch(rows)[name] for rows in frames)])
        np.testing.assert_array_equal(read[name], expected)
        assert read[name].dtype == expected.dtype


def test_frames_come_back(tmp_path):
    """All rows, in order, with their bits and dtypes; several batches may share a frame."""
    made = Tail(tmp_path / "t", COLUMNS)
    made.append([batch(3), batch(0), batch(2)])
    made.append([batch(1)])
    assert (made.rows, made.frames) == (6, 2)
    made.close()
    rows, torn = tail.read(tmp_path / "t", COLUMNS)
    same(rows, [3, 2, 1])
    assert torn == 0


def test_some_columns_are_read_alone(tmp_path):
    """Only what is asked for is returned; nothing asked for still checks the frames."""
    write(tmp_path / "t", [4, 4])
    rows, _ = tail.read(tmp_path / "t", {"entry": "int32"})
    assert rows.keys() == {"entry"}
    assert rows["entry"].tolist() == [0, 1, 2, 3] * 2
    assert tail.read(tmp_path / "t", {}) == ({}, 0)


def test_a_torn_end_is_dropped_and_counted(tmp_path):
    """Cut anywhere, a tail gives the whole frames before the cut, and says how many bytes follow them."""
    ends = write(tmp_path / "t", [2, 3, 1])
    data = (tmp_path / "t").read_bytes()
    for cut in [*range(20), *range(tail.HEADER - 20, len(data) + 1)]:
        (tmp_path / "cut").write_bytes(data[:cut])
        rows, torn = tail.read(tmp_path / "cut", COLUMNS)
        whole = sum(end <= cut for end in ends[1:])
        same(rows, [2, 3, 1][:whole])
        assert torn == (cut - max(end for end in ends if end <= cut) if cut >= ends[0] else cut)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_noticed(tmp_path_factory, data):
    """No flipped bit gives other numbers: it is an error, or (in the last frame) that frame is left out and counted."""
    path = tmp_path_factory.mktemp("flips") / "t"
    ends = write(path, [2, 3, 2])
    content = bytearray(path.read_bytes())
    at = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(tail.HEADER, len(content) - 1)))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    if at < ends[2] + tail._FRAME.size:
        with pytest.raises(CorruptRunError, match=re.escape(str(path))):
            tail.read(path, COLUMNS)
    else:
        rows, torn = tail.read(path, COLUMNS)
        same(rows, [2, 3])
        assert torn == len(content) - ends[2]


def test_a_damaged_number_of_rows_is_not_taken_for_a_torn_end(tmp_path):
    """It has a checksum of its own; else all that follows would be dropped as if the writer had been killed there."""
    ends = write(tmp_path / "t", [2, 3])
    data = bytearray((tmp_path / "t").read_bytes())
    data[ends[0] + 6] ^= 0x40
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(CorruptRunError, match=f"damaged at byte {ends[0]}: move it away"):
        tail.read(tmp_path / "t", COLUMNS)


@pytest.mark.parametrize("zeros", [1, 40, 5000])
def test_an_end_of_zeros_is_a_torn_one(tmp_path, zeros):
    """A machine that stops may leave a file that has grown without its bytes."""
    write(tmp_path / "t", [2, 3])
    with open(tmp_path / "t", "ab") as file:
        file.write(bytes(zeros))
    rows, torn = tail.read(tmp_path / "t", COLUMNS)
    same(rows, [2, 3])
    assert torn == zeros


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"columns": {"step": "int64"}}, "the column stage is not there as int8"),
        ({"columns": {"step": "float64"}}, "the column step is not there as int64"),
        ({"columns": {"step": "object"}}, "unknown columns"),
        ({"columns": {"step": ["int64"]}}, "header of"),
        ({"columns": {}}, "unknown columns"),
        ({"columns": []}, "header of"),
        ({}, "header of"),
        ([1], "header of"),
        (None, "header of"),
    ],
)
def test_an_invented_header_is_an_error(tmp_path, content, message):
    """Columns are checked before anything is made of them, though the checksum be right."""
    (tmp_path / "t").write_bytes(tail.header(content))
    with pytest.raises(CorruptRunError, match=message):
        tail.read(tmp_path / "t", COLUMNS)


def test_what_is_no_tail_is_an_error(tmp_path, monkeypatch):
    """Another beginning, a file that is too large, frames of nothing."""
    (tmp_path / "t").write_bytes(b"PAR1 and so on, for some bytes")
    with pytest.raises(CorruptRunError, match="does not begin as"):
        tail.read(tmp_path / "t", COLUMNS)
    write(tmp_path / "empty", [1])
    with open(tmp_path / "empty", "ab") as file:
        file.write(tail._frame(0, zlib.crc32(b"")) * 2)
    with pytest.raises(CorruptRunError, match="damaged"):
        tail.read(tmp_path / "empty", COLUMNS)
    monkeypatch.setattr(tail, "MAX_BYTES", 100)
    with pytest.raises(CorruptRunError, match="larger than"):
        tail.read(tmp_path / "empty", COLUMNS)


def test_a_failed_write_leaves_the_frames_before_it(tmp_path, monkeypatch):
    """When a write stops half way, as on a full disk, the file is cut back to its last whole frame."""
    made = Tail(tmp_path / "t", COLUMNS)
    made.append([batch(2)])
    whole = (tmp_path / "t").stat().st_size
    real, left = os.write, [30]

    def write_until_full(fd, data):
        if not left[0]:
            raise OSError(28, "No space left on device")
        data = b"".join(data) if isinstance(data, list) else data
        size = min(left[0], len(data))
        left[0] -= size
        return real(fd, data[:size])

    monkeypatch.setattr(os, "write", write_until_full)
    monkeypatch.setattr(os, "writev", write_until_full)
    with pytest.raises(OSError, match="No space"):
        made.append([batch(5)])
    assert (tmp_path / "t").stat().st_size == whole
    left[0] = 1 << 20
    made.append([batch(1)])
    made.close()
    same(tail.read(tmp_path / "t", COLUMNS)[0], [2, 1])


def test_a_tail_is_never_written_over(tmp_path):
    """A name that is taken is an error."""
    write(tmp_path / "t", [1])
    with pytest.raises(FileExistsError):
        Tail(tmp_path / "t", COLUMNS)
