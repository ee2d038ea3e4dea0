"""The tests that start processes end by themselves, and leave none behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import distributed

from tests.distributed.ranks import ROOT, launch

pytestmark = pytest.mark.distributed


def write_pid():
    """For the one who launched."""
    Path(os.environ["GRADLENS_TEST_PIDS"], str(os.getpid())).touch()
    distributed.barrier()


def hang():
    """Both wait for ever."""
    write_pid()
    time.sleep(1000)


def fail():
    """One raises, and the other would wait for it for ever."""
    write_pid()
    if distributed.get_rank():
        raise RuntimeError("planted")
    distributed.barrier()
    time.sleep(1000)


def alive(folder):
    """Those that are there still, after a while."""
    end = time.monotonic() + 20
    while (pids := [pid for pid in os.listdir(folder) if not _gone(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    return pids


def _gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc")
def test_no_process_is_left_behind(tmp_path, monkeypatch):
    """Neither where a rank fails, which ends all of them and is told of, nor where the time is up."""
    monkeypatch.setenv("GRADLENS_TEST_PIDS", str(tmp_path))
    with pytest.raises(AssertionError, match="RuntimeError: planted"):
        launch(fail)
    assert len(os.listdir(tmp_path)) == 2
    with pytest.raises(AssertionError, match="the time is up"):
        launch(hang, seconds=8)
    assert alive(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc")
def test_ranks_end_when_whoever_started_them_is_killed(tmp_path):
    """They hear of it."""
    code = "from tests.distributed import ranks, test_ranks; ranks.launch(test_ranks.hang, seconds=60)"
    environment = {**os.environ, "GRADLENS_TEST_PIDS": str(tmp_path)}
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while len(os.listdir(tmp_path)) < 2 and starter.poll() is None:
        time.sleep(0.05)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    assert len(os.listdir(tmp_path)) == 2
    assert alive(tmp_path) == []
