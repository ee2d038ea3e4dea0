"""A place where a loss is computed and differentiated without leaving a trace on the model.

    L(w, batch) = loss_fn(the model with weights w, batch)

`Shelter` makes of a model and a loss function that function of its weights. The weights are private copies, put into the
model for the time of one evaluation by `torch.func.functional_call`: tied weights stay tied, and hooks that sit on the live
parameters (a watching lens, the user's own) never see them. Afterwards parameters, buffers, `.grad`, training modes,
attributes and hook dictionaries of every module, and the random states of torch, CUDA, numpy and Python are as they were,
also when the loss raises. Each evaluation starts from the same weights, buffers and attributes.

What it cannot undo is what a loss function does elsewhere: files, generators of its own, containers within containers.
Hooks that the user put on modules run at each evaluation, as at each forward.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from gradlens.errors import ArgumentError, ArgumentTypeError, ProbeError
from gradlens.probes import float64
from gradlens.records import Parameters
from gradlens.selection import Select, check, predicate

Target = nn.Module | Mapping[str, Any]
T = TypeVar("T")


class Shelter:
    """`loss_fn` as a function of private weights; a context manager.

    `weights` are the leaves to differentiate by and to move, one real tensor a chosen parameter (a complex one ends with an
    axis of 2); `parameters` says their names, shapes and dtypes in the model. With `wide` all is computed in float64.
    `batched` says that the loss function also takes a batch.
    """

    def __init__(
        self,
        target: Target,
        loss_fn: Callable[..., Tensor],
        *,
        select: Select = None,
        wide: bool = False,
        batched: bool = False,
    ) -> None:
        _check_arguments(loss_fn, batched)
        self._loss = _Loss(target, loss_fn)
        self._named = self._loss.named()
        trainable = {name: tensor for name, tensor in self._named.values() if _varies(name, tensor)}
        if not trainable:
            raise ArgumentError("nothing to differentiate by: no parameter of the model requires a gradient")
        check(select, trainable)
        chosen = {name for name, tensor in trainable.items() if predicate(select)(name, tensor)}
        self._chosen = [raw for raw, (name, _) in self._named.items() if name in chosen]
        self.parameters = _describe([self._named[raw] for raw in self._chosen])
        self.weights: list[Tensor] = []
        self._mode = float64.Float64() if wide else None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._random = randomness()
            stack.callback(set_randomness, self._random)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if self._mode is not None:
                stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(torch.float64)
            if any(map(_compiled, self._loss.modules())):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self.weights = [_real(self._copy(raw)).contiguous().requires_grad_() for raw in self._chosen]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.weights = []
        self._stack.close()

    def evaluate(self, then: Callable[[Tensor], T], *batch: Any) -> T:
        """`then(loss)`, with the weights still in place: a backward may run checkpointed forwards again."""
        with protected(self._loss.parts.modules(), self._cast), self._mode or nullcontext(), explained():
            return functional_call(self._loss, self._tensors(), (self._plain(), then, batch))

    def loss(self, *batch: Any) -> float:
        """The loss at the current weights."""
        with torch.no_grad():
            return self.evaluate(Tensor.item, *batch)

    def gradient(self, *batch: Any) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and its partials by each of `weights`; None where it does not depend on a parameter."""
        return self.evaluate(lambda loss: (loss.detach(), self.grad(loss)), *batch)

    def grad(
        self, output: Tensor, seed: Tensor | None = None, *, create_graph: bool = False, retain_graph: bool = False
    ) -> list[Tensor | None]:
        """Partials of an output by each of `weights`; called within `evaluate`."""
        if not output.requires_grad:
            return [None] * len(self.weights)
        seed = torch.ones_like(output) if seed is None else seed
        keep = create_graph or retain_graph
        if self._mode is not None:
            found = float64.grad(output, self.weights, seed, create_graph, keep)
        else:
            found = list(torch.autograd.grad(output, self.weights, seed, keep, create_graph, allow_unused=True))
        return [g.to_dense() if g is not None and g.is_sparse else g for g in found]

    def owners(self) -> list[nn.Module | None]:
        """The module that owns each of `weights`; None for a plain tensor."""
        plain = self._loss.plain
        return [None if raw in plain else self._loss.get_submodule(raw.rpartition(".")[0]) for raw in self._chosen]

    @property
    def training(self) -> str:
        """The mode of the modules: `train`, `eval`, or `mixed`."""
        modes = {module.training for place in self._loss.places.values() for module in place.modules()}
        return "mixed" if len(modes) > 1 else "eval" if modes == {False} else "train"

    def rewind(self) -> None:
        """Set the random states back to where they were on entering: the next evaluation draws the same numbers."""
        set_randomness(self._random)

    @property
    def narrow(self) -> tuple[str, ...]:
        """Operations that gave results of less than float64 in spite of `wide`."""
        return tuple(sorted(self._mode.narrow)) if self._mode is not None else ()

    def _cast(self, tensor: Tensor) -> Tensor:
        return float64.widen(tensor) if self._mode is not None else tensor

    def _copy(self, raw: str) -> Tensor:
        name, tensor = self._named[raw]
        try:
            return self._cast(tensor.detach()).clone()
        except RuntimeError as error:
            raise ProbeError(f"parameter {name!r} ({tensor.dtype}) cannot be copied for a probe: {error}") from error

    def _tensors(self) -> dict[str, Tensor]:
        """What `functional_call` puts into the modules. All are copies, so that a forward may write into them."""
        tensors = {raw: value for raw, value in self._values() if raw not in self._loss.plain}
        for raw, buffer in self._loss.named_buffers():
            tensors[raw] = self._cast(buffer.detach()).clone()
        return tensors

    def _plain(self) -> dict[str, Tensor]:
        return {raw: value for raw, value in self._values() if raw in self._loss.plain}

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        leaves = dict(zip(self._chosen, self.weights, strict=True))
        for raw, (_, tensor) in self._named.items():
            if raw not in leaves:
                yield raw, self._copy(raw).requires_grad_(tensor.requires_grad)
            elif tensor.is_complex():
                yield raw, torch.view_as_complex(leaves[raw].clone())
            else:
                yield raw, leaves[raw].clone()


class _Loss(nn.Module):
    """The loss function as a module around the model, so that `functional_call` can reach into the model."""

    def __init__(self, target: Target, loss_fn: Callable[..., Tensor]) -> None:
        super().__init__()
        given = {"": target} if isinstance(target, nn.Module) else _mapping(target)
        self.single = isinstance(target, nn.Module)
        self.places = {key: unwrap(part) for key, part in given.items() if isinstance(part, nn.Module)}
        self.plain = _plain({key: part for key, part in given.items() if not isinstance(part, nn.Module)}, self.places)
        self.parts = nn.ModuleList(self.places.values())
        self.functions = (loss_fn,)  # in a tuple, since a loss that is a module is no part of the model
        self.known_to_use = self.known_to_be_whole = False
        self._refuse_jit()

    def forward(self, plain: Mapping[str, Tensor], then: Callable[[Tensor], T], batch: tuple) -> T:
        argument = self.places[""] if self.single else {**self.places, **plain}
        if not self.known_to_use:
            self._refuse_ignored(batch)
        loss = _scalar(self.functions[0](argument, *batch))
        if not self.known_to_be_whole:
            _refuse_reentrant(loss)
            self.known_to_be_whole = True
        return then(loss)

    def named(self) -> dict[str, tuple[str, Tensor]]:
        """By the name within this module: the parameter's own name, wrappers' prefixes stripped, and the live tensor."""
        keys = list(self.places)
        found = {}
        for raw, tensor in self.named_parameters():
            _, place, inner = raw.split(".", 2)
            key = keys[int(place)]
            found[raw] = (f"{key}.{_shown(self.places[key], inner)}" if key else _shown(self.places[key], inner), tensor)
        return found | {name: (name, tensor) for name, tensor in self.plain.items()}

    def _refuse_ignored(self, batch: tuple) -> None:
        """Call the loss function with something that cannot be used: one that does not notice ignores its argument."""
        before = randomness()
        try:
            self.functions[0](_Unusable(), *batch)
        except Exception:  # noqa: BLE001 - whatever it raised, it needed its argument, or fails in earnest just below
            self.known_to_use = True
        finally:
            set_randomness(before)
        if not self.known_to_use:
            raise ProbeError(
                "loss_fn ignores the model it is given: a probe moves the weights of its argument, so compute the loss with "
                "that, as in lambda model: criterion(model(x), y)"
            )

    def _refuse_jit(self) -> None:
        for module in self.parts.modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ProbeError(
                    f"{module.original_name} is a scripted module, whose weights cannot be exchanged; probe the original"
                )


class _Used(Exception):  # noqa: N818 - a signal, not an error
    pass


def _use(self: object, *args: object, **kwargs: object) -> NoReturn:
    raise _Used


class _Unusable:
    """Stands for the model, and says so when it is touched."""

    __getattr__ = __call__ = __getitem__ = __iter__ = __len__ = __bool__ = __contains__ = _use


def unwrap(module: nn.Module) -> nn.Module:
    """The model within `torch.compile`, DDP and DataParallel wrappers, which must not see a probe's passes."""
    while True:
        if isinstance(module, DistributedDataParallel | DataParallel):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def _check_arguments(loss_fn: Callable, batched: bool) -> None:
    """Raise when the loss function cannot be called the way it will be."""
    if not callable(loss_fn):
        raise ArgumentTypeError(f"loss_fn is a function of the model that gives its loss, not {type(loss_fn).__name__}")
    call = ("model", "batch") if batched else ("model",)
    try:
        inspect.signature(loss_fn).bind(*call)
    except TypeError as error:
        raise ArgumentTypeError(f"loss_fn is called as loss_fn({', '.join(call)}) here, and cannot be: {error}") from None
    except ValueError:  # a builtin that does not tell
        pass


def _shown(module: nn.Module, raw: str) -> str:
    """A parameter's name without the prefixes of wrappers."""
    *path, leaf = raw.split(".")
    words = []
    for child in path:
        wraps = child == "module" and isinstance(module, DistributedDataParallel | DataParallel)
        if not wraps and child not in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"):
            words.append(child)
        module = module._modules[child]  # type: ignore[assignment]
    return ".".join([*words, leaf])


def _mapping(target: object) -> Mapping[str, Any]:
    if not isinstance(target, Mapping) or not all(isinstance(key, str) for key in target):
        raise ArgumentTypeError(
            f"a probe takes a torch.nn.Module, or a mapping of names to modules and tensors, not {type(target).__name__}"
        )
    return target


def _plain(given: Mapping[str, Any], places: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a mapping. Where nothing says that it requires a gradient, every real or complex one does."""
    tensors = {}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Tensor | int | float | complex | np.ndarray | np.generic):
            raise ArgumentTypeError(f"{name!r} is {type(value).__name__}: a probe takes modules, tensors and numbers")
        tensors[name] = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=_number(value))
    if not places and not any(tensor.requires_grad for tensor in tensors.values()):
        floating = {name for name, tensor in tensors.items() if tensor.is_floating_point() or tensor.is_complex()}
        tensors = {n: tensor.detach().requires_grad_() if n in floating else tensor for n, tensor in tensors.items()}
    return tensors


def _number(value: Any) -> torch.dtype:
    return torch.complex128 if np.iscomplexobj(value) else torch.float64


def _varies(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a parameter to differentiate by; an error for one that has no values of its own."""
    if not tensor.requires_grad:
        return False
    if isinstance(tensor, UninitializedTensorMixin):
        raise ProbeError(f"parameter {name!r} has no shape yet: run the model once, then probe it")
    if hasattr(tensor, "to_local"):
        raise ProbeError(f"parameter {name!r} is sharded (a DTensor); probe the model before it is sharded, on one process")
    if tensor.is_meta:
        raise ProbeError(f"parameter {name!r} is on the meta device and has no values to differentiate at")
    return True


def _describe(named: Sequence[tuple[str, Tensor]]) -> Parameters:
    return Parameters(
        tuple(name for name, _ in named),
        tuple(tuple(tensor.shape) + ((2,) if tensor.is_complex() else ()) for _, tensor in named),
        tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in named),
    )


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _scalar(loss: object) -> Tensor:
    if not isinstance(loss, Tensor):
        raise ProbeError(f"loss_fn returned {type(loss).__name__}, not a tensor; return the loss itself, without .item()")
    if loss.numel() != 1 or not loss.dtype.is_floating_point:
        raise ProbeError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)} and {loss.dtype}; a loss is one real number: "
            f"return its mean or sum"
        )
    return loss.reshape(())


def _refuse_reentrant(loss: Tensor) -> None:
    """A reentrant checkpoint hides the weights within it from `autograd.grad`: they would seem to have no gradient."""
    if "CheckpointFunctionBackward" in nodes(loss):
        raise ProbeError(
            "the model uses reentrant activation checkpointing, whose backward reaches only live parameters; use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


def nodes(*outputs: Tensor) -> set[str]:
    """The names of the operations that a backward from these would run."""
    names, seen = set(), set()
    queue = [output.grad_fn for output in outputs]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        queue.extend(parent for parent, _ in node.next_functions)
    return names


# --- what must be as it was -------------------------------------------------------------------------------------------

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


# --- what torch says, in terms of what to do --------------------------------------------------------------------------

_EXPLAINED = {
    "modified by an inplace operation": "the backward of this loss fails: a value that it needs was changed in place after "
    "it was used (x += y, relu(inplace=True), an assignment to x[...]); compute into a new tensor there",
    "not implemented for 'Double'": "an operation of this model does not exist in float64, where this probe computes",
}


@contextmanager
def explained(more: Mapping[str, str] | None = None) -> Iterator[None]:
    """Raise torch's known errors as what they mean here."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ProbeError):
            raise
        for known, meaning in {**_EXPLAINED, **(more or {})}.items():
            if known in str(error):
                raise ProbeError(f"{meaning} (torch: {str(error).splitlines()[0]})") from error
        raise
