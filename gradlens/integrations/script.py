"""Watches a training script that knows nothing of gradlens; `gradlens run` starts it.

The script is the real `__main__` of its own process. Python imports `bootstrap/sitecustomize.py` before it, which calls
`begin` when torch was imported, in the script's process and in those that it starts: workers of torchrun, spawned ranks.
From then on

    a module is called, gradients on  ->  are there optimizers? Then its model is watched before its first backward
    a module's output is in a graph   ->  where there is no optimizer: watched when the backward through it begins
    an optimizer steps                ->  it is none of those watched (plain tensors, or made late): watched from here on
    a parameter is registered         ->  a model is being built: look again

Models and optimizers are found among the objects that Python's garbage collector knows: nothing of torch is replaced, and
no hook is on a module. The hooks that look are torch's global ones, and are gone while everything is watched. Names are
those of the model; where there are several models, each has the name of the script's variable in front.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import inspect
import json
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_parameter_registration_hook,
)
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

VARIABLE = "GRADLENS_RUN"  #: of the environment: what `gradlens run` was told, as JSON
FRUITLESS = 16  #: looks that found nothing new, after which no model is looked for any more
WAIT = 60.0  #: seconds in which a rank waits for the first one's name of the run


@dataclass(frozen=True)
class Found:
    """Models and optimizers, as `watch` takes them."""

    target: nn.Module | dict[str, nn.Module | Tensor]
    optimizers: tuple[Optimizer, ...]

    def parameters(self) -> list[Tensor]:
        """What would be watched."""
        parts = list(self.target.values()) if isinstance(self.target, dict) else [self.target]
        return [p for part in parts for p in (part.parameters() if isinstance(part, nn.Module) else [part])]


# --- finding --------------------------------------------------------------------------------------------------------


def find(known: set[int], extra: Optimizer | None = None) -> Found | None:
    """The models whose parameters optimizers hold. None: there is no optimizer that is not known.

    `known` are the ids of parameters that are watched already; `extra` is an optimizer to be taken even if another holds it.
    """
    chosen = [each for each in _outermost(_alive(Optimizer), extra) if _held(each) and not _ids(each) & known]
    held = {id(p): p for each in chosen for p in _held(each) if p.requires_grad}
    return _holding(held, tuple(chosen)) if held else None


def find_called(known: set[int], called: Sequence[nn.Module]) -> Found | None:
    """The models that were called and train without an optimizer."""
    ids = {id(module) for module in called}
    roots = [root for root in _roots(_alive(nn.Module)) if any(id(module) in ids for module in root.modules())]
    held: dict[int, Tensor] = {
        id(p): p for root in roots for p in root.parameters() if p.requires_grad and id(p) not in known
    }
    return _holding(held, ()) if held else None


def _holding(held: dict[int, Tensor], optimizers: tuple[Optimizer, ...]) -> Found | None:
    """The modules that have these parameters, as few as possible, and the tensors that no module has."""
    parts: list[nn.Module | Tensor] = []
    left = dict(held)
    for root in sorted(_roots(_alive(nn.Module)), key=lambda root: _coverage(root, held)):
        mine = [id(p) for p in root.parameters() if id(p) in left]
        if mine:
            parts.append(root)
            for each in mine:
                del left[each]
    parts += [p for p in left.values() if p.is_leaf]
    if len(parts) == 1 and isinstance(parts[0], nn.Module):
        return Found(parts[0], optimizers)
    return Found(named(parts), optimizers) if parts else None


def _alive(kind: type) -> list[Any]:
    """All objects of a kind, each once. By their type alone: to ask a stranger's `__class__` may run its code."""
    kinds: dict[type, bool] = {}
    found = []
    for each in gc.get_objects():
        of = type(each)
        fits = kinds.get(of)
        if fits is None:
            fits = kinds[of] = issubclass(of, kind)
        if fits:
            found.append(each)
    return found


def _outermost(optimizers: Sequence[Optimizer], extra: Optimizer | None) -> list[Optimizer]:
    """Without those that others hold, and without wrappers whose own step fires no hook. In the order of the script."""
    hooked = [each for each in optimizers if hasattr(getattr(type(each), "step", None), "hooked")]
    inside = {id(value) for each in hooked for value in vars(each).values() if isinstance(value, Optimizer)}
    result = [each for each in hooked if id(each) not in inside or each is extra]
    order = {id(value): place for place, (_, value) in enumerate(_variables())}
    return sorted(result, key=lambda each: order.get(id(each), len(order)))


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in getattr(optimizer, "param_groups", ()) for p in group["params"] if isinstance(p, Tensor)]


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(p) for p in _held(optimizer)}


def _holds(register: dict[int, weakref.ref[Tensor]], parameter: Tensor) -> bool:
    known = register.get(id(parameter))
    return known is not None and known() is parameter


def _roots(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules that are in no other."""
    inside: set[int] = set()
    for module in modules:
        with contextlib.suppress(Exception):  # one that is being built, or a scripted one
            inside |= {id(child) for child in module.children() if child is not module}
    found = []
    for module in modules:
        if id(module) not in inside:
            with contextlib.suppress(Exception):
                if next(module.parameters(), None) is not None:
                    found.append(module)
    return found


def _coverage(root: nn.Module, held: dict[int, Tensor]) -> tuple[int, int]:
    """What covers most comes first, and of two that cover the same the smaller."""
    ids = {id(p) for p in root.parameters()}
    return -len(ids & held.keys()), len(ids)


# --- names ----------------------------------------------------------------------------------------------------------


def named(parts: Sequence[nn.Module | Tensor]) -> dict[str, nn.Module | Tensor]:
    """Each part under the name of the script's variable, else under that of its class; in the order of the script."""
    names: dict[int, str] = {}
    order: list[int] = []
    wanted = {id(inner): part for part in parts for inner in _inners(part)}
    for name, value in _variables():
        part = wanted.get(id(value))
        if part is not None and id(part) not in names and name.isidentifier():
            names[id(part)] = name
            order.append(id(part))
    rest = [part for part in parts if id(part) not in names]
    result: dict[str, nn.Module | Tensor] = {}
    by_id = {id(part): part for part in parts}
    for part in [*(by_id[each] for each in order), *rest]:
        word = names.get(id(part)) or (type(part).__name__ if isinstance(part, nn.Module) else "tensor")
        number, free = 2, word
        while free in result:
            free, number = f"{word}_{number}", number + 1
        result[free] = part
    return result


def _inners(part: nn.Module | Tensor) -> Iterator[nn.Module | Tensor]:
    """A part and what its wrappers wrap: the script's variable may be either."""
    yield part
    while isinstance(part, nn.Module):
        inner = part._modules.get("_orig_mod") or part._modules.get("module")
        if inner is None:
            return
        yield inner
        part = inner


def _variables() -> Iterator[tuple[str, Any]]:
    """Names and values that the running script has: its globals, then the locals of its functions from the outside in, and
    the attributes of the objects whose methods these are."""
    frames = list(_frames())
    main = sys.modules.get("__main__")
    yield from list(vars(main).items()) if main is not None else ()
    for frame in frames[::-1]:
        variables = _locals(frame)
        yield from variables.items()
        for value in variables.values():
            if _has_attributes(value):
                yield from list(vars(value).items())


def _has_attributes(value: Any) -> bool:
    """Whether it may be the object whose method runs: no module of either kind, nothing built in."""
    strange = issubclass(type(value), nn.Module | type(sys)) or type(value).__module__ in ("builtins", "torch")
    return not strange and type(getattr(value, "__dict__", None)) is dict


def _frames() -> Iterator[FrameType]:
    """The frames of the script and its libraries, innermost first, without torch's and our own."""
    frame = inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.split(".")[0] not in ("torch", "gradlens"):
            yield frame
        frame = frame.f_back


def _locals(frame: FrameType) -> dict[str, Any]:
    """A copy. Before Python 3.13 the frame would keep its own copy alive, and what is in it, to the end of the function."""
    variables = frame.f_locals
    copy = dict(variables)
    if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED and sys.gettrace() is None:
        variables.clear()
    return copy


# --- watching -------------------------------------------------------------------------------------------------------


class Session:
    """What is watched in this process, and the hooks that look for more."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._told = told
        self._pid = os.getpid()
        self.lenses: list[Any] = []
        self._known: dict[int, weakref.ref[Tensor]] = {}  # parameters that are watched, with their optimizers
        self._bare: dict[int, weakref.ref[Tensor]] = {}  # those that are watched and have none
        self._familiar: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()  # and how many they hold
        self._called: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._looking: list[Any] = []  # handles, while we look
        self._late: list[Any] = []  # handles on an optimizer
        self._calls = self._next = self._fruitless = 0
        self._busy = threading.Lock()
        self._handles = [
            register_module_parameter_registration_hook(self._registered),
            register_optimizer_step_pre_hook(self._stepped),
        ]
        self._look()

    # Each hook returns None, so it changes nothing; none raises, and none works in a forked child. A compiler that follows
    # one finds that it does nothing.

    def _registered(self, module: nn.Module, name: str, parameter: Any) -> None:
        if not torch.compiler.is_compiling() and not self._looking:
            self._safely(self._look)

    def _entered(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and self._looking and torch.is_grad_enabled():
            self._safely(self._enter, module)

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self._looking and torch.is_grad_enabled():
            self._safely(self._leave, output)

    def _reached(self, gradients: Any) -> None:
        if self._looking:
            self._safely(self._begin, find_bare=True)

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._safely(self._step, optimizer)

    def _stepping(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._safely(self._step_now, optimizer, args, kwargs)

    def _safely(self, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """One at a time, nothing within what we do ourselves, and no exception."""
        if os.getpid() != self._pid or not self._busy.acquire(blocking=False):
            return
        try:
            call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training
            self._fruitless = FRUITLESS
            self._stop_looking()
            _say(f"not watched: {type(error).__name__}: {error}")
        finally:
            self._busy.release()

    # --- looking ----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        if not self._looking and self._fruitless < FRUITLESS:
            self._calls, self._next = 0, 1
            self._looking = [register_module_forward_pre_hook(self._entered), register_module_forward_hook(self._left)]

    def _stop_looking(self) -> None:
        for handle in self._looking:
            handle.remove()
        self._looking = []

    def _enter(self, module: nn.Module) -> None:
        if torch._C._get_tracing_state() is not None:
            return
        self._called.add(module)
        self._calls += 1
        if self._calls >= self._next:  # a look takes some 50 ms: at the calls 1, 2, 4, 8, ...
            self._next = 2 * self._calls
            self._begin()

    def _leave(self, output: Any) -> None:
        """The backward through what comes out here begins before any gradient of the module is there."""
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(self._reached)

    def _step(self, optimizer: Optimizer) -> None:
        """Before an optimizer's step. Torch is going through its global hooks: none can be added until that is over."""
        for handle in self._late:
            handle.remove()
        self._late = []
        if self._new(optimizer):
            self._late = [optimizer.register_step_pre_hook(self._stepping)]

    def _step_now(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The global hooks are done. Those that are added here would miss this step, so they are called."""
        there = _global_optimizer_pre_hooks
        before = set(there)
        self._begin(extra=optimizer)
        for key in [key for key in there if key not in before]:
            there[key](optimizer, args, kwargs)

    def _new(self, optimizer: Optimizer) -> bool:
        """Whether it moves what is not watched; asked once, and again when it has got more to move."""
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        if self._fruitless >= FRUITLESS or self._familiar.get(optimizer) == held:
            return False
        self._familiar[optimizer] = held
        return any(p.requires_grad and not _holds(self._known, p) for p in _held(optimizer))

    def _begin(self, *, find_bare: bool = False, extra: Optimizer | None = None) -> None:
        known = {key for key, ref in self._known.items() if ref() is not None}
        found = find(known, extra)
        if found is None and find_bare:
            bare = {key for key, ref in self._bare.items() if ref() is not None}
            found = find_called(known | bare, list(self._called))
        if found is not None:
            self._stop_looking()
            self._called.clear()
            self._watch(found)
            return
        self._fruitless += bool(self.lenses)
        if self._fruitless >= FRUITLESS or (self.lenses and find_bare):
            self._stop_looking()

    def _watch(self, found: Found) -> None:
        from gradlens.lens import watch

        register = self._known if found.optimizers else self._bare
        register.update({id(p): weakref.ref(p) for p in found.parameters()})
        self._familiar.update({each: sum(len(g["params"]) for g in each.param_groups) for each in found.optimizers})
        self._close_bare(found)
        lens = watch(found.target, found.optimizers or None, run=self._directory(), **self._told["options"])
        self.lenses.append(lens)
        if len(self.lenses) == 1:
            _at_end(self.end)

    def _close_bare(self, found: Found) -> None:
        """A model that was watched without an optimizer, and has one now, is watched with it from here on."""
        ids = {id(p) for p in found.parameters()}
        for lens in self.lenses:
            if not lens._watcher.optimizers.watched and any(id(t) in ids for t in lens._watcher.attachment.tensors()):
                lens.close()

    # --- the run directory ------------------------------------------------------------------------------------------

    def _directory(self) -> str:
        """The name of the run, the same on all ranks; `-2` and so on for what a script trains later, or elsewhere."""
        from gradlens.watching import process_group

        if process_group.count() < 2:
            return self._claim()
        store = torch.distributed.distributed_c10d._get_default_store()
        key = f"gradlens/run/{len(self.lenses)}"
        if process_group.rank() == 0:
            name = self._claim()
            store.set(key, name)
            return name
        return str(store.get(key).decode())

    def _claim(self) -> str:
        name = str(self._told["run"])
        own = os.getpid() == self._told["pid"] or "RANK" in os.environ
        if self._told["continue"] and own and not self.lenses:
            return name
        number, free = 2, name
        while not _made(free):
            free, number = f"{name}-{number}", number + 1
        return free

    # --- the end ----------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """The script is over: say what was seen."""
        if os.getpid() != self._pid:
            return
        for lens in self.lenses:
            with contextlib.suppress(Exception):
                lens.close()
                if _is_first_rank():
                    _say_end(lens)


def _made(folder: str) -> bool:
    """Make it; False where it is there."""
    try:
        Path(folder).mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") in ("", "0")


def _say_end(lens: Any) -> None:
    """The run's first lines, as `gradlens report` has them, and how to see more."""
    from gradlens.page.summary import Summary
    from gradlens.store.run import open_run

    where = os.path.relpath(lens._run)
    where = str(lens._run) if where.startswith("..") else where
    more = f"the whole page: gradlens report {where}    as HTML: gradlens report {where} --html page.html"
    print(f"\n{Summary.of(open_run(lens._run)).brief(more)}", file=sys.stderr)


def _say(text: str) -> None:
    with contextlib.suppress(Exception):
        print(f"gradlens: {text}", file=sys.stderr)


def _tensors(output: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors of a module's output, however it is packed."""
    if isinstance(output, Tensor):
        yield output
    elif depth and isinstance(output, list | tuple):
        for each in output:
            yield from _tensors(each, depth - 1)
    elif depth and isinstance(output, dict):
        for each in output.values():
            yield from _tensors(each, depth - 1)


def _at_end(call: Any) -> None:
    """When the process ends; one of multiprocessing's ends by itself, past what `atexit` knows."""
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None and processes.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, call, exitpriority=100)
    else:
        atexit.register(call)


def begin() -> None:
    """Look for what trains in this process."""
    Session(json.loads(os.environ[VARIABLE]))
