"""Moments that came together, as arrays, and joined with those that came next."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens.moments import as_moments, together
from tests.analysis.test_blocks import blocked, histories, split


def told(moments):
    """What each of them is, in order."""
    return [
        (int(block.step[at]), int(block.backward[at]), block.stage, block.names, block.columns["square_sum"][at].tolist())
        for block, at in moments
    ]


@given(histories())
@settings(max_examples=30, deadline=None)
def test_arrays_say_what_the_sequence_says(snapshots):
    """Steps, backwards and times by moment; a slice is of the same moments."""
    moments = as_moments(blocked(snapshots))
    assert moments.step.tolist() == [one.step for one in snapshots]
    assert moments.backward.tolist() == [one.backward for one in snapshots]
    assert moments.time.tolist() == [one.time for one in snapshots]
    assert sorted(np.concatenate([own for _, own in moments.by_block()])) == list(range(len(snapshots)))
    assert told(moments[1:3]) == told(moments)[1:3]


@given(histories(), st.lists(st.integers(1, 7), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_parts_that_are_put_together_are_as_if_they_had_come_at_once(snapshots, sizes):
    """The same moments in the same blocks."""
    whole = as_moments(blocked(snapshots))
    joined = together([as_moments(blocked(part)) for part in split(snapshots, sizes)])
    assert told(joined) == told(whole)
    assert joined.number.tolist() == whole.number.tolist()
    assert joined.place.tolist() == whole.place.tolist()
