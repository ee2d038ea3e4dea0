"""When to look."""

import pytest

from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.schedules import Growing, as_schedule, every, log_spaced, next_grown


def test_every_n():
    """Step 0 and each n-th."""
    assert [s for s in range(10) if every(4)(s)] == [0, 4, 8]
    assert as_schedule(4) == every(4)


def test_log_spaced_thins_out_evenly_on_a_log_scale():
    """As many steps from 100 to 1,000 as from 1,000 to 10,000, and all the first ones."""
    due = [s for s in range(10_001) if log_spaced(10)(s)]
    assert due[:4] == [0, 1, 2, 3]
    assert sum(100 < s <= 1000 for s in due) == sum(1000 < s <= 10_000 for s in due) == 10
    assert {10, 100, 1000, 10_000} <= set(due)


def test_what_is_due_as_a_count_grows():
    """Each of the first eleven, then when the count is a tenth more; what is asked for out of turn counts as due."""
    growing = Growing()
    due = [n for n in range(1, 30) if growing.due()]
    assert due == [*range(1, 12), 13, 15, 17, 19, 21, 24, 27]
    assert (growing.count, growing.next) == (29, 30)
    growing = Growing(growth=2.0)
    assert [growing.due(always=n == 5) for n in range(1, 11)] == [n in (1, 2, 4, 5, 10) for n in range(1, 11)]
    assert [next_grown(n, 1.2, 10) for n in (0, 10, 100)] == [10, 20, 120]


@pytest.mark.parametrize("growth", [1.0, 1.1, 1.5])
def test_what_is_due_next_is_known_before_it_is_counted(growth):
    """And to ask does not count."""
    growing = Growing(growth)
    for _ in range(100):
        announced = growing.next_is_due
        assert announced == growing.next_is_due == growing.due()


@pytest.mark.parametrize("make", [lambda: every(0), lambda: log_spaced(0)])
def test_numbers_that_make_no_schedule(make):
    """Zero is refused, with the reason."""
    with pytest.raises(ArgumentError, match="at least 1"):
        make()


@pytest.mark.parametrize("given", ["often", None, 1.5, True])
def test_what_is_no_schedule(given):
    """Anything but an int or a callable is refused."""
    with pytest.raises(ArgumentTypeError, match="schedule"):
        as_schedule(given)


def test_a_callable_is_its_own_schedule():
    """A function is taken as it is."""
    assert as_schedule(bool) is bool
