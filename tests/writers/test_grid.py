"""The table behind the pictures: whatever is put together, the sums are kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens.records import Status
from gradlens.writers import grid as cells
from gradlens.writers.grid import Grid, grouped, joined, sections
from tests.writers.made import snapshot


def at(step, names=("a.weight", "a.bias", "b.weight"), size=1.0, **more):
    """A snapshot whose parameters have 6 weights each: partials of +-size, of which two are negative and one is 0."""
    partials = size * np.array([1.0, 2.0, -2.0, 0.0, 4.0, -1.0])
    gradients = {name: None if name in more.get("absent", ()) else partials * (i + 1) for i, name in enumerate(names)}
    return snapshot(step, "backward", gradients, dict.fromkeys(names, np.ones(6)))


def test_cells_say_what_was_seen():
    """Each cell is the rms and the share to increase of one parameter's partials at one step."""
    grid = Grid()
    for step in range(3):
        grid.add(at(step, size=10.0**step))
    rms = np.sqrt(26 / 6)
    assert grid.labels == ("a.weight", "a.bias", "b.weight")
    np.testing.assert_allclose(cells.rms(grid.sums), rms * np.outer([1, 2, 3], [1, 10, 100]), rtol=1e-12)
    np.testing.assert_array_equal(cells.increase(grid.sums), 2 / 5)
    assert cells.known(grid.sums).all()
    assert not cells.nonfinite(grid.sums).any()


def test_an_absent_parameter_is_unknown_and_a_dead_one_is_zero():
    """Zeros that stand for a gradient that is not there are not counted; those of a gradient that is 0 are."""
    grid = Grid()
    dead = at(0, absent=("a.bias", "b.weight"))
    dead.status[2] = Status.ZERO
    grid.add(dead)
    assert cells.known(grid.sums)[:, 0].tolist() == [True, False, True]
    assert np.isnan(cells.rms(grid.sums)[1, 0])
    assert cells.rms(grid.sums)[2, 0] == 0
    assert np.isnan(cells.increase(grid.sums)[2, 0])


def test_partials_that_are_not_finite_are_counted_apart():
    """NaN and infinity hide no finite partial, and a parameter without a finite one is known all the same."""
    partials = {"a": np.array([np.nan, np.inf, 3.0]), "b": np.full(3, np.nan)}
    grid = Grid()
    grid.add(snapshot(0, "backward", partials, dict.fromkeys(partials, np.ones(3))))
    assert cells.nonfinite(grid.sums)[:, 0].tolist() == [2, 3]
    assert cells.known(grid.sums).all()
    assert cells.rms(grid.sums)[0, 0] == 3.0
    assert np.isnan(cells.rms(grid.sums)[1, 0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=30, unique=True), st.integers(1, 9))
def test_a_small_table_is_a_large_one_put_together(steps, spans):
    """With few columns each holds the sum of the steps that fall into it, and none is lost."""
    steps = sorted(steps)
    small = Grid(max_spans=spans)
    for step in steps:
        small.add(at(step, size=float(step + 1)))
    assert small.spans <= spans
    assert (steps[-1] - small.first) // small.span == small.spans - 1
    squares = np.zeros(small.spans)
    for step in steps:
        squares[(step - steps[0]) // small.span] += 26 * (step + 1.0) ** 2
    np.testing.assert_allclose(small.sums[0, 0], squares, rtol=1e-12)
    assert small.sums[1].sum() == 3 * 6 * len(steps)


def test_spans_are_as_short_as_the_run_allows():
    """A run that fits has a column a step; one that does not, the smallest power of two that makes it fit."""
    grid = Grid(max_spans=10)
    for step in range(5, 26):
        grid.add(at(step))
    assert (grid.first, grid.span, grid.spans) == (5, 4, 6)


def test_steps_before_the_first_are_left_out():
    """A step before the one that the table begins with has no column."""
    grid = Grid()
    grid.add(at(10))
    before = grid.sums.copy()
    grid.add(at(9))
    np.testing.assert_array_equal(grid.sums, before)


def test_new_parameters_take_their_place():
    """A parameter that comes later gets a row where the model has it; the others keep their sums."""
    grid = Grid()
    grid.add(at(0, ("a.weight", "c.weight")))
    grid.add(at(1, ("a.weight", "b.weight", "c.weight")))
    assert grid.labels == ("a.weight", "b.weight", "c.weight")
    squares = grid.sums[0]
    np.testing.assert_array_equal(squares, 26.0 * np.array([[1, 1], [0, 4], [4, 9]]))


def test_rows_that_become_too_many_become_modules():
    """When parameters no longer fit the rows are their modules, and hold the sums of what they had before."""
    grid = Grid(max_rows=4)
    first = ("a.weight", "a.bias", "b.weight", "b.bias")
    grid.add(at(0, first))
    assert grid.labels == first
    grid.add(at(1, (*first, "c.weight", "c.bias")))
    assert grid.labels == ("a", "b", "c")
    assert grid.rows == {"a.weight": 0, "a.bias": 0, "b.weight": 1, "b.bias": 1, "c.weight": 2, "c.bias": 2}
    np.testing.assert_array_equal(grid.sums[0], 26.0 * np.array([[5, 5], [25, 25], [0, 61]]))


@pytest.mark.parametrize(
    ("known", "names", "expected"),
    [
        ("", "abc", "abc"),
        ("ac", "abc", "abc"),
        ("bc", "abc", "abc"),
        ("ab", "abcd", "abcd"),
        ("ab", "xy", "abxy"),
        ("abc", "b", "abc"),
        ("abc", "xbyz", "xabyzc"),
    ],
)
def test_names_are_joined_in_model_order(known, names, expected):
    """A new name stands behind the one that precedes it in the model; if there is none, before or behind them all."""
    assert "".join(joined(known, names)) == expected


names = st.lists(
    st.lists(st.sampled_from(["enc", "dec", "0", "1", "2", "weight"]), min_size=1, max_size=4).map(".".join),
    min_size=1,
    max_size=60,
    unique=True,
)


@settings(deadline=None)
@given(names, st.integers(1, 20))
def test_any_names_fit_into_the_rows(names, most):
    """Every parameter has one row, there are at most as many as allowed, and rows begin in model order."""
    labels, rows = grouped(names, most)
    assert len(labels) <= most
    assert len(rows) == len(names)
    assert list(dict.fromkeys(rows)) == list(range(len(labels)))
    if len(names) <= most:
        assert labels == tuple(names)


def test_rows_are_modules_ever_higher_up():
    """Too many parameters become their modules, too many modules those that hold them, and at last neighbours."""
    parameters = [f"h.{i}.{m}.{p}" for i in range(3) for m in ("attn", "mlp") for p in ("weight", "bias")]
    assert grouped(parameters, 12)[0] == tuple(parameters)
    assert grouped(parameters, 11)[0] == ("h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp", "h.2.attn", "h.2.mlp")
    assert grouped(parameters, 5)[0] == ("h.0", "h.1", "h.2")
    assert grouped(parameters, 2)[0] == ("h",)
    assert grouped([f"p{i}" for i in range(5)], 2) == (("p0 (+2)", "p3 (+1)"), [0, 0, 0, 1, 1])


@settings(deadline=None)
@given(names)
def test_sections_cover_the_rows(names):
    """Sections are neighbouring stretches that cover every row once, in order."""
    stretches = sections(names, some=8, few=3, most=12)
    assert [start for _, start, _ in stretches] == [0, *(stop for _, _, stop in stretches[:-1])]
    assert stretches[-1][2] == len(names)
    assert all(start < stop for _, start, stop in stretches)
    assert len(stretches) <= 12


def test_sections_are_what_a_person_would_name():
    """Of 40 parameters in 20 layers the layers; of few parameters each; of 80 unnested modules each, not one heap."""
    layers = [f"layers.{i}.{p}" for i in range(20) for p in ("weight", "bias")]
    assert [name for name, _, _ in sections(layers)] == [f"layers.{i}" for i in range(20)]
    assert sections(["a.weight", "b"]) == [("a.weight", 0, 1), ("b", 1, 2)]
    flat = [f"{i}.{p}" for i in range(80) for p in ("weight", "bias")]
    assert sections(flat)[:2] == [("0", 0, 2), ("1", 2, 4)]
    assert len(sections(flat)) == 80
