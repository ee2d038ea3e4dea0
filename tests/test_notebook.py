"""The example notebook runs, and the live view in it is replaced in place."""

import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

import gradlens
from gradlens.errors import ArgumentError, GradlensError
from gradlens.notebook import LiveView

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook with its outputs, in a folder of its own."""
    book = nbformat.read(EXAMPLE, as_version=4)
    folder = str(tmp_path_factory.mktemp("notebook"))
    nbclient.NotebookClient(book, timeout=240, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return book


def _html(book, words):
    """The HTML outputs of the cell whose source has these words."""
    (cell,) = [cell for cell in book.cells if cell.cell_type == "code" and words in cell.source]
    return [output["data"]["text/html"] for output in cell.outputs if "text/html" in output.get("data", {})]


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_has(executed):
    """Lens, survey and run as HTML, four pictures, and no error."""
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert any("survey of" in shown for shown in _html(executed, "gradlens.survey"))
    assert any("120 steps, 0 to 119" in shown for shown in _html(executed, "open_run"))


@pytest.mark.slow
def test_the_live_view_ends_with_the_last_step(executed):
    """One output, begun before the first step, that shows the last."""
    (shown,) = _html(executed, "lens.live")
    assert "step 119" in shown
    assert "polyline" in shown


def test_outside_of_a_notebook_a_live_view_says_what_else_there_is():
    """An error that names the ways that work there."""
    case = gradlens.testing.healthy()
    with gradlens.watch(case.model, case.optimizer) as lens:
        with pytest.raises(GradlensError, match=r"print\(lens\)"):
            lens.live()
        with pytest.raises(ArgumentError, match="seconds"):
            LiveView(lens, seconds=0)


def test_no_notebook_is_imported_before_it_is_needed():
    """`import gradlens` and a lens bring no IPython along."""
    code = "import sys, gradlens; gradlens.watch; assert 'IPython' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
