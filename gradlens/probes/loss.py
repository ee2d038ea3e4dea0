"""A loss function, and what it is a function of.

Here targets are taken apart (a module, or a mapping of names to modules and tensors), parameters get their names, and what
cannot be probed is refused with a reason.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from gradlens.errors import ArgumentTypeError, ProbeError
from gradlens.probes.reach import reach
from gradlens.probes.untouched import ProcessState
from gradlens.unwrapping import plain_name, unwrap_model

Target = nn.Module | Mapping[str, Any]


class Loss:
    """The loss function, the modules and tensors that it is a function of, and the names of their parameters."""

    def __init__(self, target: Target, loss_fn: Callable[..., Tensor]) -> None:
        given = {"": target} if isinstance(target, nn.Module) else _mapping(target)
        self.single = isinstance(target, nn.Module)
        self.places = {key: unwrap_model(part) for key, part in given.items() if isinstance(part, nn.Module)}
        self.plain = _plain({key: part for key, part in given.items() if not isinstance(part, nn.Module)}, self.places)
        self.function = loss_fn
        self.reach = reach(loss_fn)  # beside what it is given
        self.known_to_use = self.known_to_be_whole = False
        self._refuse_jit()
        self.named = self._named()
        self._live = {id(tensor): name for name, tensor, _ in self.named}

    def __call__(self, plain: Mapping[str, Tensor], batch: tuple) -> Tensor:
        argument = self.places[""] if self.single else {**self.places, **plain}
        loss = self.function(argument, *map(_fresh, batch))
        with torch._C.DisableTorchFunction():  # a mode need not see what is asked of the result
            loss = _scalar(loss)
        if not self.known_to_be_whole and loss.requires_grad:
            run = graph(loss)
            _refuse_reentrant(run)
            self._refuse_live(run)
            self.known_to_be_whole = True
        return loss

    def modules(self) -> list[nn.Module]:
        """All modules of the target, each once."""
        found = {id(module): module for place in self.places.values() for module in place.modules()}
        return list(found.values())

    def _named(self) -> list[tuple[str, Tensor, nn.Module | None]]:
        """Each parameter once: its name without wrappers' prefixes, the live tensor, and the module that owns it."""
        found: dict[int, tuple[str, Tensor, nn.Module | None]] = {}
        for key, place in self.places.items():
            for raw, tensor in place.named_parameters():
                name = plain_name(place, raw)
                owner = place.get_submodule(raw.rpartition(".")[0])
                found.setdefault(id(tensor), (f"{key}.{name}" if key else name, tensor, owner))
        return [*found.values(), *((name, tensor, None) for name, tensor in self.plain.items())]

    def refuse_ignored(self, batch: tuple, before: ProcessState) -> None:
        """Call the loss function with something that cannot be used: one that does not notice ignores its argument."""
        try:
            self.function(_Unusable(), *map(_fresh, batch))
        except Exception:  # noqa: BLE001 - whatever it raised, it needed its argument, or fails in earnest just below
            self.known_to_use = True
        finally:
            before.rewind()
        if not self.known_to_use:
            raise ProbeError(
                "loss_fn ignores the model it is given: a probe moves the weights of its argument, so compute the loss with "
                "that, as in lambda model: criterion(model(x), y)"
            )

    def _refuse_live(self, run: set[Node]) -> None:
        """A weight that the loss takes from elsewhere stays put when a probe moves it: its partial would be wrong."""
        leaves = {id(getattr(node, "variable", None)) for node in run}
        reached = [name for known, name in self._live.items() if known in leaves]
        if reached:
            raise ProbeError(
                f"loss_fn reaches {len(reached)} parameters of the model ({', '.join(reached[:3])}"
                f"{', ...' if len(reached) > 3 else ''}) past the model that it is given: in a variable from outside, or in "
                f"a plain list of the model (use nn.ParameterList). A probe could not move them; take all weights from the "
                f"argument, as in sum(p.square().sum() for p in model.parameters())"
            )

    def _refuse_jit(self) -> None:
        for module in self.modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ProbeError(
                    f"{module.original_name} is a scripted module, whose weights cannot be exchanged; probe the original"
                )


def _fresh(batch: Any) -> Any:
    """A batch that may be taken apart: `labels = batch.pop("labels")` must not be felt by the next evaluation."""
    return copy.copy(batch) if isinstance(batch, list | MutableMapping) else batch


class _Used(Exception):  # noqa: N818 - a signal, not an error
    pass


def _use(self: object, *args: object, **kwargs: object) -> NoReturn:
    raise _Used


class _Unusable:
    """Stands for the model, and says so when it is touched."""

    __getattr__ = __call__ = __getitem__ = __iter__ = __len__ = __bool__ = __contains__ = _use


def check_arguments(loss_fn: Callable, batched: bool) -> None:
    """Raise when the loss function cannot be called the way it will be."""
    if not callable(loss_fn):
        raise ArgumentTypeError(f"loss_fn is a function of the model that gives its loss, not {type(loss_fn).__name__}")
    call = ("model", "batch") if batched else ("model",)
    if isinstance(loss_fn, nn.modules.loss._Loss) or getattr(loss_fn, "__module__", "") == "torch.nn.functional":
        of, argument = ("model, batch", "batch[0]), batch[1]") if batched else ("model", "x), y")
        raise ArgumentTypeError(
            f"loss_fn is called as loss_fn({of}) here, and {getattr(loss_fn, '__name__', type(loss_fn).__name__)} takes "
            f"predictions and targets: give lambda {of}: criterion(model({argument})"
        )
    try:
        inspect.signature(loss_fn).bind(*call)
    except TypeError as error:
        raise ArgumentTypeError(f"loss_fn is called as loss_fn({', '.join(call)}) here, and cannot be: {error}") from None
    except ValueError:  # a builtin that does not tell
        pass


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


def _scalar(loss: object) -> Tensor:
    if not isinstance(loss, Tensor):
        raise ProbeError(f"loss_fn returned {_described(loss)}")
    if loss.numel() != 1 or not loss.dtype.is_floating_point:
        raise ProbeError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)} and {loss.dtype}; a loss is one real number: "
            f"return its mean or sum"
        )
    return loss.reshape(()) if loss.ndim else loss


def _described(loss: Any) -> str:
    """What was returned that is no tensor, and what to return."""
    kind = type(loss).__name__
    if loss is None:
        return "None, not a tensor; end it with return loss"
    if isinstance(loss, tuple | list):
        at = next((i for i, item in enumerate(loss) if isinstance(item, Tensor) and item.numel() == 1), 0)
        return f"{kind} of {len(loss)}, not a tensor; return the loss alone, as in lambda ...: loss_fn(...)[{at}]"
    if isinstance(loss, Mapping) and "loss" in loss and not hasattr(loss, "loss"):
        return f'{kind}, not a tensor; return its entry "loss"'
    if isinstance(getattr(loss, "loss", None), Tensor):
        return f"{kind}, not a tensor; return its loss, as in model(**batch).loss"
    if isinstance(loss, float | int | np.ndarray | np.generic):
        return f"{kind}, not a tensor; return the loss itself, without .item(), float() or .numpy()"
    return f"{kind}, not a tensor; return the loss, one real number as a tensor"


def _refuse_reentrant(run: set[Node]) -> None:
    """A reentrant checkpoint hides the weights within it from `autograd.grad`: they would seem to have no gradient."""
    if any(node.name() == "CheckpointFunctionBackward" for node in run):
        raise ProbeError(
            "the model uses reentrant activation checkpointing, whose backward reaches only live parameters; use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


def nodes(*outputs: Tensor) -> set[str]:
    """The names of the operations that a backward from these would run."""
    return {node.name() for node in graph(*outputs)}


def graph(*outputs: Tensor) -> set[Node]:
    """The operations that a backward from these would run."""
    seen = set[Node]()
    queue = [output.grad_fn for output in outputs]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        queue.extend(parent for parent, _ in node.next_functions)
    return seen


def varies(name: str, tensor: Tensor) -> bool:
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
