"""Two runs side by side."""

import json

import numpy as np
import pytest

from gradlens.errors import ArgumentError
from gradlens.page.comparison import Comparison
from gradlens.page.html import render_comparison
from gradlens.page.summary import Summary
from gradlens.store.run import open_run
from tests.page.made import snapshot, trained
from tests.store import made

OF = made.parameters(["a.weight", "b.weight"], [(4, 4), (4, 4)])


def _run(path, sizes, *, of=OF, settings=None, findings=()):
    """A run whose gradients have these sizes, [steps, parameters]."""
    records = []
    for step, row in enumerate(sizes):
        record = snapshot(of, step, "used")
        record.columns["square_sum"][:] = 16 * np.asarray(row, float) ** 2
        records.append(record)
    return made.write(path, [*records, *findings], settings=settings or {})


def _compared(a, b):
    return Comparison.of(Summary.of(open_run(a)), Summary.of(open_run(b)))


def _noise(steps, seed, scatter=0.1):
    """Sizes around 1 that scatter by a tenth of a decade."""
    return 10 ** (scatter * np.random.default_rng(seed).standard_normal((steps, 2)))


def test_a_run_is_the_same_as_itself(tmp_path):
    """No difference, no parting, and said."""
    run = _run(tmp_path / "a", _noise(40, 0))
    found = _compared(run, run)
    assert found.first_difference is None
    assert found.partings == []
    assert "the same at all 40" in found.verdict()


def test_they_part_where_one_leaves_the_scatter(tmp_path):
    """The first step and the parameter, though both runs scatter from the start."""
    mine, theirs = _noise(80, 0), _noise(80, 1)
    theirs[50:, 1] *= 100
    found = _compared(_run(tmp_path / "a", mine), _run(tmp_path / "b", theirs))
    assert found.first_difference == 0
    assert [parting.parameter for parting in found.partings] == ["b.weight"]
    assert 46 <= found.partings[0].step <= 50
    assert found.ranking[0]["parameter"] == "b.weight"
    assert found.ranking[0]["rms"] == pytest.approx(100, rel=0.5)
    assert "b.weight" in found.verdict()


def test_another_seed_parts_nothing(tmp_path):
    """Twenty pairs of runs that differ by their noise alone, in 40 parameters: none parts."""
    of = made.parameters([f"p{i}" for i in range(2)], [(4, 4)] * 2)
    for seed in range(20):
        a = _run(tmp_path / f"a{seed}", _noise(60, seed), of=of)
        b = _run(tmp_path / f"b{seed}", _noise(60, 1000 + seed), of=of)
        assert _compared(a, b).partings == []


def test_one_odd_batch_parts_nothing(tmp_path):
    """A single step a hundred times as large, in a run that is else the same."""
    theirs = _noise(40, 0)
    theirs[20] *= 100
    found = _compared(_run(tmp_path / "a", _noise(40, 0)), _run(tmp_path / "b", theirs))
    assert found.first_difference == 20
    assert found.partings == []
    assert "nowhere by more than they scatter" in found.verdict()


def test_settings_that_differ_are_named(tmp_path):
    """Nested ones by their place; what is the same is left out, and so is what watching cost."""
    mine = {"optimizers": [{"type": "Adam", "groups": [{"lr": 0.1}]}], "schedule": "every(1)", "overhead": "1 %"}
    theirs = {"optimizers": [{"type": "Adam", "groups": [{"lr": 0.2}]}], "schedule": "every(1)", "overhead": "2 %"}
    a, b = (_run(tmp_path / name, _noise(5, 0), settings=told) for name, told in (("a", mine), ("b", theirs)))
    assert _compared(a, b).settings == [("optimizers.0.groups.0.lr", "0.1", "0.2")]


def test_parameters_of_one_alone_are_named(tmp_path):
    """One that only A has, and one whose shape differs."""
    other = made.parameters(["a.weight", "c.weight"], [(4, 4), (4, 4)])
    found = _compared(_run(tmp_path / "a", _noise(5, 0)), _run(tmp_path / "b", _noise(5, 0), of=other))
    assert found.unshared == (["b.weight"], ["c.weight"])
    assert "ONLY IN A: b.weight" in found.text()


def test_findings_of_one_alone_are_named(tmp_path):
    """By their rules."""
    a = _run(tmp_path / "a", _noise(5, 0), findings=[made.finding(1, "exploding")])
    assert "FOUND ONLY IN A: exploding" in _compared(a, _run(tmp_path / "b", _noise(5, 0))).text()


def test_runs_without_anything_in_common_are_refused(tmp_path):
    """The error says what is missing."""
    a = _run(tmp_path / "a", _noise(5, 0))
    with pytest.raises(ArgumentError, match="no step"):
        _compared(a, made.write(tmp_path / "b", []))
    with pytest.raises(ArgumentError, match="no parameter"):
        _compared(a, trained(tmp_path / "c"))


def test_json_and_html_hold_the_same(tmp_path):
    """Strict JSON; a page that fetches nothing."""
    theirs = _noise(30, 0)
    theirs[10:, 0] *= 50
    found = _compared(_run(tmp_path / "a", _noise(30, 0)), _run(tmp_path / "b", theirs))
    content = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert content["partings"][0]["parameter"] == "a.weight"
    page = render_comparison(found)
    assert "default-src 'none'" in page
    assert "a.weight" in page
