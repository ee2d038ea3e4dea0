"""The page on the tab says what the code does."""

import math
import re
from pathlib import Path

import pytest

from gradlens.dashboard import maps, plugin, views
from gradlens.store import partials
from gradlens.watching import partials as live

PAGE = (Path(__file__).parents[2] / "docs" / "tensorboard.md").read_text()


def test_the_program_of_the_page_runs(tmp_path, monkeypatch):
    """It keeps a matrix and reads it back."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["found"].step == 50
    assert names["found"].partial.shape == (32, 32)


def steps_kept(count):
    """How many of so many steps are kept while the allowance is not used up."""
    kept, following = 0, 1
    for seen in range(1, count + 1):
        if seen >= following:
            kept, following = kept + 1, max(seen + 1, math.ceil(seen * partials.GROWTH))
    return kept


def test_the_numbers_of_the_page_are_those_of_the_code():
    """Allowances, bounds, and how many steps are kept."""
    assert f"{steps_kept(180)} times in the first 180 steps" in PAGE
    assert steps_kept(100_000) - steps_kept(10_000) == pytest.approx(25, abs=1)
    assert f"take {partials.ALLOWANCE >> 20} MiB at most" in PAGE
    assert live.LEAST == 4
    assert f"more than {views.MAX_SIDE} rows or columns" in PAGE
    assert plugin.AT_ONCE == 4
    assert plugin.SECONDS == 0.5
    assert f"of at most {plugin.MAX_BYTES >> 20} MB of rows" in PAGE
    assert f"matrices take {maps.MAX_BYTES >> 20} MB together" in PAGE
