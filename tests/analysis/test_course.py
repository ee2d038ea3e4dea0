"""The course of a run: the same however it came, and known as it was at each moment."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens.analysis import course as module
from gradlens.analysis.history import History
from gradlens.blocks import block_of
from gradlens.facts import Modes
from tests.analysis.made import snapshot
from tests.analysis.test_blocks import blocked, histories, split

NAMES = ["loss", "loss_0", "loss_1", "norm", "norm_0", "norm_1", "weight", "ratio", "cosine"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few points and few facts, so that both are thinned."""
    monkeypatch.setattr(module, "CAPACITY", 8)
    monkeypatch.setattr(module, "LEAST", 3)
    monkeypatch.setattr("gradlens.analysis.history.MAX_FACTS", 4)


def shown(history):
    """All that a course says, and the facts."""
    course = history.course
    return [
        course.seen,
        course.steps,
        len(course),
        *(np.stack(course.series(name)).tolist() for name in NAMES),
        history.facts,
    ]


@settings(max_examples=60, deadline=None)
@given(histories(most=60, losses=True), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from([1000, 7]))
def test_a_course_is_known_as_it_was(snapshots, sizes, maxlen):
    """At each moment of a block it says what a course that had just taken that moment said, after points have left too."""
    facts = [Modes(place, training=True) for place in range(len(snapshots))]
    singly, expected = History(maxlen=maxlen), []
    for one, fact in zip(snapshots, facts, strict=True):
        singly.note(fact)
        singly.append(one)
        expected.append(shown(singly))
    history, at = History(maxlen=maxlen), 0
    for part in split(snapshots, sizes):
        history.extend(blocked(part), [(i, facts[at + i]) for i in range(len(part))])
        for moment in history.moments()[-len(part) :]:
            np.testing.assert_equal(shown(history.until(moment)), expected[moment.seq])
        history.trim()
        np.testing.assert_equal(shown(history), expected[at + len(part) - 1])
        at += len(part)


def test_points_are_steps_and_stay_few():
    """A long run has at most `CAPACITY` points, evenly spread, and each is a step that happened."""
    history = History(maxlen=5)
    for step in range(1000):
        history.append(snapshot(step, stage="used", loss=float(step)))
    steps, losses = history.course.series("loss")
    assert 4 <= len(steps) <= 8
    assert steps.tolist() == losses.tolist() == [128 * i for i in range(8)]
    assert history.course.seen == 1000


def test_the_loss_of_a_step_is_the_mean_over_its_backwards():
    """Of the first four; the loss of what was used stands in where no backward was read."""
    history = History()
    for backward, loss in enumerate([1.0, 2.0, 6.0]):
        history.append(snapshot(0, backward=backward, loss=loss))
    history.append(snapshot(0, stage="used", loss=100.0))
    history.append(snapshot(1, stage="used", loss=7.0))
    assert history.course.losses() == {0: 3.0, 1: 7.0}
    assert history.course.series("loss_1")[1].tolist() == [2.0]


def test_a_loss_that_is_not_a_number_is_a_point():
    """And no gap: a rule must see that the loss has gone."""
    history = History()
    history.append(snapshot(0, loss=math.nan))
    history.append(snapshot(1))
    steps, losses = history.course.series("loss")
    assert steps.tolist() == [0]
    assert np.isnan(losses).all()


def test_moments_of_steps_that_are_over_count_where_the_step_has_a_point():
    """What an optimizer did late belongs to its step; a step that was never seen in order is left out."""
    history = History()
    for step in (0, 2):
        history.append(snapshot(step, loss=1.0))
    history.extend([(block_of(snapshot(0, stage="used", weight_square_sum=4.0)), 0)])
    history.extend([(block_of(snapshot(1, stage="used", weight_square_sum=9.0)), 0)])
    steps, _ = history.course.series("weight")
    assert steps.tolist() == [0]
    assert history.course.seen == 2
