"""Wish versus deed: why a weight moved against its own gradient.

The gradient asks for `dw = -lr g`. What the optimizer does has more in it, and some weights end up moving the other way
(`g * dw > 0`). For each of them the step is computed again with one ingredient left out:

- `clipping`: the gradient of the loss as it was, instead of the clipped one;
- `momentum`: this step's gradient alone, instead of the decayed sum of all;
- `weight_decay`: none in this step;
- `adaptive`: one denominator for the whole tensor (of the same mean effect), instead of one a weight.

An ingredient without which the weight would not have moved against its gradient is a cause; several share the blame evenly.
Where no single one is enough, it is `combined`. A step that is not reproduced (another optimizer, a changed learning rate,
weights touched by somebody else) is `unknown`: nothing is blamed on a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CAUSES = ("clipping", "momentum", "weight_decay", "adaptive", "combined", "unknown")
KINDS = {torch.optim.SGD: "SGD", torch.optim.Adam: "Adam", torch.optim.AdamW: "AdamW"}


@dataclass(frozen=True)
class Attribution:
    """Of the weights of one parameter with g * dw != 0: the share that moved against g, and each cause's part in it."""

    moving: int
    against: float  #: NaN when none moved
    clipping: float
    momentum: float
    weight_decay: float
    adaptive: float
    combined: float
    unknown: float
    error: float  #: |recomputed dw - dw| / |dw|: how well the step is understood

    @property
    def causes(self) -> dict[str, float]:
        """The shares by cause; they add up to `against`."""
        return {cause: getattr(self, cause) for cause in CAUSES}


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """`SGD`, `Adam` or `AdamW` for exactly these of torch.optim, else `unknown`: a subclass may do anything."""
    return KINDS.get(type(optimizer), "unknown")


def attribute(
    kind: str,
    used: Tensor,
    before: Tensor,
    after: Tensor,
    hyperparameters: Mapping[str, Any],
    state: Mapping[str, Any],
    loss: Tensor | None = None,
) -> Attribution:
    """Why weights moved against the gradient that the optimizer used.

    `used`, `before`, `after`: the gradient, and the weights before and after the step. `hyperparameters`: the parameter's
    group. `state`: the optimizer's state of this parameter *before* the step (empty at its first). `loss`: the unclipped
    gradient, if clipping is to be told apart. Any shape; chosen weights are judged by passing those entries of all tensors.
    """
    return summed(*causes(kind, used, before, after, hyperparameters, state, loss))


def summed(blame: Mapping[str, Tensor], moving: Tensor, error: float) -> Attribution:
    """What `causes` found, over all weights."""
    n = int(moving.sum())
    shares = {cause: float(blame[cause].sum()) / n if n else float("nan") for cause in CAUSES}
    against = float((blame_total(blame) > 0).sum()) / n if n else float("nan")
    return Attribution(n, against, error=error, **shares)


def blame_total(blame: Mapping[str, Tensor]) -> Tensor:
    """1 where a weight moved against its gradient, else 0."""
    return torch.stack(list(blame.values())).sum(0)


@torch.no_grad()
def causes(
    kind: str,
    used: Tensor,
    before: Tensor,
    after: Tensor,
    hyperparameters: Mapping[str, Any],
    state: Mapping[str, Any],
    loss: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor, float]:
    """Each weight's share of blame by cause, where it moved at all, and how well the step was reproduced."""
    g, w, dw = used.double(), before.double(), after.double() - before.double()
    against = g * dw > 0
    blame = {cause: torch.zeros_like(w) for cause in CAUSES}
    planned = _planned(kind, g, w, hyperparameters, state)
    error, allowed = (planned - dw).norm().item(), 1e-3 * dw.norm().item() + _rounding(before)
    if kind not in KINDS.values() or hyperparameters.get("maximize") or not error <= allowed:
        blame["unknown"][against] = 1
        return blame, g * dw != 0, error / dw.norm().item() if dw.any() else float("nan")
    gradient = g if loss is None else loss.double()
    without = {
        "clipping": _planned(kind, gradient, w, hyperparameters, state),
        "momentum": _planned(kind, g, w, hyperparameters, state, momentum=False),
        "weight_decay": _planned(kind, g, w, hyperparameters, state, decay=False),
        "adaptive": _planned(kind, g, w, hyperparameters, state, adaptive=False),
    }
    cured = {cause: against & (g * moved <= 0) for cause, moved in without.items()}
    many = torch.stack(list(cured.values())).sum(0)
    for cause, of in cured.items():
        blame[cause][of] = 1 / many[of].double()
    blame["combined"][against & (many == 0)] = 1
    return blame, g * dw != 0, error / dw.norm().item() if dw.any() else 0.0


def _rounding(w: Tensor) -> float:
    """What storing the weights may have cost: a few units in the last place of each."""
    return 4 * torch.finfo(w.dtype).eps * w.double().norm().item()


def _planned(
    kind: str,
    g: Tensor,
    w: Tensor,
    hyper: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    momentum: bool = True,
    decay: bool = True,
    adaptive: bool = True,
) -> Tensor:
    """dw by the optimizer's formula, with ingredients left out."""
    if kind == "SGD":
        return _sgd(g, w, hyper, state, momentum, decay)
    if kind in ("Adam", "AdamW"):
        decoupled = kind == "AdamW" or bool(hyper.get("decoupled_weight_decay"))
        return _adam(g, w, hyper, state, decoupled, momentum, decay, adaptive)
    return torch.full_like(w, torch.nan)


def _sgd(g: Tensor, w: Tensor, hyper: Mapping[str, Any], state: Mapping[str, Any], momentum: bool, decay: bool) -> Tensor:
    g = g + hyper["weight_decay"] * w if decay else g
    mu = float(hyper["momentum"]) if momentum else 0.0
    if mu:
        last = state.get("momentum_buffer")
        buffer = g if last is None else mu * last.double() + (1 - hyper["dampening"]) * g
        g = g + mu * buffer if hyper["nesterov"] else buffer
    return -float(hyper["lr"]) * g


def _adam(
    g: Tensor,
    w: Tensor,
    hyper: Mapping[str, Any],
    state: Mapping[str, Any],
    decoupled: bool,
    momentum: bool,
    decay: bool,
    adaptive: bool,
) -> Tensor:
    beta1, beta2 = (float(beta) for beta in hyper["betas"])
    lr, shrink = float(hyper["lr"]), float(hyper["weight_decay"]) if decay else 0.0
    step = float(state.get("step", 0)) + 1
    g = g if decoupled else g + shrink * w
    first, second = (_state(state, name, w) for name in ("exp_avg", "exp_avg_sq"))
    mean = (beta1 * first + (1 - beta1) * g) / (1 - beta1**step) if momentum else g
    square = beta2 * second + (1 - beta2) * g * g
    if hyper.get("amsgrad"):
        square = torch.maximum(square, _state(state, "max_exp_avg_sq", w))
    size = 1 / ((square / (1 - beta2**step)).sqrt() + float(hyper["eps"]))
    return -lr * (mean * (size if adaptive else size.mean()) + (shrink * w if decoupled else 0))


def _state(state: Mapping[str, Any], name: str, like: Tensor) -> Tensor:
    return state[name].double() if name in state else torch.zeros_like(like)


def alpha(slope_before: float, slope_after: float) -> float:
    """Where a step ended on the parabola along it: -1 stayed at the start, 0 at the minimum, 1 as high on the other side.

    `-(g_after.dw) / (g_before.dw)`, with both gradients of the same batch (Schneider et al. 2021, Cockpit). NaN for a step
    that did not go downhill.
    """
    return -slope_after / slope_before if slope_before < 0 else float("nan")
