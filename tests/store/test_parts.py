"""A Parquet part gives back what was written, sorted by parameter, and reads only the groups that are asked for."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradlens.errors import CorruptRunError
from gradlens.store import parts
from gradlens.store.parts import Reader
from gradlens.store.tables import STATUSES, TABLES, Key

NAMES = ["a", "b", "c", "ü*[0]"]
KEY = Key(3, 1)


def rows(steps, names=NAMES, first=0, seed=0):
    """Rows of a history, by step."""
    draw = np.random.default_rng([seed, first])
    n = len(names) * steps
    made = {}
    for name, dtype in TABLES["history"].items():
        made[name] = (draw.standard_normal(n) if dtype == "float64" else draw.integers(0, 100, n)).astype(dtype)
    made["sum"][::5] = np.nan
    step = np.repeat(np.arange(first, first + steps), len(names))
    made |= {
        "snapshot": step.astype("int64"), "step": step.astype("int64"),
        "entry": np.tile(np.arange(len(names)), steps).astype("int32"),
        "stage": draw.integers(0, 4, n).astype("int8"), "status": draw.integers(0, len(STATUSES), n).astype("int8"),
        "time": (1_700_000_000_000_000 + step).astype("int64"),
    }  # fmt: skip
    return made


def write(path, *chunks, names=NAMES):
    parts.write(path, "history", KEY, names, chunks, sum(len(rows["step"]) for rows in chunks))
    return path


def read(path, columns=None, keep=lambda name, low, high: True):
    reader = Reader(path, "history")
    found = list(reader.read(columns or list(TABLES["history"]), keep))
    reader.close()
    return {name: np.concatenate([group[name] for group in found]) for name in found[0]} if found else {}


def by_entry(made):
    order = np.lexsort((made["snapshot"], made["entry"]))
    return {name: values[order] for name, values in made.items()}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        assert a[name].dtype == b[name].dtype, name


def test_rows_come_back_sorted_by_parameter(tmp_path):
    """Every bit of every column, in the dtypes of the table."""
    made = rows(50)
    same(read(write(tmp_path / "p.parquet", made)), by_entry(made))
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


def test_others_see_words_and_times(tmp_path):
    """Names, stages and statuses are words in a dictionary, times are times, the segment and the rank are columns."""
    made = rows(2)
    table = pq.read_table(write(tmp_path / "p.parquet", made))
    assert table["parameter"].to_pylist() == [name for name in NAMES for _ in range(2)]
    assert set(table["status"].to_pylist()) <= set(STATUSES)
    assert pa.types.is_dictionary(table["stage"].type)
    assert table["time"].type == pa.timestamp("us", tz="UTC")
    assert (table["segment"].to_pylist(), table["rank"].to_pylist()) == ([3] * 8, [1] * 8)


def test_groups_that_are_not_asked_for_are_not_read(tmp_path, monkeypatch):
    """`keep` sees the bounds of each group; only those it lets through come."""
    monkeypatch.setattr(parts, "GROUP", 10)
    made = rows(25)
    path = write(tmp_path / "p.parquet", made)
    bounds = []

    def keep(name, low, high):
        bounds.append((name, low, high))
        return name != "entry" or low > 1

    assert read(path, ["entry", "step"], keep)["entry"].tolist() == [2] * 25 + [3] * 25
    assert ("entry", 0, 0) in bounds
    assert ("step", 0, 9) in bounds
    reader = Reader(path, "history")
    assert reader.bounds("step") == (0, 24)
    assert reader.rows == 100


def test_a_small_part_has_small_groups(tmp_path):
    """One parameter of a part of 80,000 rows is in two of five groups, each with the names that occur in it alone."""
    names = [f"layer{i}" for i in range(40)]
    path = write(tmp_path / "p.parquet", rows(2000, names), names=names)
    meta = pq.read_metadata(path)
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [16_384] * 4 + [80_000 - 4 * 16_384]
    groups = []
    read(path, ["entry"], lambda name, low, high: name != "entry" or (low <= 8 <= high and not groups.append(low)))
    assert len(groups) == 2
    chunk = pq.ParquetFile(path).read_row_group(0, columns=["parameter"])["parameter"].chunk(0)
    assert chunk.dictionary.to_pylist() == names[:9]


def test_nothing_is_there_until_it_is_whole(tmp_path):
    """When writing fails half way no file is left, under either name."""

    def broken():
        yield rows(3)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        parts.write(tmp_path / "p.parquet", "history", KEY, NAMES, broken(), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chunk", [7, 100, 100_000])
def test_merging_is_writing_at_once(tmp_path, monkeypatch, chunk):
    """Some parts merged, a few rows at a time, have the rows of one part of all of them, in the same order."""
    monkeypatch.setattr(parts, "CHUNK", chunk)
    monkeypatch.setattr(parts, "GROUP", 16)
    pieces = [rows(10, first=first) for first in (0, 10, 20)]
    paths = [write(tmp_path / f"{i}.parquet", piece) for i, piece in enumerate(pieces)]
    assert parts.merge(paths, tmp_path / "all.parquet", "history", KEY, NAMES, lambda: True)
    together = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    same(read(tmp_path / "all.parquet"), by_entry(together))
    assert all(path.exists() for path in paths)


def test_merging_stops_when_told(tmp_path):
    """Told to stop, it leaves everything as it was."""
    path = write(tmp_path / "0.parquet", rows(4))
    assert not parts.merge([path], tmp_path / "all.parquet", "history", KEY, NAMES, lambda: False)
    assert [p.name for p in tmp_path.iterdir()] == ["0.parquet"]


def _table(**columns):
    made = pq.read_table(pa.BufferReader(_bytes()))
    for name, values in columns.items():
        at = made.schema.get_field_index(name)
        made = made.remove_column(at) if values is None else made.set_column(at, name, values)
    return made


def _bytes():
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder) / "p.parquet", rows(2)).read_bytes()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sum": None}, "the column sum is not there as double"),
        ({"entry": pa.array([0.5] * 8)}, "the column entry is not there as int32"),
        ({"numel": pa.array([1, None] * 4, pa.int64())}, "the column numel has holes"),
        ({"status": pa.array(["ok"] * 7 + ["fine"]).dictionary_encode()}, "the column status has unknown words"),
        ({"status": pa.array([1] * 8)}, "the column status is not there as dictionary"),
        ({"time": pa.array([0] * 8, pa.timestamp("s"))}, "the column time is not there"),
        ({"sum": pa.array([[1.0]] * 8)}, "the column sum is not there as double"),
    ],
)  # fmt: skip
def test_a_part_of_somebody_else_is_an_error(tmp_path, columns, message):
    """Columns that lack, have another type, holes, or words that gradlens does not know."""
    pq.write_table(_table(**columns), tmp_path / "p.parquet")
    with pytest.raises(CorruptRunError, match=message):
        read(tmp_path / "p.parquet")


def test_plain_strings_are_words_too(tmp_path):
    """A part that another program wrote anew, without dictionaries, reads as before."""
    made = rows(2)
    path = write(tmp_path / "p.parquet", made)
    table = pq.read_table(path)
    for name in ("stage", "status", "parameter"):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.string()))
    pq.write_table(table, tmp_path / "q.parquet")
    same(read(tmp_path / "q.parquet"), by_entry(made))


def test_too_many_rows_are_refused_before_they_are_read(tmp_path, monkeypatch):
    """What no part of gradlens has is refused by the footer alone."""
    path = write(tmp_path / "p.parquet", rows(4))
    for limit in ("MAX_GROUP", "MAX_ROWS"):
        with monkeypatch.context() as patch, pytest.raises(CorruptRunError, match="16 rows in 1 groups"):
            patch.setattr(parts, limit, 15)
            Reader(path, "history")
