"""A place where a loss is computed and differentiated without leaving a trace on the model.

    L(w, batch) = loss_fn(the model with weights w, batch)

`IsolatedLoss` makes of a model and a loss function that function of its weights. Every tensor that the modules hold is
copied once, and the copies stand in its place for the time of one evaluation. Each parameter is mapped once, by its
identity: tied weights stay tied, a module that is registered twice is one module, and hooks that sit on the live parameters
(a watching lens, the user's own) never see a probe. What a forward writes into (running statistics, counters, weights) is
copied again before the next evaluation, so that each starts from the same weights, buffers and attributes.

Modules, tensors and generators that the loss function can reach besides its argument (`reach`) are protected likewise.
Afterwards everything is as it was, by identity, also when the loss raises and wherever Ctrl-C stops it (`interrupts`).
What it cannot undo is what a loss function does elsewhere: files, the insides of other objects. Hooks that the user put on
modules run at each evaluation, as at each forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from gradlens.errors import ArgumentError, GradlensWarning, ProbeError
from gradlens.probes import float64
from gradlens.probes.draws import Draws
from gradlens.probes.interrupts import OPEN, uninterrupted
from gradlens.probes.loss import Loss, Target, check_arguments, varies
from gradlens.probes.stand_ins import StandIns
from gradlens.probes.untouched import (
    ModuleState,
    ProcessState,
    compiled,
)
from gradlens.records import Parameters
from gradlens.selection import Select, check, predicate

T = TypeVar("T")


class IsolatedLoss:
    """`loss_fn` as a function of private weights; a context manager.

    `weights` are the leaves to differentiate by and to move, one real tensor a chosen parameter (a complex one ends with an
    axis of 2); `parameters` says their names, shapes and dtypes in the model. With `wide` all is computed in float64. With
    `hold_cuts` what the first evaluation cut off (`detach()`, `no_grad()`) has the same values in those that follow.
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
        hold_cuts: bool = False,
    ) -> None:
        check_arguments(loss_fn, batched)
        self._loss = Loss(target, loss_fn)
        self._named = self._loss.named
        trainable = {name: tensor for name, tensor, _ in self._named if varies(name, tensor)}
        if not trainable:
            raise ArgumentError("nothing to differentiate by: no parameter of the model requires a gradient")
        check(select, trainable)
        chosen = {name for name, tensor in trainable.items() if predicate(select)(name, tensor)}
        self._chosen = [(name, tensor, owner) for name, tensor, owner in self._named if name in chosen]
        self.all_names = tuple(trainable)
        self.parameters = _describe([(name, tensor) for name, tensor, _ in self._chosen])
        self.weights: list[Tensor] = []
        self._hold_cuts = hold_cuts
        self._mode = float64.Float64(hold_cuts) if wide or hold_cuts else None
        self._in_place: float64.InPlace | None = None  # instead of the mode
        self._wide = wide
        self._generators: list[Any] = []
        self._differentiates: bool | None = None  # whether the loss itself needs gradients; None: not tried
        self.draws = Draws()
        self._closed = True

    def __enter__(self) -> Self:
        self._process = ProcessState([*self._loss.reach.generators.values(), *self._generators])
        self.draws.begin(self._process, own=bool(self._loss.reach.generators))
        modules = self._modules()
        self._state = ModuleState(modules)
        self._inside = False
        self._closed = False
        OPEN.blocks.append(self)
        try:
            self._process.enter(self._wide, compiled())
            self.weights = [_real(_copy(name, tensor, self._cast)).contiguous() for name, tensor, _ in self._chosen]
            reached = self._loss.reach.tensors
            places = {id(tensor): place for place, tensor in enumerate(self.tensors())}
            self._stand_ins = StandIns(modules, self._state, places, self.tensors(), self._loss.plain, reached, self._cast)
            self.weights = [nn.Parameter(w) for w in self.weights]
            self._stand_ins.born(self.weights)
        except BaseException:
            uninterrupted(self.close)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        uninterrupted(self.close)

    def close(self) -> None:
        """Put everything back; once more does no harm."""
        if not self._closed:
            self._put_back()
            self._process.put_back()
            self.weights = []
            self._mode, self._in_place = self._mode and self._mode.closed(), None
            self._stand_ins = StandIns.none()
            self._closed = True
        if self in OPEN.blocks:
            OPEN.blocks.remove(self)

    def keep(self, generators: Sequence[Any]) -> None:
        """Put these generators back at the end too; before entering."""
        self._generators += generators

    def evaluate(self, then: Callable[[Tensor], T], *batch: Any, at: Sequence[Tensor] | None = None) -> T:
        """`then(loss)`, with the weights still in place: a backward may run checkpointed forwards again.

        `at`: other values than `weights`, which stand in their places for this evaluation.
        """
        if not self._loss.known_to_use:
            self._refuse_ignored(batch)
        weights = self.weights if at is None else at
        if self._in_place is None:
            return self._evaluated(then, batch, weights)
        # A branch that is taken for the first time may bring a narrow tensor, or write into an input.
        drawn, versions = self.draws.state(), self._in_place.versions()
        with suppress(RuntimeError, TypeError):  # what is wrong in earnest is raised below
            result = self._evaluated(then, batch, weights)
            if self._in_place.versions() == versions:
                return result
        self.watch_operations()
        self.draws.put_back(drawn)
        return self._evaluated(then, batch, weights)

    def _evaluated(self, then: Callable[[Tensor], T], batch: tuple, weights: Sequence[Tensor]) -> T:
        self._inside = True
        try:
            self._stand_ins.swap_in(weights)
            if self._in_place is not None:
                self._in_place.swap_in()
            elif self._mode is not None:
                self._mode.__enter__()  # and left by `_put_back`, which an interrupt cannot skip
            loss = self._loss(self._stand_ins.plain(), batch)
            if self._mode is not None:
                self._mode.backward_begins()
            result = then(loss)
        except RuntimeError as error:
            explain(error)
            raise
        finally:
            self._put_back()  # `close` does it again, should an interrupt come here
        self._check_written(at=weights)
        return result

    def _refuse_ignored(self, batch: tuple) -> None:
        """See whether the loss function uses its argument, with the copies in place, since it may write into them."""
        before = ProcessState(self._loss.reach.generators.values()) if batch else self._process  # nothing was drawn yet
        self._inside = True
        try:
            self._stand_ins.swap_in(self.weights)
            if self._mode is not None:
                self._mode.__enter__()
                self._mode.backward_begins()  # nothing is cut off yet
            self._loss.refuse_ignored(batch, before)
        finally:
            self._put_back()
        self._check_written(whole=False)

    def loss(self, *batch: Any, at: Sequence[Tensor] | None = None) -> float:
        """The loss at the current weights, or `at` others."""
        if self._differentiates is None and at is None:
            return self._first_loss(batch)
        with torch.set_grad_enabled(self._differentiates is not False):
            return self.evaluate(_number, *batch, at=at)

    def loss_again(self, first: float, *batch: Any) -> float:
        """The loss a second time, with the random numbers that `gradient` gave it `first` with; found without gradients
        and without a mode where that gives the same, as nearly always, and then all later ones are."""

        def without_gradients() -> float:
            with torch.no_grad():
                return self.evaluate(_number, *batch)

        if not self._hold_cuts:
            with suppress(RuntimeError):
                if self.again(without_gradients, lambda found: found == first) == first:
                    self._differentiates = False
                    return first
        self.draws.rewind()
        return self.loss(*batch)

    def again(self, compute: Callable[[], T], same: Callable[[T], bool]) -> T:
        """`compute()` from the random numbers of the start: without the float64 mode if what it gives is the `same`, bit for
        bit, and so all later ones are."""
        held = self._loss.reach.tensors.values()
        inputs = self._mode.inputs(held) if self._mode is not None and self._in_place is None else None
        if inputs is not None:
            self._in_place = float64.InPlace(inputs)
            self.draws.rewind()
            with suppress(RuntimeError, TypeError):  # what is wrong in earnest is raised just below
                found = compute()
                if same(found):
                    return found
            self.watch_operations()
        self.draws.rewind()
        return compute()

    def watch_operations(self) -> bool:
        """From now on with the float64 mode at each operation; whether that makes a difference."""
        differs, self._in_place = self._in_place is not None, None
        return differs

    def gradient(self, *batch: Any, sparse: bool = False) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and its partials by each of `weights`; None where it does not depend on a parameter.

        `sparse` leaves those sparse that autograd gives sparse.
        """
        return self.evaluate(lambda loss: (loss.detach(), self.grad(loss, sparse=sparse)), *batch)

    def grad(
        self,
        outputs: Tensor | Sequence[Tensor],
        seeds: Tensor | Sequence[Tensor] | None = None,
        *,
        create_graph: bool = False,
        retain_graph: bool = False,
        by: Sequence[Tensor] | None = None,
        sparse: bool = False,
    ) -> list[Tensor | None]:
        """Partials by each of `weights`, or `by` some of them, called within `evaluate`: of an output, or of several,
        each times its seed, together."""
        by = self.weights if by is None else by
        listed = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        given = [None] * len(listed) if seeds is None else [seeds] if isinstance(seeds, Tensor) else list(seeds)
        pairs = [(x, torch.ones_like(x) if s is None else s) for x, s in zip(listed, given, strict=True) if x.requires_grad]
        if not pairs:
            return [None] * len(by)
        roots, starts = zip(*pairs, strict=True)
        keep = create_graph or retain_graph
        if self._mode is not None:
            found = float64.grad(roots, by, starts, create_graph, keep)
        else:
            found = list(torch.autograd.grad(roots, by, starts, keep, create_graph, allow_unused=True))
        return [g.to_dense() if g is not None and g.is_sparse and not sparse else g for g in found]

    def tensors(self) -> list[Tensor]:
        """The model's own parameters, in the order of `weights`."""
        return [tensor for _, tensor, _ in self._chosen]

    def copied(self) -> list[Tensor]:
        """All parameters and buffers that private copies are made of, chosen or not, each once."""
        modules = self._modules()
        held = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        return list({id(tensor): tensor for tensor in (*held, *self.tensors())}.values())

    def live(self) -> list[Tensor]:
        """Their values: `weights` are copies of these."""
        return [_real(tensor.detach()) for tensor in self.tensors()]

    def owners(self) -> list[nn.Module | None]:
        """The module that owns each of `weights`; None for a plain tensor."""
        return [owner for _, _, owner in self._chosen]

    @property
    def training(self) -> str:
        """The mode of the modules: `train`, `eval`, or `mixed`."""
        modes = {module.training for module in self._loss.modules()}
        return "mixed" if len(modes) > 1 else "eval" if modes == {False} else "train"

    @property
    def narrow(self) -> tuple[str, ...]:
        """Operations that gave results of less than float64 in spite of `wide`."""
        return tuple(sorted(self._mode.narrow)) if self._mode is not None and self._wide else ()

    @property
    def coarse(self) -> tuple[str, ...]:
        """Of these, operations that do not exist in float64 and were computed in the precision that they have."""
        return tuple(sorted(self._mode.coarse)) if self._mode is not None else ()

    # --- how ----------------------------------------------------------------------------------------------------------

    def _modules(self) -> list[nn.Module]:
        """Those of the target, and those that the loss function reaches besides."""
        found = {id(module): module for module in self._loss.modules()}
        for other in self._loss.reach.modules.values():
            found.update((id(module), module) for module in other.modules() if _protectable(module))
        return list(found.values())

    def _put_back(self) -> None:
        """After an evaluation: the modules, and the modes that the evaluation may have been stopped in."""
        if self._inside:
            self._process.leave_modes()
            if self._in_place is not None:
                self._in_place.swap_out()
            self._stand_ins.swap_out()
            self._state.put_back()
            self._inside = False

    def _check_written(self, whole: bool = True, at: Sequence[Tensor] | None = None) -> None:
        """Undo what an evaluation wrote into the copies."""
        lost = self._stand_ins.renew(self.weights if at is None else at, whole)
        if lost:
            warnings.warn(
                f"loss_fn writes into {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}, which a probe finds and does "
                f"not put back, being large: it is not as it was; let loss_fn write into a copy",
                GradlensWarning,
                stacklevel=5,
            )

    def _first_loss(self, batch: tuple) -> float:
        """The loss, and whether it is another, or fails, without gradients: it differentiates within (a penalty, an inner
        loop)."""
        self._differentiates = True
        if self._hold_cuts:
            return self.loss(*batch)
        before = ProcessState(self._loss.reach.generators.values())
        with torch.enable_grad():
            value = self.evaluate(_number, *batch)
        before.rewind()
        try:
            with torch.no_grad():
                other = self.evaluate(_number, *batch)
        except RuntimeError:
            self._check_written()
            before.rewind()
            return self.loss(*batch)
        self._differentiates = not (other == value or (other != other and value != value))
        return value

    def _cast(self, tensor: Tensor) -> Tensor:
        return float64.widen(tensor) if self._wide else tensor


def _copy(name: str, tensor: Tensor, cast: Callable[[Tensor], Tensor]) -> Tensor:
    try:
        wide = cast(tensor.detach())
        return wide.clone() if wide.dtype == tensor.dtype else wide
    except RuntimeError as error:
        raise ProbeError(f"parameter {name!r} ({tensor.dtype}) cannot be copied for a probe: {error}") from error


def _number(loss: Tensor) -> float:
    with torch._C.DisableTorchFunction():
        return loss.item()


def _protectable(module: nn.Module) -> bool:
    """Whether its tensors can be copied: no scripted module, none whose weights are spread over processes."""
    return not isinstance(module, torch.jit.ScriptModule) and not any(
        hasattr(p, "to_local") or p.is_meta for p in module._parameters.values() if p is not None
    )


def _describe(named: Sequence[tuple[str, Tensor]]) -> Parameters:
    return Parameters(
        tuple(name for name, _ in named),
        tuple(tuple(tensor.shape) + ((2,) if tensor.is_complex() else ()) for _, tensor in named),
        tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in named),
    )


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


# --- what torch says, in terms of what to do --------------------------------------------------------------------------

_EXPLAINED = {
    "modified by an inplace operation": "the backward of this loss fails: a value that it needs was changed in place after "
    "it was used (x += y, relu(inplace=True), an assignment to x[...]); compute into a new tensor there",
    "a leaf Variable that requires grad is being used in an in-place operation": "the forward changes a weight in place "
    "while it is differentiated; write into a copy, or under torch.no_grad()",
    "backward through the graph a second time": "loss_fn differentiates its loss itself, as by loss.backward(); return the "
    "loss before that, without backward() and step()",
    "Inference tensors cannot be saved": "an input was made in torch.inference_mode(), and cannot take part in a gradient; "
    "give x.clone() in its place",
    "not implemented for 'Double'": "an operation of this model does not exist in float64, where this probe computes",
}


def explain(error: RuntimeError) -> None:
    """Raise torch's known errors as what they mean here; let others pass."""
    if isinstance(error, ProbeError):
        return
    for known, meaning in _EXPLAINED.items():
        if known in str(error):
            raise ProbeError(f"{meaning} (torch: {str(error).splitlines()[0]})") from error
