"""`gradlens top`: the newest steps of a run, sorted and filtered by keys."""

import io
import os
import pty
import select
import subprocess
import sys
import time

import pytest
from rich.console import Console

from gradlens.cli.top import Screen, look, spark
from gradlens.store.run import open_run
from tests.cli.helpers import call
from tests.page.made import snapshot, trained
from tests.store import made


def test_one_table_where_there_is_no_terminal(tmp_path):
    """The parameters of the last step, and no escape sequence."""
    text = call("top", trained(tmp_path / "run")).stdout
    assert "step 19" in text
    assert "blocks.0.weight" in text
    assert "\x1b" not in text


def test_what_moves_comes_first(tmp_path):
    """The parameter whose gradient has just grown, before the others; other keys sort otherwise."""
    of = made.parameters(["a", "b", "c"], [(4, 4)] * 3)
    records = [snapshot(of, step, "used") for step in range(10)]
    for record in records:
        record.columns["square_sum"][:] = [16.0, 16.0, 1600.0]
    records[-1].columns["square_sum"][1] = 160_000.0
    screen = Screen("x", key="m", wanted="")
    screen.seen = look(open_run(made.write(tmp_path / "run", records)))
    assert screen.lines()[0].name == "b"
    assert screen.lines()[0].trend == pytest.approx(2)
    screen.press("n")
    assert [line.name for line in screen.lines()] == ["a", "b", "c"]
    screen.press("r")
    assert [line.name for line in screen.lines()] == ["b", "c", "a"]


def test_keys_filter_scroll_and_quit(tmp_path):
    """`/` types a filter, Enter ends it, Esc clears it; j and k move; space pauses; q ends."""
    screen = Screen("x", key="n", wanted="")
    screen.seen = look(open_run(trained(tmp_path / "run", parameters=8)))
    for key in ["/", *"bias", "\x7f", "s", "\r"]:
        assert screen.press(key)
    assert [line.name for line in screen.lines()] == [f"blocks.{i}.bias" for i in range(4)]
    screen.press("j")
    assert screen.first == 1
    screen.press("up")
    screen.press("k")
    assert screen.first == 0
    screen.press("escape")
    assert len(screen.lines()) == 8
    screen.press(" ")
    assert "PAUSED" in screen.header()
    assert not screen.press("q")


def test_a_filter_may_have_a_q_in_it(tmp_path):
    """While a filter is typed, keys are letters."""
    screen = Screen("x", key="n", wanted="")
    for key in "/q_proj":
        assert screen.press(key)
    assert screen.wanted == "q_proj"


def test_a_run_without_records_says_so(tmp_path):
    """And is no error."""
    assert "no step was recorded yet" in call("top", made.write(tmp_path / "run", [])).stdout


def test_a_machine_without_unicode_gets_plain_characters(tmp_path):
    """The C locale, as on a bare machine seen over ssh: courses are drawn by ASCII, and no name is an error."""
    run = made.write(tmp_path / "run", made.training(5, of=made.parameters(("w\N{GREEK SMALL LETTER ALPHA}",), ((2,),))))
    done = call("top", run, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert "w?" in done.stdout
    assert done.stdout.isascii()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_number_is_cut_on_a_terminal_of_any_width(tmp_path, width):
    """Of a long name the end is shown; the course of the last steps gives way first."""
    names = [f"transformer.layers.{i}.self_attention.projection.weight" for i in range(2)]
    of = made.parameters(names, [(4, 4)] * 2)
    records = [snapshot(of, step, "used") for step in range(30)]
    for record in records:
        record.columns["square_sum"][:] = 16 * 1.2345e-12**2
    screen = Screen("x", key="n", wanted="")
    screen.seen = look(open_run(made.write(tmp_path / "run", records)))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(screen.render(width))
    lines = console.export_text().splitlines()
    rows = [line for line in lines if "1.23e-12" in line]
    assert len(rows) == 2
    assert all("weight" in row and row.rstrip().endswith("ok") and "x1 " in row for row in rows)
    assert max(map(len, lines)) <= width
    assert ("▁" in rows[0]) == (width >= 100)


def test_a_terminal_that_cannot_move_its_cursor_gets_one_table(tmp_path):
    """With TERM=dumb, as in an editor's shell, one table is printed and the command ends."""
    run = trained(tmp_path / "run")
    pid, terminal = pty.fork()
    if not pid:
        os.environ["TERM"] = "dumb"
        os.execv(sys.executable, [sys.executable, "-m", "gradlens", "top", str(run)])
    text = b""
    try:
        while select.select([terminal], [], [], 60)[0] and (piece := os.read(terminal, 65536)):
            text += piece
    except OSError:
        pass  # Linux says so at the end
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"blocks.0.weight" in text
    assert b"\x1b" not in text


@pytest.mark.parametrize(("values", "picture"), [((1.0, 10.0, 100.0), "▁▅█"), ((0.0, float("nan")), ""), ((1.0, 0.0), "▁ ")])
def test_a_course_is_drawn_as_bars(values, picture):
    """On a logarithmic scale, with gaps."""
    assert spark(values) == picture


def test_it_follows_a_run_that_is_written(tmp_path):
    """On a terminal a new step appears by itself, keys work, and q leaves the terminal as it was."""
    with made.store(tmp_path / "run") as to:
        of = made.parameters(["first", "second"], [(4, 4)] * 2)
        to.write(snapshot(of, 7, "used"))
        to.flush()
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "gradlens", "top", str(tmp_path / "run"), "--interval", "0.2"],
            stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"},
        )  # fmt: skip
        os.close(slave)
        try:
            _shows(master, "step 7")
            to.write(snapshot(of, 8, "used"))
            to.flush()
            _shows(master, "step 8")
            os.write(master, b"/sec\r")
            _shows(master, "filter 'sec'")
            os.write(master, b"q")
            _shows(master, "\x1b[?1049l")
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(master)


def _shows(descriptor, words, seconds=60):
    seen, end = "", time.monotonic() + seconds
    while words not in seen:
        assert time.monotonic() < end, f"{words!r} never came: {seen[-2000:]}"
        if select.select([descriptor], [], [], 0.5)[0]:
            try:
                seen += os.read(descriptor, 65536).decode(errors="replace")
            except OSError:
                break
    assert words in seen
