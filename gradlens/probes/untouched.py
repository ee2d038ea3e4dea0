"""What a probe must leave as it was: the attributes of modules, and the random states of the process."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


@contextmanager
def protected(modules: Iterable[nn.Module], cast: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Iterator[None]:
    """Put every attribute of the modules back at the end, and the contents of those that are containers.

    Tensors that are plain attributes are replaced by copies meanwhile, so that a forward may write into them.
    """
    saved = [(module, dict(vars(module)), _contents(module)) for module in modules]
    try:
        for module, attributes, _ in saved:
            vars(module).update({k: cast(v.detach()).clone() for k, v in attributes.items() if isinstance(v, Tensor)})
        yield
    finally:
        for module, attributes, contents in saved:
            for added in vars(module).keys() - attributes.keys():
                del vars(module)[added]
            vars(module).update(attributes)
            for container, content in contents:
                _refill(container, content)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    return [(value, copy.copy(value)) for value in vars(module).values() if type(value) in _CONTAINERS]


def _refill(container: Any, content: Any) -> None:
    if list(map(id, _items(container))) == list(map(id, _items(content))):
        return
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _items(container: Any) -> list[Any]:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def randomness() -> tuple[Any, ...]:
    """The global random states: torch, CUDA where it is in use, numpy, Python."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def set_randomness(state: tuple[Any, ...]) -> None:
    """Put them back."""
    cpu, cuda, of_numpy, of_python = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    np.random.set_state(of_numpy)
    random.setstate(of_python)
