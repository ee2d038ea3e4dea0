"""Bars: on a terminal, in a notebook, and nowhere else."""

import io
import subprocess
import sys

import nbclient
import nbformat
import pytest

from gradlens.progress import tracked


def test_no_terminal_no_bar(monkeypatch):
    """The items come, and nothing is written."""
    error = io.StringIO()
    monkeypatch.setattr(sys, "stderr", error)
    assert list(tracked(range(5), "counting", 5, None)) == list(range(5))
    assert error.getvalue() == ""


def test_a_bar_can_be_asked_for():
    """`progress=True` shows one also where there is no terminal."""
    code = "from gradlens.progress import tracked; assert list(tracked(range(5), 'counting', 5, True)) == [0, 1, 2, 3, 4]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "counting" in done.stderr


@pytest.mark.slow
def test_in_a_notebook_the_bar_is_one_output():
    """HTML that is replaced in place, and ends with the count; `progress=False` shows none."""
    book = nbformat.v4.new_notebook()
    code = "import time\nfrom gradlens.progress import tracked\n"
    code += "for i in tracked(range(7), 'count<ing', 7, {}): time.sleep(0.05)"
    book.cells = [nbformat.v4.new_code_cell(code.format(None)), nbformat.v4.new_code_cell(code.format(False))]
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    (shown,) = book.cells[0].outputs
    assert 'value="7"' in shown["data"]["text/html"]
    assert "count&lt;ing: 7 of 7" in shown["data"]["text/html"]
    assert book.cells[1].outputs == []
