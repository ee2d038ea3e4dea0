"""Which steps get detail."""

import itertools

from gradlens.statistics.detail import DetailSteps


def test_each_step_at_first_then_as_the_run_grows():
    """Twenty-odd steps in the first hundred, some hundred in a million."""
    detail = DetailSteps()
    steps = [step for step in range(10_000) if detail.of(step)]
    assert steps[:11] == list(range(11))
    assert all(later - earlier <= max(1, 0.11 * (earlier + 1)) + 1 for earlier, later in itertools.pairwise(steps))
    assert len([s for s in steps if s < 100]) < 40
    assert len(steps) < 100


def test_a_step_keeps_its_answer():
    """Its stages are alike, also when those of two steps take turns."""
    detail = DetailSteps()
    answers = {step: detail.of(step) for step in range(50)}
    assert [detail.of(step) for step in (48, 49, 48, 49)] == [answers[step] for step in (48, 49, 48, 49)]
