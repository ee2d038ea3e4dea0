"""The numbers of a page are those of the run, thinned and coded."""

import base64
import json

import numpy as np
import pytest

from gradlens.page import data
from gradlens.page.summary import Summary
from gradlens.store.run import open_run
from tests.page.made import trained
from tests.store import made


def _content(run):
    return data.collect(Summary.of(open_run(run)))


def _logs(text, columns):
    """The inverse of `data.logs`, as the page's script has it."""
    codes = np.frombuffer(base64.b64decode(text), "<u2").reshape(-1, columns).astype(float)
    values = 10 ** (data.LOW + (codes - 2) / 65533 * (data.HIGH - data.LOW))
    return np.where(codes == 0, np.nan, np.where(codes == 1, 0, values))


def _shares(text, columns):
    codes = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, columns).astype(float)
    return np.where(codes == 0, np.nan, (codes - 1) / 254 * 2 - 1)


def test_sizes_are_right_to_a_fraction_of_a_percent():
    """From 1e-45 to 1e39, and zero and no number are told apart."""
    values = np.concatenate([[0.0, np.nan, np.inf, -1.0], 10 ** np.linspace(-45, 39, 500)])[None]
    back = _logs(data.logs(values), values.shape[1])
    assert back[0, 0] == 0
    assert np.isnan(back[0, 1:4]).all()
    np.testing.assert_allclose(back[0, 4:], values[0, 4:], rtol=0.0016)


def test_shares_are_right_to_half_a_percent():
    """Between -1 and 1; what is none stays none."""
    values = np.array([[-1.0, 1.0, 0.0, 0.3333, np.nan]])
    back = _shares(data.shares(values), 5)
    np.testing.assert_allclose(back, values, atol=0.004)


def test_the_matrices_are_what_the_run_answers(tmp_path):
    """Each cell is the number of that parameter at that step, of the last stage."""
    content = _content(trained(tmp_path / "run", parameters=6, steps=9))
    history = open_run(tmp_path / "run").history(stage="used")
    assert content["stage"] == "used"
    assert content["steps"] == list(range(9))
    for name, inverse in (("rms", _logs), ("update_ratio", _logs), ("cosine", _shares)):
        table = history.pivot(index="parameter", columns="step", values=name).loc[content["names"]]
        got = inverse(content["matrices"][name], 9)
        np.testing.assert_allclose(got, table, rtol=0.002, atol=0.004)
    np.testing.assert_allclose(_shares(content["matrices"]["balance"], 9), 5 / 16, atol=0.004)


def test_a_long_run_is_thinned_with_its_ends(tmp_path):
    """A matrix has a bounded number of steps, the first and the last among them."""
    steps = data.MOST + 50
    content = _content(trained(tmp_path / "run", parameters=2, steps=steps, stages=("used",)))
    assert len(content["steps"]) == data.MOST
    assert (content["steps"][0], content["steps"][-1], content["count"]) == (0, steps - 1, steps)


def test_no_peak_of_the_loss_is_lost():
    """Thinning keeps the highest and the lowest of each stretch, and both ends."""
    losses = dict.fromkeys(range(20_000), 1.0)
    losses[7777], losses[13_001] = 50.0, -3.0
    thin = data.thinned(losses)
    assert len(thin["steps"]) <= data.POINTS + 2
    assert (thin["steps"][0], thin["steps"][-1]) == (0, 19_999)
    found = dict(zip(thin["steps"], thin["values"], strict=True))
    assert (found[7777], found[13_001]) == (50.0, -3.0)


def test_weights_are_the_most_sensitive_ones(tmp_path):
    """As `run.weights(top=)` says, with the steps that had the same sign of those that kept the weight, and a verdict."""
    content = _content(trained(tmp_path / "run", parameters=4, steps=12))
    frame = open_run(tmp_path / "run").weights(top=5)
    assert [each["partial"] for each in content["weights"][:5]] == pytest.approx(frame["partial"].tolist())
    assert all(each["direction"] == "increase" for each in content["weights"])
    assert {(each["agree"], each["kept"], each["verdict"]) for each in content["weights"]} == {(12, 12, "increase")}
    assert content["weights"][0]["agreement"] == "same sign on 12 of 12 kept steps"
    assert "two-sided sign test" in content["verdicts"]
    assert "no independent sample" in content["verdicts"]


def test_seven_steps_are_too_few_for_a_verdict(tmp_path):
    """Though all agree."""
    content = _content(trained(tmp_path / "run", parameters=2, steps=7))
    assert {(each["agree"], each["kept"], each["verdict"]) for each in content["weights"]} == {(7, 7, "not sure")}


def test_findings_with_the_same_advice_are_one(tmp_path):
    """Worst first, with all their parameters."""
    found = [made.finding(3, "flat", parameter="a"), made.finding(5, "flat", parameter="b"), made.finding(1, "other")]
    content = _content(trained(tmp_path / "run", findings=found))
    assert [(each["rule"], each["where"], each["step"]) for each in content["findings"]] == [
        ("other", [], 1),
        ("flat", ["a", "b"], 3),
    ]


def test_hostile_numbers_are_json(tmp_path):
    """NaN and infinity become null; JSON without them can be written."""
    content = _content(made.write(tmp_path / "run", made.training(6)))
    json.dumps(content, allow_nan=False)


def test_an_empty_run_has_an_empty_page(tmp_path):
    """Nothing is assumed to be there."""
    content = _content(made.write(tmp_path / "run", []))
    assert (content["steps"], content["table"], content["weights"], content["loss"]["steps"]) == ([], [], [], [])


def test_the_origin_comes_first_and_what_follows_from_it_is_marked(tmp_path):
    """The order of the diagnosis, not of the steps: an early finding that a later one explains stands below it."""
    early = made.finding(2, "vanishing", parameter="a")
    late = made.finding(9, "fading", causes=("sigmoid in a deep stack",))
    content = _content(trained(tmp_path / "run", findings=[early, late]))
    summary = Summary.of(open_run(tmp_path / "run"))
    origin, follows = summary.diagnosis.origin, summary.diagnosis.follows
    assert (origin, list(follows)) == (late, [early])
    told = [(each["rule"], each["origin"], each["follows"]) for each in content["findings"]]
    assert told == [("fading", True, False), ("vanishing", False, True)]
