"""What a probe must leave as it was: the attributes of modules, and the state of the process.

`ModuleState` and `ProcessState` take note of it; `put_back()` compares and repairs, and may run any number of times.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradlens._torch import asks_torch_functions, set_asks_torch_functions

CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)


class ModuleState:
    """Every attribute of some modules, by identity, and the contents of those that are containers, at any depth.

    The insides of tensors and of other objects are not its business.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._contents: list[tuple[Any, Any]] = []  # a container, and a copy of it
        self._empty: list[Any] = []  # most are: hook dictionaries
        self._seen: set[int] = set()
        for module in modules:
            self._note(vars(module))
        holding = [container for container, _ in self._contents]
        dicts = [container for container in holding if isinstance(container, dict)]
        # Views, which stay up to date: to compare all contents is then one pass at C speed, made after each evaluation.
        self._views = [c.values() if isinstance(c, dict) else c for c in holding], dicts, holding
        self._held = [list(chain.from_iterable(views)) for views in self._views[:2]]
        self._named = all(type(key) is str for key in self._held[1])  # then keys may be compared as such
        self._sizes = list(map(len, holding))

    def _note(self, value: Any) -> None:
        kind = type(value)
        if (kind not in CONTAINERS and kind is not tuple) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if not value and kind is not tuple:
            self._empty.append(value)
            return
        if kind is not tuple:
            self._contents.append((value, copy.copy(value)))
        for item in value.values() if isinstance(value, dict) else value:
            self._note(item)

    def put_back(self) -> None:
        """Make every container hold what it held, in the same order."""
        if any(self._empty):
            for container in self._empty:
                container.clear()
        if self._untouched():
            return
        for container, content in self._contents:
            if not _holds(container, content):
                container.clear()
                container.extend(content) if isinstance(container, list | deque) else container.update(content)

    def _untouched(self) -> bool:
        values, dicts, holding = self._views
        return (
            list(map(len, holding)) == self._sizes
            and all(map(is_, chain.from_iterable(values), self._held[0]))
            and self._same_keys(list(chain.from_iterable(dicts)))
        )

    def _same_keys(self, keys: list[Any]) -> bool:
        return keys == self._held[1] if self._named else all(map(is_, keys, self._held[1]))

    def mutable(self) -> list[Any]:
        """The containers that were not empty."""
        return [container for container, _ in self._contents]


def _holds(container: Any, content: Any) -> bool:
    """Whether it holds these very objects, in this order."""
    if len(container) != len(content) or not all(map(is_, container, content)):
        return False
    return not isinstance(container, dict) or all(map(is_, container.values(), content.values()))


class ProcessState:
    """Random states, defaults and modes: of torch, numpy and Python, and of the generators that are given."""

    def __init__(self, generators: Iterable[Any] = ()) -> None:
        self._generators = list(generators)
        self._states = [_state(generator) for generator in self._generators]
        self.random = randomness()
        self._dtype = torch.get_default_dtype()
        self._grad = torch.is_grad_enabled()
        self._modes = torch._C._len_torch_function_stack()
        self._torch_function = asks_torch_functions()
        self._attention = [read() for read, _ in _ATTENTION]
        self._stance = _stance()
        self._inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else None

    def enter(self, wide: bool, eager: bool) -> None:
        """What every probe computes in: gradients on; float64 by default if `wide`; no compiled code if `eager`."""
        if self._inference is not None:
            self._inference.__enter__()
        torch.set_grad_enabled(True)
        if wide:
            torch.set_default_dtype(torch.float64)
        if eager:
            torch.compiler.set_stance("force_eager")

    def rewind(self, all_of_it: bool = True) -> None:
        """Set the random states back; without `all_of_it` only torch's own, which is quick."""
        if all_of_it:
            set_randomness(self.random)
        else:
            _set_torch(*self.random[:2])
        for generator, state in zip(self._generators, self._states, strict=True):
            _set_state(generator, state)

    def leave_modes(self) -> None:
        """Take off the function modes that were entered since, and let torch ask them as it did; any number of times."""
        while torch._C._len_torch_function_stack() > self._modes:
            torch._C._pop_torch_function_stack()
        # `with DisableTorchFunction()` stays on where an interrupt comes between its body and its end.
        set_asks_torch_functions(self._torch_function)

    def put_back(self) -> None:
        """As it was."""
        self.leave_modes()
        if torch.get_default_dtype() != self._dtype:
            torch.set_default_dtype(self._dtype)
        for (_, write), value in zip(_ATTENTION, self._attention, strict=True):
            write(value)
        if self._stance is not None and _stance() is not self._stance:
            torch._dynamo.eval_frame._set_stance(self._stance)
        if self._inference is not None and not torch.is_inference_mode_enabled():
            self._inference.__exit__(None, None, None)
        torch.set_grad_enabled(self._grad)
        self.rewind()


#: The kernels of attention that may be used: how to read and how to set each.
_ATTENTION = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


def plain_attention() -> None:
    """Let attention run as plain matrix products, which can be differentiated twice; `put_back()` undoes it."""
    for (_, write), value in zip(_ATTENTION, (False, False, True, False), strict=True):
        write(value)


def compiled() -> bool:
    """Whether anything may have been compiled in this process: then torch's compiler is loaded."""
    return "torch._dynamo" in sys.modules


def _stance() -> Any:
    return torch._dynamo.eval_frame._stance if compiled() else None


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return copy.deepcopy(generator.bit_generator.state)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)


def randomness() -> tuple[Any, ...]:
    """The global random states: torch, CUDA where it is in use, numpy, Python."""
    return *torch_randomness(), np.random.get_state(), random.getstate()


def torch_randomness() -> tuple[Any, Any]:
    """Torch's own, which are quick to read."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None


def set_torch_randomness(state: tuple[Any, Any]) -> None:
    """Put these back."""
    _set_torch(*state)


def drawn_since(state: tuple[Any, ...]) -> bool:
    """Whether numbers were drawn from numpy's or Python's global generator."""
    return random.getstate() != state[3] or not _same_numpy(np.random.get_state(), state[2])


def torch_drawn_since(state: tuple[Any, ...]) -> bool:
    """Whether numbers were drawn from torch's generators; True where CUDA is in use, to be on the safe side."""
    return state[1] is not None or torch.cuda.is_initialized() or not torch.equal(torch.get_rng_state(), state[0])


def set_randomness(state: tuple[Any, ...]) -> None:
    """Put them back."""
    cpu, cuda, of_numpy, of_python = state
    _set_torch(cpu, cuda)
    np.random.set_state(of_numpy)
    random.setstate(of_python)


def _set_torch(cpu: Tensor, cuda: Any) -> None:
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


def _same_numpy(a: Any, b: Any) -> bool:
    return a[0] == b[0] and a[2:] == b[2:] and bool((a[1] == b[1]).all())
