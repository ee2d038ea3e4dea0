"""Mixed partials: how the partial by one weight changes when another weight moves.

    H_ij = d/dw_i (dL/dw_j) = d/dw_j (dL/dw_i)

The two are equal wherever the second derivatives are continuous (Schwarz). A gradient whose mixed partials differ is the
gradient of no function: some backward in it is wrong. `check_symmetry` tests that along random directions,
`u.(H v) == v.(H u)`, without forming H. It does not prove each partial right (a gradient that is wrong by one common factor
is symmetric): that is what `check_partials` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradlens.errors import ArgumentError, nearest
from gradlens.probes import second_order
from gradlens.probes.isolated_loss import IsolatedLoss
from gradlens.probes.loss import Target
from gradlens.records import Parameters
from gradlens.selection import Select
from gradlens.weight_names import is_index, label, parse_weight

if TYPE_CHECKING:
    import pandas as pd

Weight = str | tuple[str, Any]
MOST = 1_000  #: weights of one block: a backward pass and a row for each


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
        raise ArgumentError(f"{label(name, index)} is outside of {name!r}, whose shape is {shape}")
    return [(name, index)]


@dataclass(frozen=True, eq=False)
class Symmetry:
    """What `check_symmetry` found. `ok`: no pair of directions differs by more than `tolerance` of its scale."""

    frame: pd.DataFrame  #: a row a pair: `u_Hv, v_Hu, difference, scale, asymmetry` (= |difference| / scale)
    tolerance: float
    narrow: tuple[str, ...]  #: operations that could not be computed in float64

    @property
    def asymmetry(self) -> float:
        """The largest difference of a pair, as a share of its scale."""
        return float(self.frame["asymmetry"].max())

    @property
    def ok(self) -> bool:
        """Whether the mixed partials are equal, as far as the directions tried tell."""
        return self.asymmetry <= self.tolerance

    def __str__(self) -> str:
        tried = f"{len(self.frame)} pairs of random directions, largest asymmetry {self.asymmetry:.1e}"
        if not self.ok:
            text = (
                f"mixed partials are NOT equal ({tried}, allowed {self.tolerance:.0e}): some backward gives a gradient that "
                f"is the gradient of no function; look at custom autograd.Functions, .data and in-place writes, and let "
                f"check_partials name the weights whose partials are wrong"
            )
        elif not self.frame["scale"].any():
            text = f"the Hessian is 0 along {len(self.frame)} pairs of random directions: equal, but nothing was put to test"
        else:
            text = f"mixed partials are equal ({tried})"
        return text + (f"; less than float64: {', '.join(self.narrow)}" if self.narrow else "")


def check_symmetry(
    model: Target,
    loss_fn: Callable[[Any], Tensor],
    k: int = 4,
    *,
    tolerance: float = 1e-7,
    select: Select = None,
    seed: int = 0,
) -> Symmetry:
    """Whether mixed partials are equal: `u.(H v) == v.(H u)` for `k` pairs of random directions, in float64.

    The scale of a pair is the mean of |u||Hv| and |v||Hu|. Costs `2 k` Hessian-vector products, each about two backward
    passes. `select` restricts it to the Hessian block of some parameters.
    """
    if k < 1:
        raise ArgumentError(f"k is the number of pairs of directions, at least 1, not {k}")
    with IsolatedLoss(model, loss_fn, select=select, wide=True) as isolated:
        random = torch.Generator().manual_seed(seed)
        directions = [[_normal(w, random) for w in isolated.weights] for _ in range(2 * k)]

        def pairs(loss: Tensor, gradient: list[Tensor]) -> list[tuple[float, float, float]]:
            rows = []
            for u, v in zip(directions[::2], directions[1::2], strict=True):
                hu, hv = second_order.product(isolated, gradient, u), second_order.product(isolated, gradient, v)
                scale = (second_order.norm(u) * second_order.norm(hv) + second_order.norm(v) * second_order.norm(hu)) / 2
                rows.append((second_order.dot(u, hv).item(), second_order.dot(v, hu).item(), scale.item()))
            return rows

        found = second_order.differentiated(isolated, pairs)
        return Symmetry(_frame(found), tolerance, isolated.narrow)


def _frame(found: Sequence[tuple[float, float, float]]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(found, columns=["u_Hv", "v_Hu", "scale"])
    frame.insert(2, "difference", frame["u_Hv"] - frame["v_Hu"])
    frame["asymmetry"] = np.where(
        frame["scale"] > 0, frame["difference"].abs() / frame["scale"].where(frame["scale"] > 0, 1), 0
    )
    return frame


def _normal(like: Tensor, random: torch.Generator) -> Tensor:
    """Standard normal entries, the same on every device."""
    return torch.randn(like.shape, generator=random, dtype=torch.float64).to(like.device, like.dtype)
