"""Watches a training script that knows nothing of gradlens; `gradlens run` starts it.

The script is the real `__main__` of its own process. Python imports `bootstrap/sitecustomize.py` before it, which calls
`begin` when torch was imported, in the script's process and in those that it starts: workers of torchrun, spawned ranks.
From then on

    a backward is about to run  ->  are there optimizers? Then the models whose parameters they hold are watched, and
                                    otherwise those that this loss depends on; then the backward begins
    an optimizer steps          ->  it is none of those watched, as where its backward was not seen: watched from here on
    a parameter is registered   ->  a model is being built: look again at the next backward
    an optimizer is made        ->  the same; what was watched without one goes on with it, in the same run

Modules are known from the hook that torch calls when one registers a parameter or a child, those that were copied or loaded
from the script's variables. Three attributes of torch are replaced, each by what hands out the original, so that no frame of
ours is in a traceback and no compiler meets a hook: `Tensor.backward` and `torch.autograd._engine_run_backward`, until the
first backward, and `Optimizer._patch_step_function`, which is called as an optimizer is made. Names are those of the model;
where there are several models, each has the name of the script's variable in front.
"""

from __future__ import annotations

import atexit
import contextlib
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
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

VARIABLE = "GRADLENS_RUN"  #: of the environment: what `gradlens run` was told, as JSON
FRUITLESS = 64  #: looks that found nothing new, after which nothing is looked for any more
NODES = 200_000  #: of a graph that are looked at
_F = TypeVar("_F", bound=Callable[..., Any])
_AUTOGRAD: Any = torch.autograd  # what `_engine_run_backward` is looked up in by `backward` and `grad`


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


class Made:
    """The modules and the optimizers that the script has made and that are alive, these in the order of their making."""

    def __init__(self) -> None:
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._optimizers: list[weakref.ref[Optimizer]] = []

    def note_module(self, module: nn.Module) -> None:
        """It has got a parameter or a child."""
        self._modules.add(module)

    def note_optimizer(self, optimizer: Optimizer) -> None:
        """It is being made."""
        self._optimizers = [ref for ref in self._optimizers if ref() is not None]
        self._optimizers.append(weakref.ref(optimizer))

    def roots(self) -> list[nn.Module]:
        """Modules that are in no other, those that a variable of the script has among them."""
        known = {id(module): module for module in list(self._modules)}
        known |= {id(value): value for _, value in variables() if issubclass(type(value), nn.Module)}
        inside: set[int] = set()
        for module in known.values():
            with contextlib.suppress(Exception):  # one that is being built, or a scripted one
                inside |= {id(child) for child in module.children() if child is not module}
        return [module for key, module in known.items() if key not in inside and _has_parameters(module)]

    def optimizers(self, extra: Optimizer | None) -> list[Optimizer]:
        """Without those that others hold, and without wrappers whose own step fires no hook."""
        alive = list({id(o): o for ref in self._optimizers if (o := ref()) is not None}.values())
        if extra is not None and all(each is not extra for each in alive):
            alive.append(extra)
        hooked = [each for each in alive if hasattr(getattr(type(each), "step", None), "hooked")]
        inside = {id(value) for each in hooked for value in vars(each).values() if isinstance(value, Optimizer)}
        return [each for each in hooked if id(each) not in inside or each is extra]


def find(made: Made, known: set[int], extra: Optimizer | None = None) -> Found | None:
    """The models whose parameters optimizers hold. None: there is no optimizer that is not known.

    `known` are the ids of parameters that are watched already; `extra` is an optimizer to be taken even if another holds it.
    """
    chosen = [each for each in made.optimizers(extra) if _held(each) and not _ids(each) & known]
    held = {id(p): p for each in chosen for p in _held(each) if p.requires_grad}
    return _holding(made, held, tuple(chosen)) if held else None


def find_leaves(made: Made, known: set[int], *roots: Tensor) -> Found | None:
    """What losses depend on, where there is no optimizer: the modules that have their leaves, or else those tensors."""
    held = {id(leaf): leaf for leaf in leaves(*roots) if id(leaf) not in known}
    return _holding(made, held, ()) if held else None


def leaves(*roots: Tensor) -> list[Tensor]:
    """The tensors that these were computed from and that get a gradient."""
    seen: set[Any] = set()
    found: list[Tensor] = []
    stack = [root.grad_fn for root in roots]
    while stack and len(seen) < NODES:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and variable.requires_grad:
            found.append(variable)
        stack += [each for each, _ in node.next_functions]
    return found


def _holding(made: Made, held: dict[int, Tensor], optimizers: tuple[Optimizer, ...]) -> Found | None:
    """The modules that have these parameters, as few as possible, and the tensors that no module has."""
    parts: list[nn.Module | Tensor] = []
    left = dict(held)
    for root in sorted(made.roots(), key=lambda root: _coverage(root, held)):
        mine = [id(p) for p in root.parameters() if id(p) in left]
        if mine:
            parts.append(root)
            for each in mine:
                del left[each]
    if optimizers or not parts:  # inputs of a model may have a gradient too: of them alone it is the weights that train
        parts += [p for p in left.values() if p.is_leaf]
    if len(parts) == 1 and isinstance(parts[0], nn.Module):
        return Found(parts[0], optimizers)
    return Found(named(parts), optimizers) if parts else None


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in getattr(optimizer, "param_groups", ()) for p in group["params"] if isinstance(p, Tensor)]


def _size(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def holds_any(optimizer: Optimizer, tensors: Sequence[Tensor]) -> bool:
    """Whether it moves one of these."""
    return not _ids(optimizer).isdisjoint(map(id, tensors))


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(p) for p in _held(optimizer)}


def _holds(register: dict[int, weakref.ref[Tensor]], parameter: Tensor) -> bool:
    known = register.get(id(parameter))
    return known is not None and known() is parameter


def _has_parameters(module: nn.Module) -> bool:
    try:
        return next(module.parameters(), None) is not None
    except Exception:  # noqa: BLE001 - one that is being built
        return False


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
    for name, value in variables():
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


def variables() -> Iterator[tuple[str, Any]]:
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


def uncompiled(function: _F) -> _F:
    """Kept from torch.compile, with all that it calls: after a graph break that would read each function that is entered."""
    with contextlib.suppress(ImportError, AttributeError, TypeError):  # torch's own names, here without the compiler
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

        skipped = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
        set_code_exec_strategy(function.__code__, skipped)  # type: ignore[attr-defined]
    return function


class AtOptimizer:
    """Stands in for `Optimizer._patch_step_function`, which torch calls as an optimizer is made: `note` hears of each."""

    def __init__(self, note: Callable[[Optimizer], None]) -> None:
        self._note, self._original = note, Optimizer.__dict__["_patch_step_function"]
        Optimizer._patch_step_function = self  # type: ignore[assignment, method-assign]

    @uncompiled
    def __get__(self, optimizer: Optimizer | None, kind: type) -> Any:
        if optimizer is not None:
            self._note(optimizer)
        return self._original.__get__(optimizer, kind)


class AtBackward:
    """Waits for a backward that begins outside of any other: `call(*losses)` runs once, before it.

    `Tensor.backward` is watched where it is asked for, `torch.autograd.backward` where it is about to run the engine. All is
    as it was before `call` runs, so what goes on is torch's own, and so are its frames.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call, self._original = call, Tensor.__dict__["backward"]
        Tensor.backward = self  # type: ignore[assignment, method-assign]
        self._engine = AtEngine(self._begins)

    @uncompiled
    def __get__(self, tensor: Tensor | None, kind: type) -> Any:
        if tensor is None or torch.compiler.is_compiling():
            return self._original.__get__(tensor, kind)
        self._begins((tensor,))
        return getattr(tensor, "backward")  # noqa: B009 - as it is now: the call may have put another one here

    def _begins(self, losses: Sequence[Tensor]) -> None:
        self.remove()
        self._call(*losses)

    def remove(self) -> None:
        """Give way. May be called again."""
        self._engine.remove()
        if Tensor.__dict__.get("backward") is self:
            Tensor.backward = self._original  # type: ignore[method-assign]


class AtEngine:
    """Stands in for `_engine_run_backward` in `torch.autograd`, which `backward` and `grad` call there: `call(losses)` runs
    before a `backward`, and the original is handed out.

    To call an object, Python asks its class for `__call__`, here a property: that has returned when the original is called.
    """

    def __init__(self, call: Callable[[Sequence[Tensor]], None]) -> None:
        self._call, self._original, self._waits = call, _AUTOGRAD._engine_run_backward, True
        _AUTOGRAD._engine_run_backward = self

    @property
    @uncompiled
    def __call__(self) -> Any:
        """The original."""
        frame = inspect.currentframe()
        caller = None if frame is None else frame.f_back
        if self._waits and caller is not None and caller.f_code is torch.autograd.backward.__code__ and not _within():
            self._call([each for each in _locals(caller)["tensors"] if isinstance(each, Tensor)])
        return self._original

    def remove(self) -> None:
        """Give way, also where another has kept this one to call it. May be called again."""
        self._waits = False
        if _AUTOGRAD._engine_run_backward is self:
            _AUTOGRAD._engine_run_backward = self._original


def _within() -> bool:
    """Whether a backward runs in this thread, or a compiler reads the code."""
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1


class Session:
    """What is watched in this process, and what looks for more."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._told = told
        self._pid = os.getpid()
        self.lenses: list[Any] = []
        self._known: dict[int, weakref.ref[Tensor]] = {}  # parameters that are watched, with their optimizers
        self._bare: list[tuple[Any, dict[int, weakref.ref[Tensor]]]] = []  # lenses without one, and what they watch
        self._familiar: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()  # and how many they hold
        self._waiting: AtBackward | None = None
        self._late: list[Any] = []  # handles on an optimizer
        self._asked_for, self._claimed, self._ends = 0, False, False  # run directories, over ranks and here; said at the end
        self._fruitless = 0
        self._busy = threading.Lock()
        self._made = Made()
        self._handles = [
            register_module_parameter_registration_hook(self._registered),
            register_module_module_registration_hook(self._registered),
            register_optimizer_step_pre_hook(self._stepped),
            AtOptimizer(self._optimizer_made),
        ]
        self._wait()

    # Each hook returns None, so it changes nothing; none raises, and none works in a forked child.

    @uncompiled
    def _registered(self, module: nn.Module, name: str, registered: Any) -> None:
        if not torch.compiler.is_compiling() and not self._busy.locked():
            self._safely(self._note_module, module)

    @uncompiled
    def _optimizer_made(self, optimizer: Optimizer) -> None:
        self._safely(self._note_optimizer, optimizer)

    @uncompiled
    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._safely(self._step, optimizer)

    @uncompiled
    def _stepping(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._safely(self._step_now, optimizer, args, kwargs)

    def _safely(self, call: Callable[..., None], *args: Any) -> None:
        """One at a time, nothing within what we do ourselves, and no exception."""
        if os.getpid() != self._pid or not self._busy.acquire(blocking=False):
            return
        try:
            call(*args)
        except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training
            self._fruitless = FRUITLESS
            _say(f"not watched: {type(error).__name__}: {error}")
        finally:
            self._busy.release()

    # --- looking ----------------------------------------------------------------------------------------------------

    def _note_module(self, module: nn.Module) -> None:
        self._made.note_module(module)
        self._wait()

    def _note_optimizer(self, optimizer: Optimizer) -> None:
        self._made.note_optimizer(optimizer)
        self._wait()

    def _wait(self) -> None:
        """For the next backward."""
        if self._waiting is None and self._fruitless < FRUITLESS:
            self._waiting = AtBackward(self._asked)

    def _asked(self, *losses: Tensor) -> None:
        self._waiting = None
        self._safely(self._look, *losses)

    def _look(self, *losses: Tensor) -> None:
        """Before a backward."""
        known = {key for key, ref in self._known.items() if ref() is not None}
        found = find(self._made, known)
        if found is None:
            bare = {key for _, watched in self._bare for key, ref in watched.items() if ref() is not None}
            found = find_leaves(self._made, known | bare, *losses)
        self._begin(found)

    def _begin(self, found: Found | None) -> None:
        if found is None:
            self._fruitless += 1
        else:
            self._watch(found)

    def _step(self, optimizer: Optimizer) -> None:
        """Before an optimizer's step. Torch is going through its global hooks: none can be added until that is over."""
        for handle in self._late:
            handle.remove()
        self._late = []
        if self._new(optimizer):
            self._late = [optimizer.register_step_pre_hook(self._stepping)]

    def _step_now(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The global hooks are done. Those that are added here would miss this step, so they are called."""
        before = set(_global_optimizer_pre_hooks)
        self._begin(find(self._made, {key for key, ref in self._known.items() if ref() is not None}, optimizer))
        for key in [key for key in _global_optimizer_pre_hooks if key not in before]:
            _global_optimizer_pre_hooks[key](optimizer, args, kwargs)

    def _new(self, optimizer: Optimizer) -> bool:
        """Whether it moves what is not watched; asked once, and again when it has got more to move."""
        held = _size(optimizer)
        if self._fruitless >= FRUITLESS or self._familiar.get(optimizer) == held:
            return False
        self._familiar[optimizer] = held
        return any(p.requires_grad and not _holds(self._known, p) for p in _held(optimizer))

    def _watch(self, found: Found) -> None:
        from gradlens.lens import watch

        _prepare_end()
        watched = {id(p): weakref.ref(p) for p in found.parameters()}
        options, bare = dict(self._told["options"]), self._close_bare(watched)
        if bare is not None:  # the same training, from now on with its optimizer: the run goes on
            options["first_step"] = bare._watcher.step.number
        run = self._directory() if bare is None else bare._settings.run
        lens = watch(found.target, found.optimizers or None, run=run, **options)
        self.lenses.append(lens)
        if found.optimizers:
            self._known.update(watched)
            self._familiar.update({each: _size(each) for each in found.optimizers})
        else:
            self._bare.append((lens, watched))
        if not self._ends:
            self._ends = True
            _at_end(self.end)

    def _close_bare(self, watched: dict[int, weakref.ref[Tensor]]) -> Any:
        """The lens, now closed, that watched some of these parameters without an optimizer; None where none did."""
        found = [lens for lens, own in self._bare if own.keys() & watched.keys()]
        self._bare = [each for each in self._bare if each[0] not in found]
        self.lenses = [lens for lens in self.lenses if lens not in found[:1]]
        for lens in found:
            lens.close()
        return found[0] if found else None

    # --- the run directory ------------------------------------------------------------------------------------------

    def _directory(self) -> str:
        """The name of the run, the same on all ranks; `-2` and so on for what a script trains later, or elsewhere."""
        from gradlens.watching import process_group

        if process_group.count() < 2:
            return self._claim()
        store = torch.distributed.distributed_c10d._get_default_store()
        key = f"gradlens/run/{self._asked_for}"
        self._asked_for += 1
        if process_group.rank() == 0:
            name = self._claim()
            store.set(key, name)
            return name
        return str(store.get(key).decode())

    def _claim(self) -> str:
        name = str(self._told["run"])
        own = os.getpid() == self._told["pid"] or "RANK" in os.environ
        first, self._claimed = not self._claimed, True
        if self._told["continue"] and own and first:
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
            try:
                lens.close()
                if _is_first_rank():
                    _say_end(lens)
            except Exception as error:  # noqa: BLE001 - the script has ended as it ended
                _say(f"{lens._settings.run}: {type(error).__name__}: {error}")


def _made(folder: str) -> bool:
    """Make it; False where it is there."""
    try:
        Path(folder).mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") in ("", "0")


def _prepare_end() -> None:
    """Import what the end needs.

    Imported then, it would make Python forget that Ctrl-C ended the script: whatever runs `exec` on a text, as dataclasses
    do, resets that, and the exit code would be 1.
    """
    import numpy
    import pyarrow.compute

    import gradlens.page.summary
    import gradlens.writers.report  # noqa: F401

    pyarrow.array(numpy.zeros(1))  # imports pandas, if it is there


def _say_end(lens: Any) -> None:
    """The run's first lines, as `gradlens report` has them, and how to see more."""
    from gradlens.page.summary import Summary
    from gradlens.store.run import open_run

    where = os.path.relpath(lens._settings.run)
    where = str(lens._settings.run) if where.startswith("..") else where
    more = f"the whole page: gradlens report {where}    as HTML: gradlens report {where} --html page.html"
    print(f"\n{Summary.of(open_run(lens._settings.run)).brief(more)}", file=sys.stderr)


def _say(text: str) -> None:
    with contextlib.suppress(Exception):
        print(f"gradlens: {text}", file=sys.stderr)


def _at_end(call: Any) -> None:
    """When the process ends; one of multiprocessing's ends by itself, past what `atexit` knows."""
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None and processes.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, call, exitpriority=100)
    else:
        atexit.register(call)


def begin() -> None:
    """Look for what trains in this process, or for the graph of its first loss."""
    told = json.loads(os.environ[VARIABLE])
    if told.get("audit"):
        from gradlens.integrations import audited

        audited.begin(told)
    else:
        Session(told)
