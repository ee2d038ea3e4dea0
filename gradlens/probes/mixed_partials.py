"""Mixed partials: how the partial by one weight changes when another weight moves.

    H_ij = d/dw_i (dL/dw_j) = d/dw_j (dL/dw_i)

The two are equal wherever the second derivatives are continuous (Schwarz). A gradient whose mixed partials differ is the
gradient of no function: some backward in it is wrong. That shows only if H is what the *gradient* does when weights move
(`check_symmetry`, in `symmetry.py`). `mixed_partials` differentiates the backward's formula again, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from gradlens.errors import ArgumentError, nearest
from gradlens.probes import second_order
from gradlens.probes.interrupts import leaves_no_trace
from gradlens.probes.isolated_loss import IsolatedLoss
from gradlens.probes.loss import Target
from gradlens.records import Parameters
from gradlens.weight_names import is_index, label, parse_weight

if TYPE_CHECKING:
    import pandas as pd

Weight = str | tuple[str, Any]
MOST = 1_000  #: weights of one block: a backward pass and a row for each


@leaves_no_trace
def mixed_partials(
    target: Target, loss_fn: Callable[[Any], Tensor], weights: Weight | Sequence[Weight] | None = None
) -> pd.DataFrame:
    """The Hessian block of the named weights, in float64: a square DataFrame with the weights as labels of both axes.

    `target` is a model or a mapping of names to tensors (or numbers), and `loss_fn(target) -> scalar` gets the like. A
    weight is `("fc1.weight", (0, 3))`, `"fc1.weight[0, 3]"`, or a name alone for all entries of that tensor; None takes all.
    Entry (i, j) is the partial by weight j of the partial by weight i: rows and columns are computed apart, so that the
    symmetry of the block is a result and not an assumption. Costs one backward pass a weight, for at most 1,000.

    >>> mixed_partials({"x": 2.0, "y": 3.0}, lambda v: v["x"] ** 2 * v["y"] + v["y"] ** 3)
         x     y
    x  6.0   4.0
    y  4.0  18.0
    """
    import pandas as pd

    all_of_them = IsolatedLoss(target, loss_fn).parameters
    places = _places(all_of_them, all_of_them.names if weights is None else weights)
    wanted = {name for name, _ in places}
    with IsolatedLoss(target, loss_fn, select=lambda name, tensor: name in wanted, wide=True) as isolated:
        second_order.state_need("mixed_partials", isolated)
        position = isolated.parameters.position
        at = [(position[name], index) for name, index in places]

        def block(loss: Tensor, gradient: list[Tensor]) -> list[list[float]]:
            rows = [second_order.again(isolated, gradient[p][index]) for p, index in at]
            return [[row[p][index].item() for p, index in at] for row in rows]

        found = second_order.differentiated(isolated, block)
    labels = [label(name, index) for name, index in places]
    return pd.DataFrame(np.array(found, np.float64).reshape(len(at), len(at)), index=labels, columns=labels)


def _places(parameters: Parameters, weights: Weight | Sequence[Weight]) -> list[tuple[str, tuple[int, ...]]]:
    listed = [weights] if isinstance(weights, str) or _is_one(weights) else list(weights)
    places = [place for weight in listed for place in _entries(parameters, weight)]
    if not places:
        raise ArgumentError("mixed_partials needs at least one weight, such as ('fc1.weight', (0, 3))")
    if len(places) > MOST:
        raise ArgumentError(
            f"{len(places):,} weights make a block of {len(places) ** 2:,} entries and as many backward passes as weights; "
            f"name at most {MOST:,}, such as ('fc1.weight', (0, 3)), or use check_symmetry for the whole model"
        )
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ArgumentError(f"the weight {label(*twice)} is named twice; name each once")
    return places


def _is_one(weights: object) -> bool:
    """Whether this is one weight with its index, and not two weights."""
    return isinstance(weights, tuple) and len(weights) == 2 and isinstance(weights[0], str) and is_index(weights[1])


def _entries(parameters: Parameters, weight: object) -> list[tuple[str, tuple[int, ...]]]:
    """The place of one weight, or of all those of a parameter that is named without an index."""
    name, index = parse_weight(weight, parameters.names)
    if name not in parameters.position:
        raise ArgumentError(f"{name!r} is no parameter with partials here{nearest(name, parameters.names)}")
    shape = parameters.shapes[parameters.position[name]]
    if index is None:
        return [(name, place) for place in np.ndindex(shape)]
    inside = len(index) == len(shape) and all(0 <= i < n for i, n in zip(index, shape, strict=False))
    if not inside:
        pairs = " (complex: the last index is 0 for the real part, 1 for the imaginary)"
        is_complex = parameters.dtypes[parameters.position[name]].startswith("complex")
        raise ArgumentError(
            f"{label(name, index)} is outside of {name!r}, whose shape is {shape}{pairs if is_complex else ''}"
        )
    return [(name, index)]
