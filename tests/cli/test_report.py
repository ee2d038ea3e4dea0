"""`gradlens report`: text, JSON, exit codes, and runs that are not there."""

import json
import os
import pty
import subprocess
import sys

import pytest

from gradlens.records import Finding, Severity
from tests.cli.helpers import call
from tests.store import made


@pytest.fixture
def run(tmp_path):
    """A run with one warning."""
    return made.write(tmp_path / "runs" / "first", [*made.training(5), made.finding(3, "exploding")])


def test_the_page_is_text_in_a_pipe(run):
    """It has the run, its findings and no escape sequence."""
    text = call("report", run).stdout
    assert "5 steps, 0 to 4" in text
    assert "exploding" in text
    assert "\x1b" not in text


def test_json_is_for_programs(run):
    """It parses, has no NaN, and says the same."""
    content = json.loads(call("report", run, "--json").stdout, parse_constant=lambda word: pytest.fail(word))
    assert content["steps"] == {"count": 5, "first": 0, "last": 4}
    assert [finding["rule"] for finding in content["findings"]] == ["exploding"]
    assert {entry["parameter"] for entry in content["parameters"]} == set(made.NAMES)
    assert content["loss"]["last"]["step"] == 4
    assert content["worst"] == "warning"


@pytest.mark.parametrize(("level", "code"), [("warning", 1), ("error", 0)])
def test_the_exit_code_is_for_ci(run, level, code):
    """--fail-on exits with 1 where a finding is as severe, after printing the page."""
    assert "exploding" in call("report", run, "--fail-on", level, code=code).stdout


def test_a_run_that_is_not_there_is_named_with_its_neighbour(run):
    """A typing error in the path exits with 2 and suggests the run; its folder names the runs in it."""
    error = call("report", "runs/frist", cwd=run.parent.parent, code=2).stderr
    assert "did you mean 'runs/first'" in error
    assert "Traceback" not in error
    assert "it holds runs: runs/first" in call("report", "runs", cwd=run.parent.parent, code=2).stderr


def test_a_damaged_run_is_an_error_that_names_the_file(run):
    """Exit code 2, no traceback."""
    (run / "run.json").write_text("{")
    error = call("report", run, code=2).stderr
    assert "run.json" in error
    assert "Traceback" not in error


def test_a_run_without_records_says_so(tmp_path):
    """A training that was stopped before its first backward."""
    run = made.write(tmp_path / "empty", [])
    assert "Nothing was captured yet" in call("report", run).stdout
    assert json.loads(call("report", run, "--json").stdout)["steps"] is None


def _on_a_terminal(*arguments, env):
    """What a terminal shows."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "gradlens", *map(str, arguments)],
        stdout=slave,
        stderr=slave,
        stdin=slave,
        env={**os.environ, "TERM": "xterm-256color", **env},
    )
    os.close(slave)
    output = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        output += part
    process.wait(60)
    os.close(master)
    return output.decode()


def test_colours_are_for_terminals_and_no_color_is_heard(run):
    """A terminal gets escape sequences, with NO_COLOR none that colours; the words are the same."""
    bright, plain = (_on_a_terminal("report", run, env=env) for env in ({}, {"NO_COLOR": "1"}))
    assert "\x1b[1;33m" in bright or "\x1b[33" in bright
    assert "\x1b[3" not in plain
    assert "exploding" in plain


def test_a_pipe_that_closes_is_no_error(run):
    """`gradlens report RUN | head -1` ends without a traceback."""
    command = f"{sys.executable} -m gradlens report {run} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert done.stdout.count("\n") == 1


def test_an_error_outranks_a_warning(tmp_path):
    """--fail-on warning also fails on an error."""
    finding = Finding(rule="nonfinite", step=1, severity=Severity.ERROR, seen="NaN")
    call("report", made.write(tmp_path / "r", [*made.training(2), finding]), "--fail-on", "warning", code=1)


@pytest.mark.parametrize(
    "command", [("report",), ("report", "--json"), ("report", "--html", "-"), ("top", "--once"), ("finish",)]
)
def test_a_run_is_read_without_what_takes_long_to_import(run, command):
    """Neither torch nor pandas, nor Arrow's table of functions: a command answers in half a second only without them."""
    code = (
        "import sys; sys.argv = ['gradlens', *sys.argv[1:]]\n"
        "from gradlens.cli.app import app; app(standalone_mode=False)\n"
        "heavy = {'torch', 'pandas', 'pyarrow.compute', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, command[0], str(run), *command[1:]], check=True, stdout=subprocess.DEVNULL)
