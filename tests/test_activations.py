"""Sums of what modules make: they add up to those of all entries, whatever is added first."""

import math

import numpy as np
import pytest

from gradlens.activations import SUMS, added, measured

RANDOM = np.random.default_rng(0)


def row(made):
    """The sums of a batch `[rows, units]`, from their words."""
    deviation = (
        np.sqrt(np.square(made / np.abs(made).max() - (made / np.abs(made).max()).mean(0)).sum()) * np.abs(made).max()
    )
    return [made.size, 0, np.linalg.norm(made), deviation, made.shape[1], (made == 0).all(0).sum(), math.nan]


@pytest.mark.parametrize("size", [1.0, 1e-200, 1e200])
def test_sums_add_up_to_those_of_all_entries(size):
    """The size of the whole, the spread of the parts: at any size that float64 holds."""
    batches = [RANDOM.normal(size=(n, 3)) for n in (4, 2, 7)]
    total = added(np.array([row(batch) for batch in batches]) * [1, 1, size, size, 1, 1, 1], np.zeros(3, int), 1)
    columns = measured(np.array([3]), dict(zip(SUMS, total.T, strict=True)))
    whole = np.concatenate(batches)
    within = sum(np.square(batch - batch.mean(0)).sum() for batch in batches)
    assert columns["rms"][0] == pytest.approx(size * np.sqrt(np.square(whole).mean()), rel=1e-12)
    assert columns["spread"][0] == pytest.approx(math.sqrt(within / np.square(whole).sum()), rel=1e-12)
    assert columns["entries"][0] == whole.size


def test_addition_is_associative_and_has_an_identity():
    """Rows of several places, in any order; nothing adds nothing."""
    rows = np.array([row(RANDOM.normal(size=(5, 2))) for _ in range(6)])
    place = np.array([0, 1, 0, 2, 1, 0])
    at_once = added(rows, place, 4)
    twice = added(np.concatenate([added(rows[:3], place[:3], 4), added(rows[3:], place[3:], 4)]), np.tile(range(4), 2), 4)
    np.testing.assert_allclose(at_once, twice, rtol=1e-12)
    assert not at_once[3].any()


def test_what_is_not_known_stays_so():
    """A deviation that means nothing in one call means nothing in all, and costs no other column."""
    rows = np.array([row(RANDOM.normal(size=(5, 2))), row(RANDOM.normal(size=(5, 2)))])
    rows[1, SUMS.index("deviation")] = math.nan
    total = added(rows, np.zeros(2, int), 1)[0]
    assert math.isnan(total[SUMS.index("deviation")])
    assert math.isfinite(total[SUMS.index("norm")])
