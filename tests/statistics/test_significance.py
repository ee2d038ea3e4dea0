"""Student's t and the control of false discoveries, against scipy and by their definitions."""

import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gradlens.errors import ArgumentError
from gradlens.statistics.significance import CHUNK, harmonic, p_values, q_values

p_lists = arrays.arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1))
relaxed = settings(deadline=None, max_examples=100)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 15, 31, 63, 255, 1000, 20_000])
def test_p_values_equal_scipys(freedom):
    """Two-sided p values equal scipy's to a relative 1e-10, from t = 0 far into the tail."""
    t = np.concatenate([[0, 1e-12, 1e-3], np.linspace(0.01, 60, 5000), np.geomspace(60, 1e6, 200)])
    expected = 2 * scipy.stats.t.sf(t, freedom)
    found = p_values(torch.from_numpy(t), freedom).numpy()
    kept = expected > 1e-290
    np.testing.assert_allclose(found[kept], expected[kept], rtol=1e-10)
    assert (found[~kept] < 1e-289).all()


@relaxed
@given(t=st.floats(-1e6, 1e6), freedom=st.integers(1, 300))
def test_p_values_at_any_point(t, freedom):
    """The p value depends on |t| alone and equals the incomplete beta function in fifty digits."""
    p = p_values(torch.tensor([t, -t], dtype=torch.float64), freedom)
    assert p[0] == p[1]
    with mpmath.workdps(50):
        x = freedom / (freedom + mpmath.mpf(t) ** 2)
        exact = mpmath.betainc(mpmath.mpf(freedom) / 2, mpmath.mpf(1) / 2, 0, x, regularized=True)
    assert p[0].item() == pytest.approx(float(exact), rel=1e-11, abs=1e-290)


def test_p_values_at_the_ends():
    """t = 0 has p = 1, infinite t has p = 0, NaN stays NaN, and no values are no error."""
    p = p_values(torch.tensor([0.0, math.inf, -math.inf, math.nan, 1e200]), 5)
    assert p[:3].tolist() == [1, 0, 0]
    assert math.isnan(p[3])
    assert p[4] == 0
    assert p_values(torch.empty(0), 5).shape == (0,)


def test_p_values_of_float32_are_computed_in_float64():
    """A narrow t is widened before it is squared."""
    assert p_values(torch.tensor([3.0]), 7).item() == pytest.approx(2 * scipy.stats.t.sf(3, 7), rel=1e-12)


def test_p_values_do_not_depend_on_the_chunks():
    """Values in different chunks get the p values that they have alone."""
    t = torch.linspace(0, 9, CHUNK + 17, dtype=torch.float64)
    whole = p_values(t, 15)
    assert whole.shape == t.shape
    for i in (0, CHUNK - 1, CHUNK, CHUNK + 16):
        assert whole[i].item() == pytest.approx(p_values(t[i : i + 1], 15).item(), rel=1e-13)


@relaxed
@given(p=p_lists, method=st.sampled_from(["bh", "by"]))
def test_q_values_equal_scipys(p, method):
    """Adjusted p values equal scipy's false_discovery_control, ties and extremes included."""
    expected = scipy.stats.false_discovery_control(p, method=method)
    np.testing.assert_allclose(q_values(torch.from_numpy(p), method), expected, rtol=1e-12, atol=1e-300)


@relaxed
@given(p=p_lists, q=st.floats(0.001, 1))
def test_q_values_keep_what_the_step_up_rule_keeps(p, q):
    """q_i <= q picks the tests of Benjamini and Hochberg's rule: all up to the last p_(k) <= q k / m."""
    adjusted = q_values(torch.from_numpy(p)).numpy()
    if np.isclose(adjusted, q, rtol=1e-9).any():
        return  # on the very edge rounding decides
    ordered = np.sort(p)
    passing = np.nonzero(ordered <= q * np.arange(1, len(p) + 1) / len(p))[0]
    threshold = ordered[passing[-1]] if len(passing) else -1
    np.testing.assert_array_equal(adjusted <= q, p <= threshold)


@relaxed
@given(p=p_lists)
def test_by_is_bh_times_the_harmonic_number(p):
    """The safer method multiplies by 1 + 1/2 + ... + 1/m, capped at 1."""
    bh, by = (q_values(torch.from_numpy(p), method).numpy() for method in ("bh", "by"))
    below = by < 1
    np.testing.assert_allclose(by[below], bh[below] * harmonic(len(p)), rtol=1e-12)


@pytest.mark.parametrize("m", [1, 2, 9_999, 10_000, 10_001])
def test_harmonic_numbers(m):
    """The closed form meets the sum."""
    assert harmonic(m) == pytest.approx(math.fsum(1 / i for i in range(1, m + 1)), rel=1e-12)


def test_no_tests_have_no_q_values():
    """An empty list of tests gives an empty answer, and an unknown method names the known ones."""
    assert q_values(torch.empty(0, dtype=torch.float64)).shape == (0,)
    with pytest.raises(ArgumentError, match="'bh', 'by'"):
        q_values(torch.ones(1), "holm")


def test_false_discoveries_are_controlled_among_independent_tests():
    """Over many draws with 90 % true nulls the share of wrong ones among the kept is q times the share of nulls."""
    random = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        x = random.normal(size=(1000, 8))
        x[:100] += 2
        t = torch.from_numpy(x.mean(1) / (x.std(1, ddof=1) / math.sqrt(8)))
        kept = (q_values(p_values(t, 7)) <= 0.1).numpy()
        shares.append(kept[100:].sum() / max(kept.sum(), 1))
    assert np.mean(shares) == pytest.approx(0.09, abs=0.015)
