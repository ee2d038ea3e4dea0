"""Moving the weights as the verdicts say changes the loss as predicted."""

import pandas as pd
import pytest
import torch
from torch import nn

from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.probes.nudge import nudge
from gradlens.probes.survey import survey

from .helpers import trace
from .test_survey import batches, loss, net


def linear(v, b):
    """A loss without curvature: the partials are the batch."""
    return (v["w"] * b).sum()


def made(k=12, shift=2.0, n=6):
    random = torch.Generator().manual_seed(1)
    return [torch.randn(n, dtype=torch.float64, generator=random) + shift for _ in range(k)]


def test_without_curvature_the_prediction_is_exact():
    """On the surveyed batches a loss that is linear changes by exactly what the partials predict."""
    weights = {"w": torch.zeros(6, dtype=torch.float64, requires_grad=True)}
    found = survey(weights, linear, made())
    assert found.coverage > 0
    result = nudge(weights, linear, found, made(), size=0.5)
    assert result.predicted == pytest.approx(found.expected_change * 0.5 / 1e-4, rel=1e-12)
    assert result.actual == pytest.approx(result.predicted, rel=1e-12)
    assert result.moved == (found.results.verdict != 0).sum()
    assert list(result.frame.columns) == ["size", "before", "after", "change"]
    assert result.noise == pytest.approx(result.frame["change"].std() / 12**0.5, rel=1e-9)


def test_a_model_goes_down_as_predicted_and_is_left_alone():
    """Moving a whole network's verdicts lowers its loss by the prediction, to a few percent, without a trace."""
    model, given = net(), batches(32)
    found = survey(model, loss, given)
    before = trace(model)
    result = nudge(model, loss, found, given, size=1e-3)
    assert trace(model) == before
    assert result.predicted < 0
    assert abs(result.actual - result.predicted) < 0.1 * abs(result.predicted) + 2 * result.noise
    held_out = nudge(model, loss, found, batches(32, seed=9), size=1e-3)
    assert held_out.predicted == result.predicted
    assert held_out.actual < 0


def test_the_same_random_numbers_are_drawn_on_both_sides():
    """With dropout and no verdict to move by, the change is exactly 0 in every batch."""
    model, given = net(), batches(8)
    found = survey(model, loss, given, 1e-9)
    assert found.coverage == 0
    result = nudge(model, loss, found, given)
    assert (result.frame["change"] == 0).all()
    assert result.moved == 0
    assert result.frame["before"].nunique() == 8


def test_against_the_verdicts_the_loss_goes_up():
    """A negative size moves the other way."""
    weights = {"w": torch.zeros(6, dtype=torch.float64, requires_grad=True)}
    result = nudge(weights, linear, survey(weights, linear, made()), made(), size=-0.1)
    assert result.actual > 0
    assert result.actual == pytest.approx(result.predicted, rel=1e-12)


def test_a_part_of_the_frame_moves_only_that_part():
    """A filtered frame is as good as the survey, and moves its rows alone."""
    model, given = net(), batches(16)
    found = survey(model, loss, given)
    whole, framed = (nudge(model, loss, verdicts, given) for verdicts in (found, found.frame))
    assert framed.predicted == pytest.approx(whole.predicted, rel=1e-12)
    assert framed.frame.equals(whole.frame)
    part = found.frame.query("parameter == 'last.bias' and verdict != 'undecided'")
    assert 0 < len(part) < found.coverage * len(found)
    assert nudge(model, loss, part, given).moved == len(part)


def test_a_sampled_survey_moves_its_sample():
    """Weights that were not surveyed stay."""
    weights = {"w": torch.zeros(40, dtype=torch.float64, requires_grad=True)}
    given = made(n=40, shift=3)
    found = survey(weights, linear, given, sample=10)
    result = nudge(weights, linear, found, given)
    assert result.moved == 10
    assert result.actual == pytest.approx(found.expected_change, rel=1e-9)


def test_unequal_batches_are_weighted_as_in_the_survey():
    """The mean change over batches of unequal size is that over all examples."""
    model, x = nn.Linear(3, 1).double(), torch.randn(256, 3, dtype=torch.float64)
    mean = lambda m, b: m(b).mean()  # noqa: E731
    parts = [part for big in x.split(32) for part in big.split([4, 28])]
    found = survey(model, mean, parts, 0.5)
    result = nudge(model, mean, found, parts, size=0.01)
    assert list(result.frame["size"][:2]) == [4, 28]
    assert result.actual == pytest.approx(result.predicted, rel=1e-9)


def test_moves_that_the_storage_swallows_are_counted():
    """In bfloat16 a move of 1e-4 is lost on weights near 1, and the text says so."""
    weights = {"w": torch.ones(6, dtype=torch.bfloat16, requires_grad=True)}
    given = [b.bfloat16() for b in made(shift=9)]
    result = nudge(weights, lambda v, b: (v["w"].float() * b.float()).sum(), survey(weights, linear, given), given)
    assert result.rounded_away == result.moved == 6
    assert result.actual == 0
    assert "6 did not move" in str(result)


def test_rounding_that_hides_the_change_is_said():
    """A change below the rounding of a float32 loss asks for a larger size."""
    weights = {"w": torch.zeros(6, requires_grad=True)}
    given = [b.float() for b in made()]
    big = lambda v, b: (v["w"] * b).sum() + 1e6  # noqa: E731
    result = nudge(weights, big, survey(weights, big, given), given, size=1e-6)
    assert result.rounding > 0.01
    assert result.noise >= result.rounding
    assert "take a larger size" in str(result)
    assert "predicted change of the loss" in str(result)


def test_verdicts_that_do_not_fit_are_explained():
    """Verdicts of another model, unknown words and wrong objects are named."""
    model, given = net(), batches(8)
    found = survey(model, loss, given)
    frame = found.frame.head(3)
    with pytest.raises(ArgumentError, match=r"'unused', which this model does not have"):
        nudge(nn.Linear(2, 1), lambda m, b: m(b), found, [])
    with pytest.raises(ArgumentError, match=r"for shape \(6,\), and the model has \(5,\)"):
        nudge({"w": torch.ones(5)}, linear, survey({"w": torch.ones(6)}, linear, made()), made())
    with pytest.raises(ArgumentError, match="not 'up'"):
        nudge(model, loss, frame.assign(verdict="up"), given)
    with pytest.raises(ArgumentError, match="outside of its shape"):
        nudge(model, loss, frame.assign(index=[(9, 9)] * 3), given)
    with pytest.raises(ArgumentTypeError, match="parameter, index, verdict, partial"):
        nudge(model, loss, [1, 2], given)
    with pytest.raises(ArgumentError, match="size is how far"):
        nudge(model, loss, found, given, size=0)
    with pytest.raises(ArgumentError, match="at least one batch"):
        nudge(model, loss, found, [])


def test_the_first_line_says_whether_it_came_true():
    """As predicted, hardly at all, the other way, or too small to tell: each in its words."""
    weights = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)}
    batches = [torch.ones(1, dtype=torch.float64)] * 3
    frame = pd.DataFrame(
        {"parameter": "w", "index": [(0,), (1,)], "verdict": ["decrease", "increase"], "partial": [2.0, -4.0]}
    )
    loss = lambda v, b: v["w"].square().sum() * b.sum()  # noqa: E731
    told = lambda frame, size=1e-3: str(nudge(weights, loss, frame, batches, size)).splitlines()[0]  # noqa: E731
    assert "as the partials predict" in told(frame)
    assert "hardly changed" in told(frame.assign(partial=frame["partial"] * 1e3))
    assert "OTHER way" in told(frame, size=10.0)
    assert "less than predicted" in told(frame.assign(partial=frame["partial"] * 4))
    assert "nothing was predicted" in told(frame.assign(verdict="undecided"))
    wrapped = frame.assign(parameter="module.w")
    assert "as the partials predict" in told(wrapped)


def test_a_batch_whose_loss_is_not_finite_is_named():
    """The first line says that nothing can be said, and of which batch."""
    weights = {"w": torch.zeros(6, dtype=torch.float64, requires_grad=True)}
    found = survey(weights, linear, made())
    result = nudge(weights, linear, found, [*made(), torch.full((6,), torch.inf)], size=0.5)
    assert result.spoiled == (12,)
    assert str(result).startswith("nothing can be said: the loss of batch 12 was not finite")
    assert nudge(weights, linear, found, made()).spoiled == ()


def test_parts_of_one_batch_get_a_note_where_the_loss_fails():
    """`(x, y)` of one shape may be two batches; if the loss cannot take them, its error says what to give."""
    given = (torch.ones(8, 3), torch.ones(8, 3))
    found = survey(net(), loss, batches(8))
    for probe in (lambda b: survey(net(), loss, b), lambda b: nudge(net(), loss, found, b)):
        with pytest.raises(ValueError, match="unpack") as caught:
            probe(given)
        assert any("(x, y)" in note for note in caught.value.__notes__)
