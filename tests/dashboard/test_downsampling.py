"""Lines and matrices of many steps, made small: whatever is extreme stays."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gradlens.dashboard.downsampling import (
    MISSING,
    NONFINITE,
    NOTHING,
    SEEN,
    Cells,
    encoded,
    kept,
    largest_of_squares,
    width_for,
)

BUSY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # other tests share the machine
VALUES = st.sampled_from([0.0, -1.0, 1.0, 1e-30, 1e30, 3.5, np.nan, np.inf, -np.inf])


@st.composite
def lines(draw):
    """Rising steps with gaps, and some lines over them."""
    count = draw(st.integers(1, 120))
    steps = np.cumsum(draw(arrays(np.int64, count, elements=st.integers(0, 50))))
    return steps, draw(st.lists(arrays(np.float64, count, elements=VALUES), min_size=1, max_size=3))


@BUSY
@given(lines(), st.integers(1, 40))
def test_no_spike_vanishes_from_a_line(drawn, columns):
    """The drawn points have the lowest and highest value of each line in each column, and a gap where there is one."""
    steps, several = drawn
    at = kept(steps, several, columns)
    assert (np.diff(at) > 0).all()
    assert at[0] == 0
    assert at[-1] == len(steps) - 1
    assert len(at) <= max(2 * columns, 3 * len(several) * columns + 2)
    column = (steps - steps[0]) * columns // (steps[-1] - steps[0] + 1)
    for line in several:
        for each in np.unique(column):
            all_of, drawn_of = line[column == each], line[at][column[at] == each]
            assert np.fmin.reduce(drawn_of) == np.fmin.reduce(all_of) or np.isnan(all_of).all()
            assert np.fmax.reduce(drawn_of) == np.fmax.reduce(all_of) or np.isnan(all_of).all()
            assert np.isnan(drawn_of).any() == np.isnan(all_of).any()


def test_few_points_stay_as_they_are():
    """A short line is drawn point by point."""
    assert kept(np.arange(10), [np.arange(10.0)], 5).tolist() == list(range(10))
    assert kept(np.arange(0), [np.arange(0.0)], 5).tolist() == []


ROWS = 3


@st.composite
def points(draw, top=400):
    """Values of some rows at some steps, in any order."""
    count = draw(st.integers(0, 40))

    def drawn(each, dtype):
        return np.array(draw(st.lists(each, min_size=count, max_size=count)), dtype)

    return (
        drawn(st.integers(0, ROWS - 1), np.int64),
        drawn(st.integers(0, top), np.int64),
        drawn(VALUES, np.float64),
        drawn(st.sampled_from([SEEN, SEEN | NONFINITE, SEEN | MISSING]), np.uint8),
    )


WIDTHS = st.sampled_from([1, 2, 4, 64])


def same(a, b):
    """Whether two matrices say the same of each step."""
    assert a.width == b.width
    first, stop = min(a.first, b.first), max(a.stop, b.stop)
    if not a.shape[1] or not b.shape[1]:
        assert not a.flags.any()
        assert not b.flags.any()
        return
    for name in ("low", "high", "flags"):
        np.testing.assert_array_equal(getattr(a._spread(first, stop), name), getattr(b._spread(first, stop), name))


@BUSY
@given(points(), WIDTHS)
def test_a_matrix_has_the_extremes_of_each_cell(drawn, width):
    """Each cell holds the lowest and highest finite value of its steps, and the flags of all of them."""
    row, step, value, flag = drawn
    cells = Cells.of(ROWS, row, step, value, flag, width)
    for r in range(ROWS):
        for column in range(cells.shape[1]):
            of = (row == r) & (step // width == cells.first + column)
            finite = value[of & np.isfinite(value)].astype(np.float32)
            assert cells.flags[r, column] == np.bitwise_or.reduce(flag[of], initial=0)
            if len(finite):
                assert cells.low[r, column] == finite.min()
                assert cells.high[r, column] == finite.max()
            else:
                assert np.isnan(cells.low[r, column])
                assert np.isnan(cells.high[r, column])


@BUSY
@given(points(), points(), points(), WIDTHS)
def test_merging_is_that_of_all_rows_in_any_order(a, b, c, width):
    """A matrix of rows that were read in pieces is that of all; merging is associative and commutes."""
    one, two, three = (Cells.of(ROWS, *each, width) for each in (a, b, c))
    together = Cells.of(ROWS, *(np.concatenate(each) for each in zip(a, b, c, strict=True)), width)
    same(one.merge(two).merge(three), together)
    same(one.merge(two.merge(three)), together)
    same(three.merge(one).merge(two), together)
    same(one.merge(Cells.empty(ROWS, width)), one)


@BUSY
@given(points(), WIDTHS, st.integers(0, 3))
def test_a_coarser_matrix_is_that_of_wider_columns(drawn, width, times):
    """Joining neighbours gives what wider columns would have given at once."""
    wide = width << times
    same(Cells.of(ROWS, *drawn, width).coarser(wide), Cells.of(ROWS, *drawn, wide))


@BUSY
@given(points(), st.integers(1, 8))
def test_a_bounded_matrix_keeps_each_rows_extremes(drawn, columns):
    """However coarse, a row's lowest and highest value are there, and no more columns than asked."""
    row, _, value, _ = drawn
    cells = Cells.of(ROWS, *drawn, 1).within(columns)
    assert cells.shape[1] <= columns
    for r in range(ROWS):
        finite = value[(row == r) & np.isfinite(value)].astype(np.float32)
        if len(finite):
            assert np.nanmin(cells.low[r]) == finite.min()
            assert np.nanmax(cells.high[r]) == finite.max()


@pytest.mark.parametrize("spike", [1e4, 1e-9, 0.0])
@pytest.mark.parametrize("log", [True, False])
def test_a_spike_of_one_step_is_what_its_cell_shows(spike, log):
    """One step in 100,000 that leaves the row's usual range, up or down, is the number shown."""
    step = np.arange(100_000)
    value = 10.0 ** np.random.default_rng(0).uniform(-3, -2, len(step))
    value[73_421] = spike
    cells = Cells.of(1, np.zeros_like(step), step, value, np.full(len(step), SEEN), 1).within(300)
    shown = cells.codes(log=log)[0]
    at = 73_421 // cells.width - cells.first
    if log or spike > 1:
        assert shown[at] == encoded(np.array([spike], np.float32), log=log)[0]
    assert shown.shape == (cells.shape[1],)
    if log:
        assert abs(int(shown[at]) - int(np.median(shown))) > 1000


@BUSY
@given(points(), WIDTHS, st.booleans())
def test_a_cell_shows_its_lowest_or_highest_value(drawn, width, log):
    """Whichever is farther from the middle of its row; nothing where there is no finite value."""
    cells = Cells.of(ROWS, *drawn, width)
    low, high, shown = encoded(cells.low, log=log), encoded(cells.high, log=log), cells.codes(log=log)
    assert ((shown == low) | (shown == high)).all()
    assert ((shown == NOTHING) == np.isnan(cells.low)).all()
    for r in range(ROWS if cells.shape[1] else 0):
        both = np.concatenate([low[r], high[r]])
        there = np.sort(both[both != NOTHING]).astype(int)
        if len(there):
            middle = there[(len(there) - 1) // 2]
            far = np.maximum(abs(low[r].astype(int) - middle), abs(high[r].astype(int) - middle))
            assert (abs(shown[r].astype(int) - middle)[shown[r] != NOTHING] == far[shown[r] != NOTHING]).all()


@BUSY
@given(st.integers(1, 10**7), st.integers(1, 2000))
def test_the_width_is_the_smallest_that_suffices(steps, columns):
    """A power of two, of which so many cover the steps, and half of which do not."""
    width = width_for(steps, columns)
    assert width & (width - 1) == 0
    assert width * columns >= steps
    assert width == 1 or width // 2 * columns < steps


@BUSY
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.data())
def test_a_small_matrix_keeps_the_largest_weight(rows, columns, most, data):
    """No more rows and columns than asked, each place the largest of its neighbours, so the largest of all stays."""
    values = data.draw(arrays(np.float64, (rows, columns), elements=VALUES))
    index, side = largest_of_squares(values, most)
    assert max(index.shape) <= most or side == 1
    assert index.shape == (-(-rows // side), -(-columns // side))
    size = np.where(np.isfinite(values), np.abs(values), np.inf)
    for r in range(index.shape[0]):
        for c in range(index.shape[1]):
            square = size[r * side : (r + 1) * side, c * side : (c + 1) * side]
            assert size.ravel()[index[r, c]] == square.max()
            assert index[r, c] // columns // side == r
            assert index[r, c] % columns // side == c
