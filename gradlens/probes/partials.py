"""The partial derivatives of a plain function at a point.

    df/dx (a) = lim (f(a + h e_x) - f(a)) / h,  h -> 0

The partial of x answers: with every other variable held fixed, if x is raised a little, does f go up or down, and how
fast? Below 0, raising x lowers f, so x should *increase* to lower f; above 0 it should *decrease*; at 0, *hold*.
Computed by reverse-mode differentiation in float64: exact up to rounding, no step size.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradlens.errors import ArgumentError, ArgumentTypeError, ProbeError, nearest
from gradlens.records import directions
from gradlens.weight_names import label

if TYPE_CHECKING:
    import pandas as pd


def partials(f: Callable[..., Tensor], /, **at: float | Tensor) -> pd.DataFrame:
    """The partials of `f` at the point `at`: columns `variable, value, partial, direction, sensitivity`.

    `f` gets one float64 tensor a variable, by the names given here, and returns one real number as a tensor made with
    tensor operations. A variable may be a number or a tensor; each entry of a tensor is a row (`x[0]`, `x[1]`, ...).
    A variable that `f` ignores has partial 0. `frame.attrs["value"]` is f at the point.

    Raises `ArgumentTypeError` for a point that is not made of real numbers, `ArgumentError` when the names are not those
    of `f`'s arguments, `ProbeError` when the result is not one differentiable number.

    >>> partials(lambda x, y: x**2 + 3 * y, x=2, y=1)[["variable", "partial", "direction"]]
      variable  partial direction
    0        x      4.0  decrease
    1        y      3.0  decrease
    """
    if not callable(f):
        raise ArgumentTypeError(f"partials takes a function of the variables, not {type(f).__name__}")
    if not at:
        raise ArgumentError("partials needs the point: give each variable a value, as in partials(f, x=2.0, y=3.0)")
    leaves = {name: _leaf(name, value) for name, value in at.items()}
    with torch.inference_mode(False), torch.enable_grad():
        # Clones, so that f may change its arguments in place.
        result = _call(f, {name: leaf.clone() for name, leaf in leaves.items()})
        value = _differentiable(result, leaves)
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    frame = _frame(leaves, found)
    frame.attrs["value"] = value.item()
    return frame


def _leaf(name: str, value: object) -> Tensor:
    if isinstance(value, np.ndarray | np.generic):
        value = torch.as_tensor(value)
    if isinstance(value, bool) or not isinstance(value, Tensor | numbers.Real):
        raise ArgumentTypeError(f"variable {name!r} must be a real number or a tensor of them, not {value!r}")
    if isinstance(value, Tensor) and (value.is_complex() or value.dtype == torch.bool):
        raise ArgumentTypeError(f"variable {name!r} must be real, not a tensor of {value.dtype}")
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64, copy=True).requires_grad_()
    return torch.tensor(float(value), dtype=torch.float64, requires_grad=True)


def _call(f: Callable[..., Any], variables: Mapping[str, Tensor]) -> Any:
    """Call by keyword; arguments that `f` only takes by position are matched by their names."""
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):  # a builtin that does not tell
        return f(**variables)
    given = dict(variables)
    only = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_ONLY]
    positional = [given.pop(name) for name in only if name in given]
    try:
        signature.bind(*positional, **given)
    except TypeError as error:
        takes = [p.name for p in signature.parameters.values()]
        unknown = [name for name in variables if name not in takes]
        hint = nearest(unknown[0], takes) if unknown and takes else ""
        raise ArgumentError(
            f"the point names {', '.join(variables)}, but the function takes ({', '.join(takes)}): {error}{hint}"
        ) from None
    return f(*positional, **given)


def _differentiable(result: object, leaves: Mapping[str, Tensor]) -> Tensor:
    """The result, if it is one real number that can be differentiated."""
    if not isinstance(result, Tensor):
        raise ProbeError(
            f"the function returned {type(result).__name__} ({result!r:.60}), and a partial derivative needs a tensor: "
            f"compute with the tensors it is given and with torch.* (torch.sin, not math.sin), without float() or .item()"
        )
    if result.numel() != 1:
        raise ProbeError(
            f"the function returned {result.numel()} numbers (shape {tuple(result.shape)}), and partials are those of one: "
            f"return result.sum(), or take the partials of one entry at a time"
        )
    if not result.dtype.is_floating_point:
        raise ProbeError(
            f"the function returned {result.dtype}, which has no derivative: comparisons, rounding to integers, argmax and "
            f"counting cut the way back to {', '.join(leaves)}"
        )
    if not result.requires_grad:
        raise ProbeError(
            f"the result does not depend on any of {', '.join(leaves)} in a way that can be differentiated: it was computed "
            f"without them, or cut off by detach(), .item(), .data or torch.no_grad()"
        )
    return result.reshape(())


def _frame(leaves: Mapping[str, Tensor], found: tuple[Tensor, ...]) -> pd.DataFrame:
    import pandas as pd

    labels = [label for name, leaf in leaves.items() for label in entries(name, tuple(leaf.shape))]
    value = torch.cat([leaf.detach().reshape(-1).cpu() for leaf in leaves.values()]).numpy()
    partial = torch.cat([g.detach().reshape(-1).cpu() for g in found]).numpy()
    return pd.DataFrame(
        {
            "variable": pd.Series(labels, dtype="str"),
            "value": value,
            "partial": partial,
            "direction": pd.Series(directions(partial), dtype="str"),
            "sensitivity": np.abs(partial),
        }
    )


def entries(name: str, shape: tuple[int, ...]) -> list[str]:
    """The names of a tensor's entries in row-major order: `x`, or `x[0, 1]`."""
    return [name] if not shape else [label(name, index) for index in np.ndindex(shape)]
