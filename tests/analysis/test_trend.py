"""What the loss of a whole run did, however long it is."""

import time

import numpy as np
import pytest

from gradlens.analysis.trend import State, judged


def _falling(points):
    """A loss that falls to a tenth over the first half, and scatters."""
    share = np.minimum(np.arange(points) / (points / 2), 1.0)
    return 10.0 ** (1 - share) * (1 + 0.02 * np.random.default_rng(0).standard_normal(points))


def test_a_long_loss_is_judged_as_a_short_one_of_the_same_shape():
    """A million points, and a thousand: the same state, and flat from the same share of the run on."""
    short, long = (judged(np.arange(n), _falling(n)) for n in (1000, 1_000_003))
    assert short.state == long.state == State.FALLS
    assert long.flat_since == pytest.approx(short.flat_since, abs=0.03)


def test_a_million_points_are_judged_at_once():
    """In less processor time than a page may take to open; smoothed point by point it would be some ten seconds."""
    values = _falling(1_000_000)
    before = time.process_time()
    judged(np.arange(len(values)), values)
    assert time.process_time() - before < 1
