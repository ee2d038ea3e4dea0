"""What the last layer of a model gets and gives in one batch, read inside the backward pass.

When the first hook of a pass fires, backward has come as far as the last layer, and what lies before it still keeps its
tensors: so the features that the last layer got are there, and with its weights what it made of them. The same holds for a
latent z = mu + e * sigma, whose layers come earlier still. Nothing is computed but standard deviations over the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gradlens.capture.graph import plain_name, saved_tensor
from gradlens.facts import LAYOUT

#: Saved tensors that hold what an operation made or got, by preference.
_KEPT = ("result", "self", "input", "output", "mat1")
#: Operations that are looked at on the way from the loss, at most.
FAR = 60
#: Examples and features of a batch that are looked at, at most.
ROWS, COLUMNS = 256, 4096

_LAYERS = ("Addmm", "Mm", "Convolution")


def last_layer(root: Tensor) -> Any:
    """The node of the layer nearest to the loss; None where none is near."""
    return next((node for node in _near(root) if plain_name(node) in _LAYERS and _weight(node) is not None), None)


def _near(root: Tensor) -> Iterator[Any]:
    """The nodes of a graph, by their distance from the loss."""
    seen, waiting = {root.grad_fn}, [root.grad_fn]
    for node in waiting:
        if node is None:
            continue
        yield node
        if len(waiting) > FAR:
            return
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)


def _weight(node: Any) -> Tensor | None:
    """The weight of a layer, a leaf of two axes or more."""
    for other, _ in node.next_functions:
        while other is not None and plain_name(other) in LAYOUT and other.next_functions:
            other = other.next_functions[0][0]
        leaf = getattr(other, "variable", None)
        if leaf is not None and leaf.dim() > 1:
            return leaf  # type: ignore[no-any-return]
    return None


def _bias(node: Any) -> Tensor | None:
    for other, _ in node.next_functions:
        leaf = getattr(other, "variable", None)
        if leaf is not None and leaf.dim() == 1:
            return leaf  # type: ignore[no-any-return]
    return None


def features_of(node: Any) -> Tensor | None:
    """What a layer got, `[examples, features]`; None where it is gone."""
    own = saved_tensor(node, "mat1")
    if own is None:
        own = saved_tensor(node, "input")
    if own is None:
        weight = _weight(node)
        for other, _ in node.next_functions:
            while other is not None and plain_name(other) in LAYOUT and other.next_functions:
                other = other.next_functions[0][0]
            if other is None or getattr(other, "variable", None) is weight:
                continue
            own = next((t for name in _KEPT if (t := saved_tensor(other, name)) is not None), None)
            if own is not None:
                break
    if own is None or own.dim() < 2 or not own.is_floating_point() or own.is_meta:
        return None
    return own.detach()


def spread_of(batch: Tensor) -> dict[str, Tensor]:
    """How much examples differ: their standard deviation beside their rms, both over all features; and what is always 0."""
    with torch.no_grad():
        flat = batch[:ROWS].reshape(min(len(batch), ROWS), -1)[:, :COLUMNS].float()
        mean = flat.mean(0)
        rms = flat.square().mean().sqrt()
        deviation = (flat - mean).square().mean().sqrt()
        return {"spread": deviation / rms.clamp_min(1e-30), "rms": rms, "dead": (flat == 0).all(0).float().mean()}


def output_spread(node: Any, features: Tensor) -> Tensor | None:
    """The standard deviation over the batch of what a linear layer makes of its features."""
    weight = _weight(node)
    if plain_name(node) == "Convolution" or weight is None or features.dim() != 2 or weight.shape[-1] != features.shape[1]:
        return None
    with torch.no_grad():
        made = features[:ROWS].float() @ weight.detach().float().T
        return (made - made.mean(0)).square().mean().sqrt()


def inputs_of(root: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """The layers that get data which needs no gradient, and these data: what the model was given."""
    seen, waiting, given = {root.grad_fn}, [root.grad_fn], 0
    for node in waiting:
        if node is None or len(waiting) > 4 * FAR * FAR or given > 1:
            return
        data = _data(node)
        if data is not None:
            given += 1
            yield node, data
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)


def _data(node: Any) -> Tensor | None:
    name = plain_name(node)
    at = {"Addmm": 1, "Mm": 0, "Convolution": 0}.get(name)
    if at is None or node.next_functions[at][0] is not None or _weight(node) is None:
        return None
    kept = saved_tensor(node, "mat1" if at == 1 else "self" if name == "Mm" else "input")
    if kept is None or kept.dim() < 2 or not kept.is_floating_point() or kept.is_meta:
        return None
    return kept.detach()


def latents(root: Tensor) -> Iterator[tuple[str, Tensor, Tensor, Any]]:
    """Where the graph draws z = mu + e * exp(s): the layer of mu, mu's deviation over the batch, and exp(s)'s mean.

    `(kind, deviation, noise, node of mu)`.
    """
    for node in _near(root):
        if plain_name(node) != "Add":
            continue
        sides = [_skip(other) for other, _ in node.next_functions if other is not None]
        if len(sides) != 2:
            continue
        for noise, mean in (sides, sides[::-1]):
            sigma = _sigma(noise)
            made = None if sigma is None else _made(mean)
            if sigma is not None and made is not None and made.shape == sigma.shape and made.dim() == 2:
                with torch.no_grad():
                    deviation = (made - made.mean(0)).square().mean().sqrt()
                    yield "latent", deviation, sigma.float().mean(), mean
                return


def _skip(node: Any) -> Any:
    while node is not None and plain_name(node) in LAYOUT and node.next_functions:
        node = node.next_functions[0][0]
    return node


def _sigma(node: Any) -> Tensor | None:
    """What noise is multiplied by, where that is an exponential or a softplus: one factor needs no gradient."""
    if node is None or plain_name(node) != "Mul":
        return None
    factors = [_skip(other) for other, _ in node.next_functions]
    grown = [factor for factor in factors if factor is not None]
    if len(grown) != 1 or len(factors) != 2:
        return None
    while plain_name(grown[0]) in ("Sqrt", "Mul", "Add", "Clamp", "ClampMin") and grown[0].next_functions:
        following = [_skip(o) for o, _ in grown[0].next_functions if o is not None]
        if len(following) != 1:
            return None
        grown = following
    if plain_name(grown[0]) == "Exp":
        kept = saved_tensor(grown[0], "result")
        return None if kept is None else kept.detach()
    if plain_name(grown[0]) == "Softplus":
        kept = saved_tensor(grown[0], "self")
        return None if kept is None else torch.nn.functional.softplus(kept.detach())
    return None


def _made(node: Any) -> Tensor | None:
    """What a linear layer made, from what it keeps: it was not reached yet."""
    if node is None or plain_name(node) != "Addmm":
        return None
    got, weight = features_of(node), _weight(node)
    if got is None or weight is None or got.dim() != 2 or weight.shape[-1] != got.shape[1]:
        return None
    bias = _bias(node)
    with torch.no_grad():
        made = got.float() @ weight.detach().float().T
        return made if bias is None else made + bias.detach().float()


def name_of(node: Any, names: dict[int, str]) -> str:
    """The layer's name: that of its weight, without the last part."""
    weight = _weight(node)
    name = "" if weight is None else names.get(id(weight), "")
    return name.rpartition(".")[0] or name
