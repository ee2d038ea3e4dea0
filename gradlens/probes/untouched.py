"""What a probe must leave as it was: the attributes of modules, and the random states of the process."""

from __future__ import annotations

import copy
import operator
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)
_TORCHS_OWN = ("_parameters", "_buffers", "_modules")  #: `functional_call` sees to what is in these


@contextmanager
def protected(modules: Iterable[nn.Module], cast: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Iterator[None]:
    """Put every attribute of the modules back at the end, and the contents of those that are containers, at any depth.

    Tensors among them (that are no parameters) are replaced by copies meanwhile, so that a forward may write into them.
    """
    copies = _Copies(cast)
    saved = [(module, dict(vars(module))) for module in modules]
    try:
        for module, attributes in saved:
            vars(module).update({k: copies.of(v, k not in _TORCHS_OWN) for k, v in attributes.items()})
        yield
    finally:
        for module, attributes in saved:
            for added in vars(module).keys() - attributes.keys():
                del vars(module)[added]
            vars(module).update(attributes)
        copies.put_back()


class _Copies:
    """Copies of tensors, the same one wherever the same tensor is met; containers stay themselves, and are refilled."""

    def __init__(self, cast: Callable[[Tensor], Tensor]) -> None:
        self._cast = cast
        self._met: dict[int, tuple[Any, Any]] = {}  # by id: a value, kept alive, and what stands for it
        self._filled: list[tuple[Any, Any]] = []  # containers, and what was in them

    def of(self, value: Any, inside: bool = True) -> Any:
        """What stands for a value meanwhile. `inside`: whether tensors in a container are to be replaced too."""
        kind = type(value)
        if isinstance(value, nn.Parameter) or not (isinstance(value, Tensor) or kind in _CONTAINERS or kind is tuple):
            return value
        if id(value) not in self._met:
            self._met[id(value)] = value, value  # a container may contain itself
            self._met[id(value)] = value, self._made(value, inside)
        return self._met[id(value)][1]

    def _made(self, value: Any, inside: bool) -> Any:
        if isinstance(value, Tensor):
            return self._cast(value.detach()).clone()
        if type(value) is tuple:
            items = [self.of(item) for item in value]
            return value if all(map(operator.is_, items, value)) else tuple(items)
        self._filled.append((value, copy.copy(value)))
        if inside and not isinstance(value, set):
            for key in list(value) if isinstance(value, dict) else range(len(value)):
                if (item := self.of(value[key])) is not value[key]:
                    value[key] = item
        return value

    def put_back(self) -> None:
        for container, content in self._filled:
            _refill(container, content)


def _refill(container: Any, content: Any) -> None:
    if list(map(id, _items(container))) == list(map(id, _items(content))):
        return
    container.clear()
    container.extend(content) if isinstance(container, list | deque) else container.update(content)


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
