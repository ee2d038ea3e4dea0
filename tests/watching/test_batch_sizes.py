"""The examples of each backward of a step, as `observe(batch_size=)` is told them."""

import pytest

from gradlens.watching.batch_sizes import BatchSizes


def test_equal_sizes_stay_a_whole_number():
    """However many there are."""
    sizes = BatchSizes()
    assert [sizes.add(3, 32) for _ in range(3)] == [32, 32, 32]


def test_unequal_sizes_of_a_step_are_their_harmonic_mean():
    """Of those of this step alone."""
    sizes = BatchSizes()
    sizes.add(0, 1000)
    assert sizes.add(1, 30) == 30
    assert sizes.add(1, 2) == pytest.approx(2 / (1 / 30 + 1 / 2))
    assert sizes.add(2, 8) == 8


@pytest.mark.parametrize("size", [None, "many"])
def test_what_is_no_number_is_given_back_and_counts_for_nothing(size):
    """The caller says what is wrong with it."""
    sizes = BatchSizes()
    sizes.add(0, 16)
    assert sizes.add(0, size) is size
    assert sizes.add(0, 16) == 16


def test_a_size_that_cannot_be_is_passed_on():
    """No mean is taken with 0 examples."""
    sizes = BatchSizes()
    sizes.add(0, 16)
    assert sizes.add(0, 0) == 0
