"""`gradlens compare`."""

import json

from tests.cli.helpers import call
from tests.page.made import trained


def test_two_runs_are_compared_in_the_terminal_as_json_and_as_a_page(tmp_path):
    """All three name the parameter that parts."""
    a, b = trained(tmp_path / "a"), trained(tmp_path / "b", scale=50.0)
    assert "VERDICT: the runs part at step 0" in call("compare", a, b).stdout
    content = json.loads(call("compare", a, b, "--json", "--html", tmp_path / "c.html").stdout)
    assert content["first_difference"] == 0
    assert "compared" in (tmp_path / "c.html").read_text()


def test_a_run_that_is_not_there_is_an_error(tmp_path):
    """With exit code 2."""
    assert "is not there" in call("compare", trained(tmp_path / "a"), tmp_path / "b", code=2).stderr
