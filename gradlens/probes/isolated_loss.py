"""A place where a loss is computed and differentiated without leaving a trace on the model.

    L(w, batch) = loss_fn(the model with weights w, batch)

`IsolatedLoss` makes of a model and a loss function that function of its weights. The weights are private copies, put into
the model for the time of one evaluation by `torch.func.functional_call`: tied weights stay tied, and hooks that sit on the live
parameters (a watching lens, the user's own) never see them. Afterwards parameters, buffers, `.grad`, training modes,
attributes and hook dictionaries of every module, and the random states of torch, CUDA, numpy and Python are as they were,
also when the loss raises. Each evaluation starts from the same weights, buffers and attributes.

What it cannot undo is what a loss function does elsewhere: files, generators of its own, the insides of other objects.
Hooks that the user put on modules run at each evaluation, as at each forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradlens.errors import ArgumentError, ProbeError
from gradlens.probes import float64
from gradlens.probes.loss import Loss, Target, check_arguments, varies
from gradlens.probes.untouched import protected, randomness, set_randomness
from gradlens.records import Parameters
from gradlens.selection import Select, check, predicate

T = TypeVar("T")


class IsolatedLoss:
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
        check_arguments(loss_fn, batched)
        self._loss = Loss(target, loss_fn)
        self._named = self._loss.named()
        trainable = {name: tensor for name, tensor in self._named.values() if varies(name, tensor)}
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

    def tensors(self) -> list[Tensor]:
        """The model's own parameters, in the order of `weights`."""
        return [self._named[raw][1] for raw in self._chosen]

    def live(self) -> list[Tensor]:
        """Their values: `weights` are copies of these."""
        return [_real(tensor.detach()) for tensor in self.tensors()]

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


# --- what torch says, in terms of what to do --------------------------------------------------------------------------

_EXPLAINED = {
    "modified by an inplace operation": "the backward of this loss fails: a value that it needs was changed in place after "
    "it was used (x += y, relu(inplace=True), an assignment to x[...]); compute into a new tensor there",
    "not implemented for 'Double'": "an operation of this model does not exist in float64, where this probe computes",
}


@contextmanager
def explained() -> Iterator[None]:
    """Raise torch's known errors as what they mean here."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ProbeError):
            raise
        for known, meaning in _EXPLAINED.items():
            if known in str(error):
                raise ProbeError(f"{meaning} (torch: {str(error).splitlines()[0]})") from error
        raise
