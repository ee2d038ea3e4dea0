"""A killed run is made whole for readers that know Parquet alone."""

import os
import shutil

import pyarrow.dataset as dataset
import pytest

from gradlens.errors import RunDirectoryError
from gradlens.store.finish import finish
from gradlens.store.run import open_run
from tests.store import made


def _killed(tmp_path, *, torn=b""):
    """A run as a kill leaves it: a copy of one that is being written."""
    with made.store(tmp_path / "writing") as to:
        for record in made.training(20):
            to.write(record)
        to.flush()
        run = shutil.copytree(tmp_path / "writing", tmp_path / "killed")
    for tail in run.glob("history/_*.tail"):
        with open(tail, "ab") as file:
            file.write(torn)
    return run


def _steps(run):
    """What a plain reader of Parquet has."""
    return sorted(set(dataset.dataset(run / "history").to_table(columns=["step"])["step"].to_pylist()))


def test_the_last_rows_become_parquet(tmp_path):
    """A plain reader has all steps, no tail is left, and we read the same as before."""
    run = _killed(tmp_path)
    before = open_run(run).history()
    done = finish(run)
    assert _steps(run) == list(range(20))
    assert not list(run.glob("*/_*.tail"))
    assert done.files >= 3
    assert done.rows >= len(before)
    assert open_run(run).history().equals(before)


def test_what_was_cut_off_is_said_and_dropped(tmp_path):
    """The whole records before it are there."""
    run = _killed(tmp_path, torn=b"ROWS\x05\x00")
    done = finish(run)
    assert done.torn == 6
    assert "6 bytes" in str(done)
    assert _steps(run) == list(range(20))


def test_a_whole_run_stays_as_it_is(tmp_path):
    """Nothing to do the second time, and said."""
    run = made.write(tmp_path / "run", made.training(3))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert "nothing to do" in str(finish(run))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_that_is_written_is_left_alone(tmp_path):
    """The error says who to wait for; every tail is still there."""
    with made.store(tmp_path / "run") as to:
        to.write(made.snapshot(0))
        to.flush()
        with pytest.raises(RunDirectoryError, match="another lens is writing"):
            finish(tmp_path / "run")
        assert list((tmp_path / "run").glob("history/_*.tail"))


def test_a_damaged_tail_is_named_and_kept(tmp_path):
    """The others are finished."""
    run = _killed(tmp_path)
    (bad,) = run.glob("weights/_*.tail")
    data = bytearray(bad.read_bytes())
    data[4096 + 40] ^= 0xFF
    bad.write_bytes(data + b"ROWS")
    done = finish(run)
    assert len(done.damaged) == 1
    assert bad.name in done.damaged[0]
    assert bad.exists()
    assert _steps(run) == list(range(20))


def test_half_written_files_of_a_kill_are_removed(tmp_path):
    """A Parquet part that was not whole yet had its rows in the tail."""
    run = _killed(tmp_path)
    half = run / "history" / ".0000-rank0-000000-000000.parquet.tmp"
    half.write_bytes(b"PAR1")
    assert finish(run).removed == 1
    assert not half.exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    """Nothing is made in it."""
    with pytest.raises(RunDirectoryError, match="not a run"):
        finish(tmp_path)
    assert os.listdir(tmp_path) == []
