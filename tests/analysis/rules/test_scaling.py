"""Loss scaling that gradlens was not told of, and steps that the scaler skipped."""

import math

import pytest

from gradlens.analysis.rules import ClippedScaled, LossScaled, Skipped
from gradlens.records import Severity, Stage
from tests.analysis.made import asked, last, snapshot


def pair(step, factor, *, used=1.0, **options):
    """Backward's gradients, a factor larger than the used ones, of two parameters of different size."""
    squares = [used**2, (3 * used) ** 2]
    return [
        snapshot(step, square_sum=[square * factor**2 for square in squares], **options),
        snapshot(step, square_sum=squares, stage=Stage.USED, **options),
    ]


def steps(*factors, **options):
    return [one for step, factor in enumerate(factors) for one in pair(step, factor, **options)]


# --- LossScaled -----------------------------------------------------------------------------------------------------


def test_the_same_power_of_two_on_three_steps_is_a_loss_scale():
    """With the factor, and what to pass."""
    said = asked(LossScaled(), *steps(65536, 65536, 65536))
    assert [len(findings) for findings in said] == [0, 0, 0, 0, 0, 1]
    (finding,) = said[-1]
    assert (finding.parameter, finding.value, finding.stage) == (None, 65536.0, Stage.BACKWARD)
    assert "65536 (2**16) times" in finding.seen
    assert "scaler=" in finding.remedy


@pytest.mark.parametrize(("factor", "found"), [(2, False), (4, False), (8, False), (16, True), (32, True)])
def test_small_powers_are_how_people_divide(factor, found):
    """By the number of micro-batches or ranks: only 16 and more is taken for a scale, and the other cause is named."""
    findings = last(LossScaled(), *steps(factor, factor, factor))
    assert bool(findings) is found
    assert all("by hand" in finding.causes[1] for finding in findings)
    assert last(LossScaled(least=2.0), *steps(factor, factor, factor))


@pytest.mark.parametrize("factor", [17, 100, 65000, 1.0, 0.0625])
def test_other_factors_are_clipping(factor):
    """They are not powers of two, or do not make gradients smaller."""
    assert last(LossScaled(), *steps(factor, factor, factor)) == []


def test_the_power_must_be_the_same_on_every_parameter():
    """One that differs shows that something else is at work."""
    both = [
        [snapshot(k, square_sum=[2.0**32, 2.0**30]), snapshot(k, square_sum=[1.0, 1.0], stage=Stage.USED)] for k in range(3)
    ]
    assert last(LossScaled(), *(one for pair in both for one in pair)) == []


def test_a_scale_that_moves_is_found_once_it_rests():
    """Steps that disagree say nothing."""
    said = asked(LossScaled(), *steps(65536, 32768, 32768, 32768))
    assert [len(findings) for findings in said[1::2]] == [0, 0, 0, 1]


def test_every_one_of_the_steps_must_have_been_compared():
    """A step without its backward's gradient leaves too few comparisons."""
    whole = steps(65536, 65536, 65536)
    assert last(LossScaled(), *whole)
    assert last(LossScaled(), *whole[1:]) == []
    assert last(LossScaled(), *whole[:2], *whole[3:]) == []


def test_several_backwards_are_a_sum_and_not_compared():
    """Under accumulation the used gradient is not the last backward's."""
    sums = [
        one
        for k in range(3)
        for one in (snapshot(k, square_sum=2.0**32, backward=1), snapshot(k, square_sum=1.0, stage=Stage.USED, backward=1))
    ]
    assert last(LossScaled(), *sums) == []


def test_a_known_scale_is_none_of_its_business():
    """Values are unscaled then; where the scale is unknown it asks."""
    assert last(LossScaled(), *steps(65536, 65536, 65536, scale=65536.0)) == []
    assert last(LossScaled(), *steps(65536, 65536, 65536, scale=math.nan))


def test_parameters_without_a_gradient_are_not_compared():
    """And where none has one, there is nothing to say."""
    assert last(LossScaled(), *steps(65536, 65536, 65536, status=["ok", "absent"]))
    assert last(LossScaled(), *steps(65536, 65536, 65536, status=["frozen", "absent"])) == []


# --- ClippedScaled --------------------------------------------------------------------------------------------------


def clipped(*norms, scale=65536.0, used=None):
    """Backwards of these norms under a scale, clipped to 1 before they were unscaled: two parameters of the same size."""
    result = []
    for k, norm in enumerate(norms):
        left = 1 / scale if used is None else used
        result.append(snapshot(k, square_sum=norm**2 / 2, scale=scale))
        result.append(snapshot(k, square_sum=left**2 / 2, stage=Stage.USED, scale=scale))
    return result


def test_gradients_that_were_clipped_with_their_scale_are_named():
    """At the third step, with the norm they were clipped to and the call to make."""
    said = asked(ClippedScaled(), *clipped(0.3, 0.5, 0.2))
    assert [len(findings) for findings in said] == [0] * 5 + [1]
    (finding,) = said[-1]
    assert finding.value == pytest.approx(1.0)
    assert "unscale_(optimizer)" in finding.causes[0]
    assert "times the loss scale of 65536 it is 1" in finding.seen


def test_clipping_in_the_right_place_is_well():
    """Unscaled first: the norm itself is 1, and smaller ones are left alone."""
    assert last(ClippedScaled(), *clipped(3.0, 5.0, 20.0, used=1.0)) == []
    assert last(ClippedScaled(), *clipped(1e-5, 1e-5, 1e-5, used=1e-5)) == []


def test_the_norm_that_is_round_is_the_one_that_somebody_clips_at():
    """Under a small scale both are small: 0.05 is what people write, and 51.2 is not; 50 is, and 0.0488 is not."""
    assert last(ClippedScaled(), *clipped(0.3, 0.5, 0.2, scale=1024.0, used=0.05 * (1 - 1e-4))) == []
    (finding,) = last(ClippedScaled(), *clipped(0.3, 0.5, 0.2, scale=1024.0, used=50 / 1024))
    assert finding.value == pytest.approx(50.0)


def test_a_norm_that_varies_was_not_clipped():
    """Nor one under no scale, or under a scale that is not known."""
    first, second = clipped(0.3, 0.3, 0.3), clipped(0.3, 0.3, 0.3, used=2e-5)
    assert last(ClippedScaled(), *first[:4], *second[4:]) == []
    assert last(ClippedScaled(), *clipped(3.0, 3.0, 3.0, scale=1.0, used=1.0)) == []
    assert last(ClippedScaled(), *clipped(3.0, 3.0, 3.0, scale=math.nan, used=1e-5)) == []


# --- Skipped --------------------------------------------------------------------------------------------------------


def step(k, skipped, scale=1024.0):
    return snapshot(k, status=["nonfinite" if skipped else "ok"] * 2, stage=Stage.USED, scale=scale)


def test_a_skipped_step_is_an_info():
    """That is how a scaler finds its scale."""
    (finding,) = last(Skipped(), step(0, False), step(1, True))
    assert finding.severity == Severity.INFO
    assert "scale of 1024; 1 of the last 2 observed steps were skipped, 1 in a row" in finding.seen


@pytest.mark.parametrize(("count", "severity"), [(10, Severity.INFO), (11, Severity.WARNING)])
def test_more_than_a_tenth_of_a_hundred_is_a_warning(count, severity):
    """Counted over the last hundred steps, none of the skipped in a row."""
    skipped = {99 - 2 * k for k in range(count)}
    (finding,) = last(Skipped(), *(step(k, k in skipped) for k in range(100)))
    assert finding.severity == severity
    assert finding.value == count


@pytest.mark.parametrize(("row", "severity"), [(9, Severity.INFO), (10, Severity.ERROR)])
def test_ten_in_a_row_are_an_error(row, severity):
    """No scale helps."""
    (finding,) = last(Skipped(), step(0, False), *(step(k, True) for k in range(1, row + 1)))
    assert finding.severity == severity
    assert f"{row} in a row" in finding.seen


def test_one_of_two_optimizers_may_be_skipped():
    """Finite gradients that are called `nonfinite`, or a parameter that did not move where another did, show it."""
    one = {"status": ["nonfinite", "ok"], "stage": Stage.USED, "scale": 1024.0}
    assert last(Skipped(), snapshot(0, nan=[0, 0], **one))
    assert last(Skipped(), snapshot(0, nan=[1, 0], update_numel=[0, 100], **one))
    assert last(Skipped(), snapshot(0, nan=[1, 0], update_numel=[100, 100], **one)) == []


def test_only_a_scalers_step_is_skipped():
    """A non-finite gradient without a scale was executed, and one finite parameter shows that it was not skipped."""
    assert last(Skipped(), step(0, True, scale=1.0)) == []
    assert last(Skipped(), step(0, True, scale=math.nan)) == []
    assert last(Skipped(), snapshot(0, status=["nonfinite", "ok"], nan=[1, 0], stage=Stage.USED, scale=1024.0)) == []
    assert last(Skipped(), snapshot(0, status=["nonfinite", "frozen"], stage=Stage.USED, scale=1024.0))
    assert last(Skipped(), snapshot(0, status=["nonfinite"] * 2, scale=1024.0)) == []
