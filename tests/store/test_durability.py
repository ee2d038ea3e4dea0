"""What a killed process, a full disk, a removed directory or a lost permission leave: the records, and the training."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import pytest
import torch

import gradlens
from gradlens import frames
from gradlens.errors import GradlensWarning
from gradlens.store import store, tables, tail
from gradlens.store.run import open_run
from gradlens.store.store import Store
from tests.store import made
from tests.store.test_run import same
from tests.store.test_store import until

# --- killed ---------------------------------------------------------------------------------------------------------

INTERVAL = 0.1

#: Writes record after record, in tails of a few rows, and says of each when it was taken.
WRITER = f"""
    import sys, time
    from tests.store import made
    from gradlens.store import compaction
    compaction.FAN_IN = 3
    run, first = sys.argv[1], int(sys.argv[2])
    with made.store(run, interval={INTERVAL}, roll=40) as to:
        for step in range(first, first + 100_000):
            to.write(made.snapshot(step, detail=step % 5 == 0))
            print(step, time.monotonic(), flush=True)
            time.sleep(0.002)
"""


@pytest.mark.slow
def test_killed_at_any_moment_a_run_reads_and_lacks_only_the_last_moments(tmp_path):
    """A writer is killed again and again, and goes on each time: every record older than the interval is there, bit by bit,
    none twice; what it left behind is cleared away."""
    draw, first = random.Random(0), 0
    for _ in range(6):
        taken = {}
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            step, moment = writer.stdout.readline().split()  # it has begun
            taken[int(step)] = float(moment)
            time.sleep(draw.uniform(0.1, 1.2))
            writer.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            taken |= {int(step): float(moment) for step, moment in map(str.split, writer.stdout.read().splitlines())}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run = open_run(tmp_path)
        assert len(told) == len(run.notes)
        steps = run.steps()
        assert steps == list(range(len(steps)))
        old = [step for step, moment in taken.items() if moment < killed - INTERVAL - 0.5]  # of which the system's is 0.5
        assert set(old) <= set(steps)
        assert steps[-1] <= max(taken) + 1
        first = steps[-1] + 1
    expected = frames.frame([made.snapshot(step, detail=False) for step in range(first)])
    same(run.history(), expected)
    made.write(tmp_path, [])
    same(open_run(tmp_path).history(), expected)
    assert open_run(tmp_path).notes == []
    for table in tables.TABLES:
        assert not [path for path in (tmp_path / table).iterdir() if path.suffix in (".tail", ".tmp")]


def test_what_waits_is_recorded_before_slow_rules_have_seen_it(tmp_path):
    """A rule that takes its time holds up the history, and not the records: steps that wait behind it are on disk."""
    reached, go_on = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def rule(history):
        step = history.latest().step
        if history.latest().stage == "used" and step < 2:
            reached[step].set()
            go_on[step].wait(20)
        return ()

    case = gradlens.testing.healthy()
    with gradlens.watch(case.model, case.optimizer, run=tmp_path, rules=[rule]) as lens:
        case.train(1)
        assert reached[0].wait(20)
        case.train(9, first=1)
        go_on[0].set()
        assert reached[1].wait(20)
        until(lambda: open_run(tmp_path).steps() == list(range(10)))
        go_on[1].set()
    assert lens.history()["step"].unique().tolist() == list(range(10))
    same(open_run(tmp_path).history(), lens.history())


# --- training goes on -----------------------------------------------------------------------------------------------


def alone(steps):
    """The weights after a training that nobody watches."""
    case = gradlens.testing.healthy()
    losses = case.train(steps)
    return losses, case.model.state_dict()


@contextlib.contextmanager
def told():
    """What gradlens says meanwhile of writers that it switches off."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts = []
        yield texts
        said = [str(warning.message) for warning in caught if issubclass(warning.category, GradlensWarning)]
        texts += [text for text in said if "switched off" in text]


def trained_through(run, illness, steps=30):
    """A watched training to whose run something happens in the middle: losses, weights, warnings, live history."""
    case = gradlens.testing.healthy()
    other = gradlens.testing.RecordingWriter()
    with told() as warned:
        lens = gradlens.watch(case.model, case.optimizer, run=run, writers=[other])
        losses = case.train(steps // 3)
        lens.flush()
        illness()
        for step in range(steps // 3, steps):
            losses += case.train(1, first=step)
            lens.flush()
        history = lens.history()
        lens.close()
    assert other.calls["close"] == 1
    assert len(other.snapshots) == 2 * steps
    assert history["step"].nunique() == steps
    return losses, case.model.state_dict(), warned


def same_training(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])


@pytest.fixture
def disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_stops_the_records_and_not_the_training(disk):
    """One warning that says so; weights and losses bit for bit; what was written before reads; the lens still answers."""

    def fill():
        with contextlib.suppress(OSError), open(disk / "other", "wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()

    losses, weights, warned = trained_through(disk / "run", fill)
    same_training((losses, weights), alone(30))
    (of_store,) = [text for text in warned if text.startswith("Store failed")]
    assert "No space left on device" in of_store
    assert "Training and the other writers go on" in of_store
    assert len(warned) <= 2  # TensorBoard's events have the same disk
    with told():
        run = open_run(disk / "run")
    assert run.steps() == list(range(len(run.steps())))
    assert len(run.steps()) >= 10


def test_a_disk_that_is_slower_than_training_thins_the_records(tmp_path, monkeypatch):
    """Whole steps are left out while it stands still, a finding says which and how many, no more than a queue's worth waits
    in memory, and training does not: weights and losses bit for bit."""
    go_on, real = threading.Event(), tail.Tail._write

    def slow(writing, data, at):
        go_on.wait(60)
        return real(writing, data, at)

    monkeypatch.setattr(tail.Tail, "_write", slow)
    case = gradlens.testing.healthy()
    with gradlens.watch(case.model, case.optimizer, writers=[Store(tmp_path, interval=0.05)]) as lens:
        lens._recorder.inbox.items = 64  # soon full
        losses, most = case.train(5), 0
        time.sleep(0.2)  # by now a flush stands still
        for step in range(5, 150):
            losses += case.train(1, first=step)
            most = max(most, len(lens._recorder.inbox))
        assert most == 64
        go_on.set()
        lens.flush()
        losses += case.train(10, first=150)
        found = lens.findings()
    same_training((losses, case.model.state_dict()), alone(160))
    run = open_run(tmp_path)
    there, (gap,) = run.steps(), [finding for finding in run.findings() if finding.rule == "records-thinned"]
    missing = sorted(set(range(160)) - set(there))
    assert 40 < len(missing) < 145
    assert missing == list(range(gap.step, gap.step + int(gap.value)))
    assert f"{len(missing)} observed steps from {missing[0]} to {missing[-1]} left no record" in gap.seen
    assert gap in found
    assert run.history().groupby("step").size().unique().tolist() == [12]  # no step has a hole


def test_a_removed_directory_stops_the_records_and_not_the_training(tmp_path):
    """One warning that names it; it is not made again."""
    losses, weights, warned = trained_through(tmp_path / "run", lambda: shutil.rmtree(tmp_path / "run"))
    same_training((losses, weights), alone(30))
    (of_store,) = [text for text in warned if text.startswith("Store failed")]
    assert "run was removed while it was written" in of_store or "No such file or directory" in of_store
    assert len(warned) <= 2
    assert not (tmp_path / "run" / "history").exists()


#: Root may write anywhere, unless it gives that up.
AS_OTHERS = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]

NO_LONGER_ALLOWED = """
    import os, sys
    from pathlib import Path
    from tests.store import test_durability as here
    run = Path(sys.argv[1])
    def illness():
        here.made_unwritable(run)
    *training, warned = here.trained_through(run, illness)
    here.same_training(training, here.alone(30))
    (of_store,) = [text for text in warned if text.startswith("Store failed")]
    assert "Permission denied" in of_store, warned
    assert len(warned) <= 2, warned
"""


def made_unwritable(run):
    """No file can be made any more, nor opened for writing."""

    store.FRAMES = 1  # so that each flush needs a new file
    for folder in (run, *(path for path in run.iterdir() if path.is_dir())):
        folder.chmod(0o500)


@pytest.mark.skipif(not os.geteuid() and not shutil.which("setpriv"), reason="root cannot lose its permission here")
def test_a_lost_permission_stops_the_records_and_not_the_training(tmp_path):
    """One warning that names it, in a process that may not write where it wrote before."""
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        [*AS_OTHERS, sys.executable, "-c", textwrap.dedent(NO_LONGER_ALLOWED), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    for folder in (tmp_path / "run", *(path for path in (tmp_path / "run").iterdir() if path.is_dir())):
        folder.chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert open_run(tmp_path / "run").steps()[:10] == list(range(10))


def test_a_place_that_cannot_be_written_is_an_error_of_watch(tmp_path):
    """Before training: it is named, and nothing is attached to the model."""
    (tmp_path / "file").write_text("")
    case = gradlens.testing.healthy()
    with pytest.raises(gradlens.errors.RunDirectoryError, match=r"no records can be written to .*file.*give a directory"):
        gradlens.watch(case.model, case.optimizer, run=tmp_path / "file" / "run")
    assert not any(p._backward_hooks for p in case.model.parameters())


@pytest.mark.slow
def test_a_training_that_is_killed_has_its_steps_on_disk(tmp_path):
    """The two lines of the README, a process that is killed: all steps but those of the last second are there."""
    code = """
        import sys, time, gradlens
        case = gradlens.testing.healthy()
        gradlens.watch(case.model, case.optimizer, run=sys.argv[1])
        for step in range(100_000):
            case.train(1, first=step)
            print(step, time.monotonic(), flush=True)
            time.sleep(0.005)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as training:
        lines = [training.stdout.readline()]
        time.sleep(4)
        training.kill()
        killed = time.monotonic()
        lines += training.stdout.read().splitlines()
    taken = {int(step): float(moment) for step, moment in map(str.split, lines)}
    with told():
        steps = open_run(tmp_path).steps()
    old = [step for step, moment in taken.items() if moment < killed - 2]  # one second, and one of a busy machine
    assert len(old) > 10
    assert steps == list(range(len(steps)))
    assert set(old) <= set(steps)
