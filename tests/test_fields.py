"""Columns: their formulas, how they merge, how they unscale."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens import fields


def row(values):
    """The stored columns of one gradient, by numpy."""
    g = np.asarray(values, np.float64)
    ok = g[np.isfinite(g)]
    nonzero = np.abs(ok[ok != 0])
    columns = fields.empty(1)
    given = {
        "numel": g.size,
        "positive": (ok > 0).sum(),
        "negative": (ok < 0).sum(),
        "zero": (ok == 0).sum(),
        "nan": np.isnan(g).sum(),
        "inf": np.isinf(g).sum(),
        "sum": ok.sum(),
        "abs_sum": np.abs(ok).sum(),
        "square_sum": (ok**2).sum(),
        "min": ok.min(initial=np.inf) if ok.size else np.nan,
        "max": ok.max(initial=-np.inf) if ok.size else np.nan,
        "abs_max": np.abs(ok).max() if ok.size else np.nan,
        "abs_min_nonzero": nonzero.min() if nonzero.size else np.nan,
    }
    for name, value in given.items():
        columns[name][0] = value
    return columns


numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3)) | st.sampled_from(
    [0.0, math.nan, math.inf, -math.inf]
)
lists = st.lists(numbers, max_size=30)


def same(a, b):
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-12, atol=1e-9, err_msg=name)


@settings(max_examples=100, deadline=None)
@given(lists, lists, lists)
def test_merging_rows_is_the_row_of_the_concatenation(a, b, c):
    """Rows of pieces merge to the row of the whole, in any grouping; the row of nothing is the identity."""
    whole = row(a + b + c)
    same(fields.merge([fields.merge([row(a), row(b)]), row(c)]), whole)
    same(fields.merge([row(a), fields.merge([row(b), row(c)])]), whole)
    same(fields.merge([row(a), row([])]), row(a))
    stacked = {name: np.concatenate([row(x)[name] for x in (a, b, c)]) for name in whole}
    same(fields.pool(stacked), whole)


@settings(max_examples=100, deadline=None)
@given(lists, st.sampled_from([0.5, 2.0, 1024.0, 3.0]))
def test_unscaling_is_the_row_of_the_divided_gradient(values, scale):
    """The row of g / s is what unscale makes of the row of g."""
    unscaled = fields.unscale(row(values), np.array([scale]))
    same(unscaled, row(np.asarray(values, np.float64) / scale))


def test_an_unknown_scale_leaves_the_numbers_alone():
    """NaN for the scale means that nobody knows: nothing is divided."""
    same(fields.unscale(row([1.0, -2.0]), np.array([np.nan])), row([1.0, -2.0]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3)), min_size=1, max_size=30))
def test_derived_columns_are_their_definitions(values):
    """Mean, standard deviation, norms and shares as numpy computes them."""
    columns, g = row(values), np.asarray(values)
    expected = {
        "mean": g.mean(),
        "rms": np.sqrt((g**2).mean()),
        "l1": np.abs(g).sum(),
        "l2": np.sqrt((g**2).sum()),
        "increase_share": (g < 0).mean(),
        "decrease_share": (g > 0).mean(),
        "hold_share": (g == 0).mean(),
    }
    for name, value in expected.items():
        assert fields.derive(name, columns)[0] == pytest.approx(value, rel=1e-9, abs=1e-9), name
    assert fields.derive("std", columns)[0] == pytest.approx(g.std(), rel=1e-4, abs=1e-4 * max(np.abs(g).max(), 1))


def test_shares_are_of_all_entries():
    """increase, decrease, hold and what is not finite add up to one; of nothing finite they are empty."""
    columns = row([1.0, -1.0, -2.0, 0.0, math.nan])
    shares = [fields.derive(f"{word}_share", columns)[0] for word in ("increase", "decrease", "hold")]
    assert shares == [0.4, 0.2, 0.2]
    assert sum(shares) + (columns["nan"] + columns["inf"])[0] / columns["numel"][0] == pytest.approx(1.0)
    assert math.isnan(fields.derive("increase_share", row([math.nan]))[0])


def histogram_of(values):
    g = np.asarray(values, np.float64)
    result = np.zeros((1, 2 * fields.BUCKETS), np.int64)
    for x in g[g != 0]:
        e = min(max(math.frexp(abs(x))[1] - 1, fields.EXPONENT_MIN), fields.EXPONENT_MAX) - fields.EXPONENT_MIN
        result[0, e + (fields.BUCKETS if x > 0 else 0)] += 1
    return result


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 4)), min_size=1, max_size=60))
def test_quantiles_are_within_a_factor_of_two(values):
    """A quantile from the histogram lies in the bucket of the exact one, and has its sign."""
    columns, g = row(values), np.sort(np.asarray(values))
    for name, value in fields.quantiles(histogram_of(values), columns).items():
        exact = g[math.floor(fields.QUANTILES[name] * (len(g) - 1))]
        if exact == 0:
            assert value[0] == 0
        else:
            assert 0.499 <= value[0] / exact <= 2.001, (name, value[0], exact)


def test_powers_bracket_the_buckets():
    """One more than buckets, rising; what lies on a bound is in the bucket above it, of either sign."""
    assert len(fields.POWERS) == fields.BUCKETS + 1
    assert (np.diff(fields.POWERS) > 0).all()
    for bucket, (low, high) in enumerate(pairwise(fields.POWERS)):
        inside = histogram_of([low, np.nextafter(high, 0), -low, -np.nextafter(high, 0)])
        assert np.flatnonzero(inside).tolist() == [bucket, bucket + fields.BUCKETS]
        assert inside[0, [bucket, bucket + fields.BUCKETS]].tolist() == [2, 2]


@given(st.lists(st.floats(1e-6, 1e6), max_size=20), st.integers(-10, 10))
@settings(max_examples=50, deadline=None)
def test_shifting_a_histogram_is_the_histogram_of_the_divided(values, exponent):
    """Dividing by a power of two moves every count by so many buckets."""
    moved = fields.shift(histogram_of(values), exponent)
    assert (moved == histogram_of(np.asarray(values) / 2.0**exponent)).all()


def test_the_layout_of_a_row_has_no_gap_and_no_overlap():
    """Scalars, quantiles, top and histogram follow each other and fill the width; light rows end before it."""
    parts = (fields.QUANTILE, fields.TOP_PARTIAL, fields.TOP_INDEX, fields.TOP_VALUE, fields.HISTOGRAM)
    at = len(fields.SUMMARY)
    for part in parts:
        assert part.start == at
        at = part.stop
    assert at == fields.WIDTH
    assert fields.HISTOGRAM.start == fields.LIGHT_WIDTH


def test_every_column_has_one_name_and_a_meaning():
    """No name is defined twice, and each says what it means."""
    names = [*fields.KEYS, *(f.name for f in fields.SCALARS), *(f.name for f in fields.DERIVED), *fields.QUANTILES]
    assert len(names) == len(set(names))
    assert all(fields.meaning(name) for name in fields.VALUES)


@pytest.mark.filterwarnings("error")
def test_sums_of_both_infinities_are_nan_and_no_warning():
    """Two pieces of a gradient that overflowed either way; what is empty in both stays empty."""
    column = np.array([np.inf, np.nan, 1.0]), np.array([-np.inf, np.nan, np.nan])
    merged = fields.merge([{"sum": piece} for piece in column])["sum"]
    np.testing.assert_array_equal(merged, [np.nan, np.nan, 1.0])
    assert np.isnan(fields.pool({"sum": np.array([np.inf, -np.inf])})["sum"]).all()
