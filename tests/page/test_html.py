"""One file, offline, whatever the run is called."""

import json
import re

import pytest

from gradlens.page.html import embedded, render
from gradlens.page.summary import Summary
from gradlens.store.run import open_run
from tests.page.made import trained
from tests.store import made

EVIL = "</script><script>document.title='hit'</script><!--<b>&amp;"


def _page(run):
    return render(Summary.of(open_run(run)))


def test_it_is_one_file_that_fetches_nothing(tmp_path):
    """No reference to another file, a policy that forbids any, and the library's licence."""
    page = _page(trained(tmp_path / "run"))
    assert not re.search(r"""(?:src|srcset)\s*=|@import|url\(|<link|<iframe""", page.replace("img-src", ""))
    assert "default-src 'none'" in page
    assert "The MIT License" in page
    assert "uPlot (v1.6" in page


@pytest.mark.parametrize(("parameters", "steps"), [(10, 600), (1000, 150)])
def test_it_stays_small(tmp_path, parameters, steps):
    """Under 3 MB at 10 and at 1,000 parameters."""
    page = _page(trained(tmp_path / "run", parameters=parameters, steps=steps, stages=("used",)))
    assert len(page.encode()) < 3e6


def test_a_name_is_text(tmp_path):
    """A parameter and a finding that are called like markup do not end the script that holds them."""
    found = [made.finding(1, EVIL, parameter=EVIL)]
    page = _page(trained(tmp_path / "run", names=[EVIL, "plain"], findings=found))
    assert EVIL not in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data)["names"] == [EVIL, "plain"]


def test_what_is_filled_in_is_not_filled_again(tmp_path):
    """A run may be called like a place of the template."""
    assert "%%DATA%%" in _page(trained(tmp_path / "run", names=["%%DATA%%", "b"]))


def test_nothing_of_markup_is_left_in_embedded_json():
    """Not even the separators that end a line in a script."""
    text = embedded({"a": "<\u2028&>"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "<\u2028&>"}
