"""The object inside a wrapper: the optimizer that steps, the model that computes, the name without prefixes.

`torch.compile`, DDP, DataParallel, checkpointing, Lightning and accelerate put an object of their own around the user's.
What gradlens watches and probes is the object inside, under the name that the user gave it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from gradlens.weight_names import OF_CLASSES, PREFIXES


def unwrap_optimizer(optimizer: Any) -> Any:
    """The torch optimizer whose `step` fires the hooks; the argument itself where nothing is inside.

    Lightning's wrapper is no `Optimizer`. Accelerate's is one that was never initialised as such: it has the class and no
    hooks, so the class alone does not tell.
    """
    seen: set[int] = set()
    while not hasattr(getattr(type(optimizer), "step", None), "hooked") and id(optimizer) not in seen:
        seen.add(id(optimizer))
        held = [value for value in getattr(optimizer, "__dict__", {}).values() if isinstance(value, Optimizer)]
        inside = getattr(optimizer, "optimizer", held[0] if held else None)
        if inside is None or inside is optimizer:
            break
        optimizer = inside
    return optimizer


def unwrap_model(module: nn.Module) -> nn.Module:
    """The model within `torch.compile`, DDP and DataParallel wrappers."""
    while True:
        if isinstance(module, DistributedDataParallel | DataParallel):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def is_wrapper(module: nn.Module, child: str) -> bool:
    """Whether a module wraps this child, so that the child's name is not one that a user gave."""
    wrappers = OF_CLASSES.get(child, set())
    return child in PREFIXES or not wrappers.isdisjoint(each.__name__ for each in type(module).__mro__)


def plain_name(module: nn.Module, name: str) -> str:
    """The name of a parameter of `module` without the prefixes of wrappers."""
    *path, leaf = name.split(".")
    words = []
    for child in path:
        if not is_wrapper(module, child):
            words.append(child)
        module = module._modules[child]  # type: ignore[assignment]
    return ".".join([*words, leaf])
