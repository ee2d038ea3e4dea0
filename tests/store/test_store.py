"""The writer: one on a directory, durable within its interval, few files, and off for good when something fails."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import pairwise

import numpy as np
import pytest

import gradlens
from gradlens import frames
from gradlens.errors import ArgumentError, GradlensWarning, RunDirectoryError
from gradlens.records import Severity
from gradlens.store import compaction, lock, parts, segment, tables
from gradlens.store import store as store_module
from gradlens.store.run import open_run
from gradlens.store.store import Store
from gradlens.store.tables import TABLES, Key
from tests.store import made
from tests.store.test_run import same


def files(run, table="history"):
    return sorted(path.name for path in (run / table).iterdir())


def until(holds, seconds=20):
    """Wait for what a thread will bring about."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


# --- layout ---------------------------------------------------------------------------------------------------------


def test_a_closed_run_is_parquet_and_json(tmp_path):
    """One part a table, nothing half-written; the segment says what wrote it and of which parameters."""
    settings = {"torch": "2.13", "schedule": "every(1)"}
    run = made.write(tmp_path / "a" / "b", [*made.training(3), made.activations(1), made.finding(1)], settings=settings)
    for table in TABLES:
        assert files(run, table) == ["0000-rank0-000000-000000.parquet"]
    assert files(run, "findings") == ["0000-rank0.jsonl"]
    assert files(run, "segments") == [".rank0.lock", "0000-rank0.json"]
    (known,) = segment.segments(run)
    assert known.parameters == [(name, shape, "float32", "") for name, shape in zip(made.NAMES, made.SHAPES, strict=True)]
    assert known.versions.keys() == {"python", "numpy", "pyarrow", "torch"}
    assert (known.first_step, known.scalars) == (0, ["loss"])
    assert open_run(run).settings["schedule"] == "every(1)"


def test_names_are_stored_once(tmp_path):
    """However many steps, a name is in the segment's file once and in a part's dictionary once for each row group."""
    names = [f"a.parameter.with.a.name.that.is.rather.long.{i}" for i in range(50)]
    of = made.parameters(names, [(3,)] * 50)
    run = made.write(tmp_path, [made.snapshot(step, of=of, detail=False) for step in range(200)])
    whole = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert whole.count(names[7].encode()) <= 4  # the segment, a dictionary page, the bounds of two row groups at most


def test_histograms_and_weights_are_thinned_as_the_run_grows(tmp_path):
    """Each of the first steps, then when the run has grown by a tenth; and the last, of which `weights()` tells."""
    run = made.write(tmp_path, made.training(200))
    kept = open_run(run).histograms()["step"].unique().tolist()
    assert kept[:11] == list(range(11))
    assert kept[-1] == 199
    assert 30 < len(kept) < 60
    assert all(b - a <= 0.1 * (a + 1) + 1 for a, b in pairwise(kept))
    assert open_run(run).weights().attrs == {"step": 199, "stage": "used"}
    assert open_run(run).steps() == list(range(200))


# --- durable --------------------------------------------------------------------------------------------------------


def test_what_was_flushed_is_read_while_the_store_is_open(tmp_path):
    """A reader sees each flush, without waiting for the writer and without being in its way."""
    records = made.training(6)
    with made.store(tmp_path) as store:
        for i, record in enumerate(records):
            store.write(record)
            store.flush()
            same(open_run(tmp_path).history(), frames.frame(records[: i + 1]))
        store.write(made.finding(5))
        assert open_run(tmp_path).findings() == []
        store.flush()
        assert open_run(tmp_path).findings() == [made.finding(5)]


def test_the_clock_flushes_too(tmp_path):
    """A record is on disk within the interval, though no other follows it."""
    with made.store(tmp_path, interval=0.05) as store:
        store.write(made.snapshot(0))
        until(lambda: open_run(tmp_path).steps() == [0])


def test_the_interval_is_a_users_choice(tmp_path):
    """`writers=[Store(path, interval=...)]` is what `run=` makes, with another interval; one that is none is refused."""
    case = gradlens.testing.healthy()
    store = gradlens.writers.Store(tmp_path, interval=0.05)
    with gradlens.watch(case.model, case.optimizer, writers=[store]) as lens:
        case.train(3)
        until(lambda: open_run(tmp_path).steps() == [0, 1, 2])
    same(open_run(tmp_path).history(), lens.history())
    with pytest.raises(ArgumentError, match="interval"):
        Store(tmp_path, interval=0)


def test_memory_does_not_wait_for_the_clock(tmp_path):
    """When as many rows wait as a tail takes, they are written at once."""
    with made.store(tmp_path, roll=100) as store:
        for record in made.training(10, detail=False):  # 5 rows and one scalar each
            store.write(record)
            assert store._rows.waiting < 100
        assert len(open_run(tmp_path).steps()) >= 8


IMPORTS = """
    import sys
    from pathlib import Path
    from tests.store import made
    from gradlens.store.store import Store
    records = made.training(40)
    store = Store(sys.argv[1], {}, interval=3600, roll=10)
    before = set(sys.modules)
    for record in records:
        store.write(record)
    store.close()
    parts = [path.stem for path in (Path(sys.argv[1]) / "history").glob("*.parquet")]
    assert len(parts) > 1 and any(part.split("-")[-1] != part.split("-")[-2] for part in parts), parts
    print(sorted(set(sys.modules) - before))
"""


def test_making_parts_imports_nothing(tmp_path):
    """Tails become parts and parts one in the middle of a training: pandas would take 30 MB and a second of its time."""
    script = textwrap.dedent(IMPORTS)
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


KILLED = """
    import os, signal, sys
    from tests.store import made
    from gradlens.store.store import Store
    store = Store(sys.argv[1], {"rank": 0}, interval=3600)
    for record in made.training(4):
        store.write(record)
    store.write(made.finding(3))
    store.flush()
    store.write(made.snapshot(4))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(run, code=KILLED):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(run)], check=False)
    assert done.returncode == -signal.SIGKILL
    return run


def test_a_killed_writer_leaves_what_it_flushed_and_no_lock(tmp_path):
    """All rows up to the last flush are there, the next lens goes on at once, and it makes parts of the tails."""
    killed(tmp_path)
    same(open_run(tmp_path).history(), frames.frame(made.training(4)))
    assert files(tmp_path) == ["_0000-rank0-000000.tail"]
    with made.store(tmp_path) as store:
        until(lambda: "0000-rank0-000000-000000.parquet" in files(tmp_path))
        store.write(made.snapshot(4, seed=1))
    run = open_run(tmp_path)
    assert run.steps() == [0, 1, 2, 3, 4]
    assert run.findings() == [made.finding(3)]
    assert files(tmp_path) == ["0000-rank0-000000-000000.parquet", "0001-rank0-000000-000000.parquet"]


def test_a_torn_tail_is_recovered_and_said_so(tmp_path):
    """The reader warns of it, with how much is gone; the next writer records it as a finding; all before it reads."""
    killed(tmp_path)
    tail = tmp_path / "history" / "_0000-rank0-000000.tail"
    whole = tail.read_bytes()
    tail.write_bytes(whole + whole[4096 : 4096 + 27])  # the beginning of a frame
    with pytest.warns(GradlensWarning, match="ends in the middle of a record, as after a crash: 27 bytes were left out"):
        run = open_run(tmp_path)
    assert len(run.notes) == 1
    same(run.history(), frames.frame(made.training(4)))
    made.write(tmp_path, [made.snapshot(4)])
    (finding,) = [finding for finding in open_run(tmp_path).findings() if finding.rule == "records-torn"]
    assert (finding.severity, "27 bytes" in finding.seen) == (Severity.INFO, True)
    assert open_run(tmp_path).steps() == [0, 1, 2, 3, 4]


def test_the_tail_of_a_living_writer_is_not_called_torn(tmp_path):
    """A reader may see half of the frame that is just being written: that is no crash."""
    with made.store(tmp_path) as store:
        store.write(made.snapshot(0))
        store.flush()
        tail = tmp_path / "history" / "_0000-rank0-000000.tail"
        whole = tail.read_bytes()
        tail.write_bytes(whole + b"ROWS")
        assert open_run(tmp_path).notes == []
        assert open_run(tmp_path).steps() == [0]
        tail.write_bytes(whole)


def test_a_damaged_tail_stays_and_does_not_stop_the_next_writer(tmp_path):
    """It is left as it is, and named in a finding; the reader says how to read the rest."""
    killed(tmp_path)
    tail = tmp_path / "history" / "_0000-rank0-000000.tail"
    content = bytearray(tail.read_bytes())
    content[4096 + 5] ^= 1
    tail.write_bytes(content)
    made.write(tmp_path, [made.snapshot(7)])
    with pytest.raises(RunDirectoryError, match="move it away to read the rest"):
        open_run(tmp_path)
    tail.rename(tmp_path / "away")
    run = open_run(tmp_path)
    assert run.steps() == [7]
    assert [finding.rule for finding in run.findings()] == ["records-damaged", "made"]


def test_what_a_killed_writer_left_half_done_is_cleared_away(tmp_path):
    """Half-written files, and parts whose rows a merged one has too; those of other ranks are theirs."""
    made.write(tmp_path, made.training(2))
    history = tmp_path / "history"
    part = (history / "0000-rank0-000000-000000.parquet").read_bytes()
    (history / "0000-rank0-000000-000001.parquet").write_bytes(part)
    half = [".0000-rank0-000000-000008.parquet.tmp", ".0000-rank1-000000-000008.parquet.tmp"]
    for name in [*half, "_0000-rank0-000001.tail"]:
        (history / name).write_bytes(b"PAR1")
    (tmp_path / "segments" / ".0000-rank0.json.99.tmp").write_bytes(b"{")
    same(open_run(tmp_path).history(), frames.frame(made.training(2)))
    made.write(tmp_path, [])
    assert files(tmp_path) == [".0000-rank1-000000-000008.parquet.tmp", "0000-rank0-000000-000001.parquet"]
    assert files(tmp_path, "segments") == [".rank0.lock", "0000-rank0.json", "0001-rank0.json"]


# --- one writer -----------------------------------------------------------------------------------------------------


def test_a_second_lens_on_a_directory_is_an_error(tmp_path):
    """It names the directory and the rank; after close() the next one may have it. Another rank has its own."""
    message = r"another lens is writing to .*\(rank 0\): close\(\) it"
    with made.store(tmp_path), pytest.raises(RunDirectoryError, match=message):
        Store(tmp_path, {})
    with made.store(tmp_path), made.store(tmp_path, rank=1):
        assert lock.held(tmp_path, 0)
        assert lock.held(tmp_path, 1)
    assert not lock.held(tmp_path, 0)
    assert not lock.held(tmp_path, 7)
    assert segment.segments(tmp_path)[-1].key == Key(1, 0)


@pytest.mark.parametrize("code", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_a_file_system_without_locks_holds_a_run_all_the_same(tmp_path, monkeypatch, code):
    """Some network file systems know no locks: nobody is refused there, and the records are written and read."""

    def flock(fd, operation):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    same(open_run(made.write(tmp_path, made.training(2))).history(), frames.frame(made.training(2)))
    made.write(tmp_path, made.training(1, first=2))
    assert open_run(tmp_path).steps() == [0, 1, 2]


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    """A disk that answers no question is not taken for one without locks."""

    def flock(fd, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(RunDirectoryError, match="Input/output error"):
        Store(tmp_path, {})


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """The workers of a data loader may outlive the process that writes."""
    store = Store(tmp_path, {}, interval=3600)
    down, up = os.pipe()
    child = os.fork()
    if not child:
        os.read(down, 1)
        os._exit(0)
    try:
        with pytest.raises(RunDirectoryError):
            Store(tmp_path, {})
        store.close()
        made.write(tmp_path, [made.snapshot(0)])
    finally:
        os.write(up, b"x")
        os.waitpid(child, 0)
        os.close(up)
        os.close(down)


def test_a_place_that_cannot_be_a_run_is_refused(tmp_path):
    """A file, or a directory whose `run.json` is somebody else's: nothing is written there."""
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("{}")
    for name in ("file", "other"):
        with pytest.raises(RunDirectoryError):
            Store(tmp_path / name, {})
        assert not (tmp_path / name / "history").exists()


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    """The error says so when the lens is made, and holds nothing."""

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(segment.os, "replace", refused)
        with pytest.raises(RunDirectoryError, match=r"no records can be written to .*Permission denied.*give a directory"):
            Store(tmp_path, {})
    made.write(tmp_path, [made.snapshot(0)])
    assert open_run(tmp_path).steps() == [0]


# --- few files ------------------------------------------------------------------------------------------------------


def rolled(run, snapshots, **options):
    """A run of many small parts; the largest number of files seen at any time."""
    most = 0
    with made.store(run, **options) as store:
        for record in snapshots:
            store.write(record)
            most = max(most, len(files(run)))
    return most


def test_parts_merge_so_that_files_stay_few(tmp_path, monkeypatch):
    """100 tails leave a number of files that grows with its logarithm, and every row is there, in order."""
    monkeypatch.setattr(compaction, "FAN_IN", 3)
    of = made.parameters(["a", "b"], [(2,), (2,)])
    records = [made.snapshot(step, of=of, detail=False, scalars={}) for step in range(100)]
    most = rolled(tmp_path, records, roll=2)
    levels = 5  # 1, 3, 9, 27, 81 tails
    assert len(files(tmp_path)) <= most <= 3 * levels + store_module.WAITING + 4
    assert sum(part.last - part.first + 1 for part in tables.parts(tmp_path / "history")) == 100
    same(open_run(tmp_path).history(), frames.frame(records))


def test_a_million_steps_keep_under_a_hundred_files():
    """By the rule that merges: 100,000 rows a tail, 150 parameters, two stages, a million steps."""
    tails = 1_000_000 * 300 // compaction.ROLL
    own = []
    most = 0
    for number in range(tails):
        own.append(tables.Part(None, Key(0, 0), number, number))
        while merging := compaction._mergeable(own[:-1]):
            at = own.index(merging[0])
            own[at : at + len(merging)] = [tables.Part(None, Key(0, 0), merging[0].first, merging[-1].last)]
        most = max(most, len(own))
    assert [part.first for part in own[1:]] == [part.last + 1 for part in own[:-1]]
    assert most < 60


def test_a_reader_sees_every_step_while_files_merge(tmp_path, monkeypatch):
    """A run that is read over and over while its files are rolled and merged: steps from the first to some last, none
    missing, none twice."""
    monkeypatch.setattr(compaction, "FAN_IN", 3)
    of = made.parameters(["a", "b"], [(2,), (2,)])
    seen, errors, stop = [], [], threading.Event()

    def read():
        try:
            run = open_run(tmp_path)
            while not stop.is_set():
                steps = run.history(columns=["step"], parameters="b")["step"] if run.names() else []
                seen.append(len(steps))
                assert list(steps) == list(range(len(steps)))
        except Exception as error:
            errors.append(error)

    with made.store(tmp_path, roll=4) as store:
        reader = threading.Thread(target=read)
        reader.start()
        try:
            for step in range(200):
                store.write(made.snapshot(step, of=of, detail=False, scalars={}))
                if step % 25 == 0:
                    store.flush()
        finally:
            stop.set()
            reader.join()
    assert not errors
    assert len(set(seen)) > 5


def test_a_listing_is_repeated_until_it_stands_still(tmp_path, monkeypatch):
    """A listing that missed the merged file and the merged ones alike would lose their rows in silence."""
    real, answers = tables.files, []

    def listing(folder):
        found = real(folder)
        answers.append(len(found))
        return [] if len(answers) == 1 else found

    made.write(tmp_path, made.training(2))
    monkeypatch.setattr(tables, "files", listing)
    assert len(tables.parts(tmp_path / "history")) == 1
    assert len(answers) == 3


def test_full_tails_wait_in_bounded_number(tmp_path, monkeypatch):
    """When parts are written more slowly than tails fill, write() waits: so that the queue before it fills, and thins."""
    slow, real = threading.Event(), parts.write

    def waiting(*args):
        slow.wait(20)
        return real(*args)

    monkeypatch.setattr(parts, "write", waiting)
    records = [made.snapshot(step, detail=False, scalars={}) for step in range(30)]
    store = Store(tmp_path, {}, interval=3600, roll=5)
    writer = threading.Thread(target=lambda: [store.write(record) for record in records])
    writer.start()
    until(lambda: len(store._sealed) > store_module.WAITING)
    time.sleep(0.2)
    assert writer.is_alive()
    assert len(store._sealed) == store_module.WAITING + 1
    slow.set()
    writer.join()
    store.close()
    same(open_run(tmp_path).history(), frames.frame(records))


def test_tails_that_others_left_do_not_hold_up_the_next_writer(tmp_path, monkeypatch):
    """They are on disk already: only tails of its own make write() wait."""
    killed(tmp_path)
    first = tmp_path / "history" / "_0000-rank0-000000.tail"
    for number in range(1, 2 * store_module.WAITING):
        shutil.copy(first, first.with_name(f"_0000-rank0-{number:06d}.tail"))
    gate, real = threading.Event(), parts.write

    def waiting(*args):
        gate.wait(20)
        return real(*args)

    monkeypatch.setattr(parts, "write", waiting)
    store = Store(tmp_path, {}, interval=3600)
    store.write(made.snapshot(4))
    store.flush()
    assert not gate.is_set()
    assert open_run(tmp_path).steps() == [0, 1, 2, 3, 4]
    gate.set()
    store.close()
    assert not [name for name in files(tmp_path) if name.endswith(".tail")]


# --- failing --------------------------------------------------------------------------------------------------------


def test_a_failure_in_the_background_is_raised_to_the_next_caller(tmp_path, monkeypatch):
    """What the clock or the keeper met is not lost: write() and flush() raise it from then on, and close() does not."""

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts, "write", full)
    store = Store(tmp_path, {}, interval=0.02, roll=5)
    store.write(made.snapshot(0))
    until(lambda: store._error is not None)
    for call in (lambda: store.write(made.snapshot(3)), store.flush):
        with pytest.raises(OSError, match="No space left"):
            call()
    store.close()
    store.close()
    assert not lock.held(tmp_path, 0)
    assert open_run(tmp_path).steps() == [0]


def test_parameters_that_change_are_told_apart(tmp_path):
    """A parameter whose shape or piece changes, or that comes later, has its own entry; the frame says which."""
    first = made.snapshot(0, of=made.parameters(["a", "b"], [(2,), (3,)]))
    second = made.snapshot(1, of=made.parameters(["c", "a", "b"], [(1,), (2, 2), (3,)]))
    third = made.snapshot(2, of=made.parameters(["b"], [(3,)]))
    run = open_run(made.write(tmp_path, [first, second, third]))
    assert len(segment.segments(tmp_path)[0].parameters) == 4
    assert run.names() == ["a", "b", "c"]
    history = run.history().set_index(["step", "parameter"])
    assert history.loc[(0, "a"), "shape"] == (2,)
    assert history.loc[(1, "a"), "shape"] == (2, 2)
    assert history.loc[(2, "b"), "sum"] == third.value("sum", "b") or np.isnan(third.value("sum", "b"))
    assert [snapshot.names for snapshot in run.snapshots()] == [("a", "b"), ("b", "c", "a"), ("b",)]
