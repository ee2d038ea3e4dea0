"""`gradlens view`: TensorBoard with the tab, over a folder of runs."""

import os
import subprocess
import sys

import pytest

from tests.cli.helpers import call
from tests.store import made
from tests.writers.served import fetch, free_port, wait_for


@pytest.mark.slow
def test_the_address_that_is_printed_has_the_tab_with_its_runs(tmp_path):
    """The process becomes TensorBoard: it says where it is, and the tab is loaded and lists the run."""
    made.write(tmp_path / "runs" / "first", made.training(5))
    port = free_port()
    view = subprocess.Popen(
        [sys.executable, "-m", "gradlens", "view", "runs", "--port", str(port)],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        url = f"http://localhost:{port}"
        runs = wait_for(lambda: fetch(f"{url}/data/plugin/gradlens/runs")["runs"], "the tab", 120)
        assert [run["name"] for run in runs] == ["first"]
        assert fetch(f"{url}/data/plugins_listing")["gradlens"]["tab_name"] == "GradLens"
    finally:
        view.terminate()
        _, error = view.communicate(timeout=60)
    assert url in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("nowhere",), "give the one that holds your runs"), (("--port", "70000", "."), "65535"), ((), "LOGDIR")],
)
def test_a_wrong_call_starts_nothing(tmp_path, arguments, words):
    """Exit code 2, and what to give instead."""
    assert words in call("view", *arguments, cwd=tmp_path, code=2).stderr
