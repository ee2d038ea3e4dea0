"""The examples run as they stand, and show what they promise."""

from pathlib import Path

import pytest

from tests.forks import forked

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *args, cwd):
    """What an example prints, in a directory of its own."""
    return forked(EXAMPLES / name, *args, cwd=cwd, code=0, env={"COLUMNS": "120"}).stdout


def test_every_example_is_tested():
    """No example is left out here."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"digits.py", "greenhouse.py", "partial_derivatives.py"}


def test_partial_derivatives(tmp_path):
    """The worked examples give what calculus gives by hand."""
    text = run("partial_derivatives.py", cwd=tmp_path)
    assert "the gradient: [12.0, 31.0] in the order ['x', 'y']" in text
    assert text.count("increase") >= 3


def test_greenhouse(tmp_path):
    """The greenhouse ends near its ideal, and says which way each dial should turn."""
    text = run("greenhouse.py", cwd=tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("step")]
    assert len(lines) == 6
    assert "(increase)" in lines[0]
    assert "(decrease)" in lines[0]
    first, last = (float(line.rsplit(" ", 1)[1]) for line in (lines[0], lines[-1]))
    assert last < first / 100


@pytest.mark.slow
def test_digits(tmp_path):
    """The demo trains, reports, writes its run, names the dashboard's command, and can be run again at once."""
    for _ in range(2):
        text = run("digits.py", "--run", "runs/digits", "--epochs", "2", cwd=tmp_path)
        assert "unseen digits are recognised" in text
        assert "fc1.weight" in text
        assert "--logdir runs" in text
    assert list((tmp_path / "runs" / "digits").glob("events.out.tfevents.*"))
    import gradlens

    history = gradlens.open_run(tmp_path / "runs" / "digits").history()
    assert sorted(history["step"].unique()) == list(range(60))
