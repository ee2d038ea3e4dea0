"""The partials of plain functions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens.errors import ArgumentError, ArgumentTypeError, ProbeError
from gradlens.probes.partials import partials

numbers = st.floats(-100, 100, allow_nan=False)
no_clock = settings(deadline=None, max_examples=50)


def found(frame):
    return dict(zip(frame["variable"], frame["partial"], strict=True))


@no_clock
@given(x=numbers, y=numbers)
def test_a_sum_separates_into_its_terms(x, y):
    """The partials of x^2 + 3y are 2x and 3 at any point."""
    assert found(partials(lambda x, y: x**2 + 3 * y, x=x, y=y)) == {"x": 2 * x, "y": 3.0}


@no_clock
@given(x=numbers, y=numbers)
def test_a_product_holds_the_other_factor_fixed(x, y):
    """The partials of x^2 y are 2xy and x^2."""
    expected = {"x": pytest.approx(2 * x * y, rel=1e-14), "y": pytest.approx(x * x, rel=1e-14)}
    assert found(partials(lambda x, y: x**2 * y, x=x, y=y)) == expected


@no_clock
@given(x=numbers, y=numbers)
def test_a_cubic_with_a_mixed_term(x, y):
    """The partials of x^3 + 5xy + y^2 are 3x^2 + 5y and 5x + 2y."""
    expected = {"x": pytest.approx(3 * x * x + 5 * y, rel=1e-12, abs=1e-12), "y": pytest.approx(5 * x + 2 * y, abs=1e-12)}
    assert found(partials(lambda x, y: x**3 + 5 * x * y + y**2, x=x, y=y)) == expected


def test_the_frame_says_value_partial_direction_and_sensitivity():
    """The columns are as promised, and the direction is the one that lowers the function."""
    frame = partials(lambda x, y, z: x**2 - 3 * y + 0 * z, x=2, y=1, z=5)
    assert list(frame.columns) == ["variable", "value", "partial", "direction", "sensitivity"]
    assert list(frame["variable"]) == ["x", "y", "z"]
    assert list(frame["value"]) == [2.0, 1.0, 5.0]
    assert list(frame["partial"]) == [4.0, -3.0, 0.0]
    assert list(frame["direction"]) == ["decrease", "increase", "hold"]
    assert list(frame["sensitivity"]) == [4.0, 3.0, 0.0]
    assert frame.attrs["value"] == 1.0


def test_an_ignored_variable_has_partial_zero():
    """A variable that the function does not use has partial 0 and direction hold."""
    frame = partials(lambda x, y: x * 2, x=1.0, y=7.0)
    assert list(frame["partial"]) == [2.0, 0.0]
    assert list(frame["direction"]) == ["decrease", "hold"]


def test_arguments_that_are_only_positional_are_matched_by_name():
    """A function of (x, y, /) is called by the names of its arguments, in whatever order they are given."""

    def f(x, y, /):
        return x - 10 * y

    assert found(partials(f, y=1, x=2)) == {"y": -10.0, "x": 1.0}


def test_a_variable_may_be_called_f():
    """The function's own place in the call takes no name away from the variables."""
    assert found(partials(lambda f: f**2, f=3.0)) == {"f": 6.0}


def test_a_function_that_takes_any_keyword_gets_all_variables():
    """A **kwargs function works as any other."""
    assert found(partials(lambda **v: v["a"] * v["b"], a=2, b=3)) == {"a": 3.0, "b": 2.0}


def test_variables_are_float64_tensors_of_any_shape():
    """float32, integer and numpy points are computed in float64, and a tensor gives a row for each entry."""
    seen = []

    def f(x, w):
        seen.extend([x.dtype, w.dtype])
        return (w**2).sum() * x

    frame = partials(f, x=np.float32(2), w=torch.tensor([[1, 2]]))
    assert seen == [torch.float64] * 2
    assert found(frame) == {"x": 5.0, "w[0, 0]": 4.0, "w[0, 1]": 8.0}


def test_the_point_is_left_alone():
    """A tensor given as the point gets no gradient and is not changed, even by a function that writes in place."""
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def f(x):
        x *= 3
        return x**2

    assert found(partials(f, x=x)) == {"x": 36.0}
    assert x.grad is None
    assert x.item() == 2.0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(context):
    """Called under no_grad or inference_mode it differentiates all the same."""
    with context():
        assert found(partials(lambda x: x**2, x=3.0)) == {"x": 6.0}


def test_a_partial_that_is_not_finite_is_undefined():
    """Where the derivative is infinite or NaN the direction is undefined, not a guess."""
    frame = partials(lambda x, y: torch.sqrt(x) + y, x=0.0, y=1.0)
    assert frame["partial"][0] == math.inf
    assert list(frame["direction"]) == ["undefined", "decrease"]


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x, y: torch.stack([x, y]), r"2 numbers \(shape \(2,\)\)"),
        (lambda x, y: (x, y), "returned tuple"),
        (lambda x, y: 3, r"returned int \(3\)"),
        (lambda x, y: float(x.detach()) + 1, "not math.sin"),
        (lambda x, y: None, "returned NoneType"),
        (lambda x, y: (x > y).sum(), r"torch.int64, which has no derivative"),
        (lambda x, y: x.detach() * y.detach(), "detach()"),
        (lambda x, y: torch.complex(x, y), "complex128"),
    ],
)
def test_results_without_partials_are_explained(f, message):
    """A result that is not one differentiable number is refused, saying what came and what to return."""
    with pytest.raises(ProbeError, match=message):
        partials(f, x=1.0, y=2.0)


@pytest.mark.parametrize("value", ["2", True, 1j, None, torch.tensor(1j), torch.tensor(True)])
def test_points_that_are_not_real_numbers_are_refused(value):
    """The error names the variable."""
    with pytest.raises(ArgumentTypeError, match="'x'"):
        partials(lambda x: x, x=value)


def test_names_that_are_not_the_functions_are_refused():
    """A misspelt variable is an error that shows the function's own names."""
    with pytest.raises(ArgumentError, match=r"takes \(temperature, humidity\).*did you mean 'temperature'"):
        partials(lambda temperature, humidity: temperature, temperatur=1.0, humidity=2.0)


def test_a_missing_point_or_function_is_refused():
    """Both errors say how to call it."""
    with pytest.raises(ArgumentError, match=r"partials\(f, x=2.0"):
        partials(lambda x: x)
    with pytest.raises(ArgumentTypeError, match="function of the variables"):
        partials(3.0, x=1)
