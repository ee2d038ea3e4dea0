"""How often a sign was the same, and what that says."""

import math

import pytest

from gradlens.analysis.agreement import NOT_SURE, Agreement, sign_test


@pytest.mark.parametrize(
    ("same", "kept", "p"),
    [
        (0, 0, 1.0), (1, 1, 1.0), (5, 5, 2 / 32), (8, 8, 2 / 256), (9, 9, 2 / 512), (8, 9, 20 / 512), (1, 9, 20 / 512),
        (8, 10, 112 / 1024), (9, 10, 22 / 1024), (5, 10, 1.0), (0, 8, 2 / 256),
    ],
)  # fmt: skip
def test_the_sign_test_is_exact(same, kept, p):
    """Two-sided: the share of all 2^n outcomes that are as uneven as this one."""
    assert sign_test(same, kept) == pytest.approx(p, rel=1e-12)


def test_of_many_steps_the_tail_is_the_sum_of_its_binomials():
    """To nine digits, far out as well."""
    for same, kept in ((540, 1000), (700, 1000), (5200, 10_000)):
        exact = 2 * sum(math.comb(kept, heads) for heads in range(same, kept + 1)) / 2**kept
        assert sign_test(same, kept) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(
    ("same", "kept", "said"),
    [(9, 9, True), (8, 8, True), (7, 7, False), (8, 9, True), (8, 10, False), (9, 10, True), (8, 40, False), (0, 0, False)],
)
def test_a_verdict_needs_eight_steps_and_the_test(same, kept, said):
    """7 of 7 are too few though p is 0.016, 8 of 10 have p 0.11, and 8 of 40 are evidence of the other direction."""
    for direction in ("increase", "decrease"):
        assert Agreement(same, kept).verdict(direction) == (direction if said else NOT_SURE)
    assert Agreement(same, kept).verdict("hold") == Agreement(same, kept).verdict("undefined") == NOT_SURE


def test_it_is_said_in_words():
    """With the right number."""
    assert str(Agreement(9, 9)) == "same sign on 9 of 9 kept steps"
    assert str(Agreement(1, 1)) == "same sign on 1 of 1 kept step"


def test_the_sign_is_the_one_that_the_partial_has_now():
    """What counts is how often it was above 0 where it is above 0, and below where it is below; 0 and NaN have no sign."""
    assert [Agreement.of((3, 9), partial) for partial in (0.1, -0.1, 0.0, math.nan, math.inf)] == [
        Agreement(3, 12),
        Agreement(9, 12),
        Agreement(0, 12),
        Agreement(0, 12),
        Agreement(3, 12),
    ]
