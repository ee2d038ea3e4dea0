"""One real step of the optimizer taken apart: what the gradient asked for, what was done, and what came of it.

    loss.backward()
    with dissect(model, optimizer, lambda model: criterion(model(x), y)) as step:
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(step)

*Wish and deed.* Some weights move against their own gradient (g * dw > 0). `statistics.attribution` computes the step again
without momentum, weight decay, clipping or per-weight scaling, and blames what made the difference.

*What came of it.* The change of the loss is the integral of the gradient along the move, and so a sum over weights (loss
change allocation; Lan et al. 2019):

    L(w + dw) - L(w) = sum_i  dw_i * integral of g_i(w + s dw) over s from 0 to 1

by the five-point rule of Gauss and Lobatto, in float64, with the same random numbers at each point. At s = 0 it is the
first-order change g.dw. The slopes at both ends say where the step ended on the parabola along it (`alpha`).

The step is the user's own: nothing is repeated on a copy, and nothing of it is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from gradlens.errors import ArgumentTypeError, GradlensError, ProbeError
from gradlens.probes.interrupts import leaves_no_trace
from gradlens.probes.isolated_loss import IsolatedLoss
from gradlens.probes.loss import Target
from gradlens.probes.per_weight import sampled
from gradlens.probes.step_report import Path, StepReport
from gradlens.selection import Select
from gradlens.statistics.attribution import CAUSES, KINDS, causes, kind_of, summed
from gradlens.statistics.evidence import flat
from gradlens.unwrapping import unwrap_optimizer

#: Nodes and weights of the five-point Gauss-Lobatto rule on [0, 1]: exact for polynomials of degree seven, ends included.
NODES = (0.0, 0.5 - (3 / 28) ** 0.5, 0.5, 0.5 + (3 / 28) ** 0.5, 1.0)
SHARES = (1 / 20, 49 / 180, 16 / 45, 49 / 180, 1 / 20)
_STATE = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def dissect(
    model: Target,
    optimizer: Optimizer | Iterable[Optimizer],
    loss_fn: Callable[[Any], Tensor] | None = None,
    *,
    scaler: Any = None,
    sample: int | float | None = None,
    select: Select = None,
) -> Dissection:
    """Take apart the optimizer's step that is made within the `with` block; what comes of it answers as a `StepReport`.

    Enter it after `backward()` and before clipping, or before `backward()`: the gradient of the loss is the one that
    backward left. `loss_fn(model) -> scalar`, the loss on the step's batch, adds what the step did to it, by parameter and
    by weight; it costs five gradients in float64. `scaler`: the `GradScaler`, to unscale by.

    Memory: copies of the weights, of two gradients and of the optimizer's state, and 41 bytes, of each weight looked at.
    `sample` looks at so many weights (an int), or such a share of them (a float), spread evenly; `select` at some
    parameters (for `loss_fn`, the others stay where the step left them).

    Steps of SGD, Adam and AdamW are explained; those of other optimizers, and of subclasses, are blamed on `unknown`.
    """
    return Dissection(model, optimizer, loss_fn, scaler, sample, select)


class Dissection:
    """The context manager of `dissect`. Once its block is over, it has what a `StepReport` has, and prints as one."""

    def __init__(
        self,
        model: Target,
        optimizer: Optimizer | Iterable[Optimizer],
        loss_fn: Callable[[Any], Tensor] | None,
        scaler: Any,
        sample: int | float | None,
        select: Select,
    ) -> None:
        self._optimizers = _unwrapped(optimizer)
        self._explained = loss_fn is not None
        self._isolated = IsolatedLoss(model, loss_fn or _none, select=select, wide=self._explained)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._at = sampled([w.numel() for w in self._isolated.live()], sample)
        self._report: StepReport | None = None
        self._failed: Exception | None = None
        self._why = "its block has not been run yet"

    # --- the block --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        live = self._isolated.live()
        self._indices = [
            None if i is None else torch.from_numpy(i).to(w.device) for i, w in zip(self._at, live, strict=True)
        ]
        self._whole = [w.clone() for w in live] if self._explained else []
        self._before = [self._part(i, w) for i, w in enumerate(self._whole or live)]
        owner = {id(p): (o, group) for o in self._optimizers for group in o.param_groups for p in group["params"]}
        self._owners = [owner.get(id(p)) for p in self._isolated.tensors()]
        n = len(live)
        self._wish: list[Tensor | None] = [None] * n
        self._used: list[Tensor | None] = [None] * n
        self._state: list[dict[str, Any]] = [{} for _ in range(n)]
        self._hyper: list[dict[str, Any]] = [{} for _ in range(n)]
        self._steps, self._active, self._wish_known = 0, set[int](), True
        for i, p in enumerate(self._isolated.tensors()):
            self._wished(i, p, self._pending(i))
        self._handles = [h for o in self._optimizers for h in self._listen(o)]
        self._bare = [p for p in self._isolated.tensors() if p._post_accumulate_grad_hooks is None]
        for i, p in enumerate(self._isolated.tensors()):
            self._handles.append(p.register_post_accumulate_grad_hook(self._guarded(lambda q, i=i: self._accumulated(i, q))))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        for p in self._bare:
            if not p._post_accumulate_grad_hooks:
                p._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        self._bare = []
        if kind is not None:
            self._why = f"its block raised {kind.__name__}"
        elif self._failed is None:
            try:
                self._report = self._taken_apart() if self._steps else None
                self._why = "no optimizer's step() ran in its block (a GradScaler skips steps that are not finite)"
            except Exception as failure:  # noqa: BLE001 - the training loop goes on; asking for the result raises it
                self._failed = failure
        self._before, self._whole, self._used, self._wish, self._state = [], [], [], [], []

    def _listen(self, optimizer: Optimizer) -> list[Any]:
        pre = self._guarded(self._stepping)
        post = self._guarded(self._stepped)
        return [optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)]

    def _guarded(self, call: Callable[..., None]) -> Callable[..., None]:
        """A hook that never raises."""

        def hook(*args: Any) -> None:
            try:
                with torch.no_grad():
                    call(*args)
            except Exception as failure:  # noqa: BLE001 - nothing of ours is raised in a training step
                self._failed = self._failed or failure

        hook._torchdynamo_disable = True  # type: ignore[attr-defined]
        return hook

    def _accumulated(self, i: int, p: Tensor) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._wish_known = False  # it may be of this rank alone, and is averaged after the hook
        self._wished(i, p, True)

    def _wished(self, i: int, p: Tensor, scaled: bool) -> None:
        """Keep the gradient that backward left."""
        if p.grad is not None:
            g = self._part(i, p.grad)
            self._wish[i] = g / self._scaler.get_scale() if scaled and self._scaler is not None else g

    def _pending(self, i: int) -> bool:
        """Whether `.grad` is still multiplied by the loss scale."""
        owner = self._owners[i]
        if self._scaler is None or owner is None:
            return self._scaler is not None
        state = self._scaler._per_optimizer_states.get(id(owner[0]))
        return state is None or state["stage"] is OptState.READY

    def _stepping(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if id(optimizer) in self._active:  # a subclass that calls super().step()
            return
        self._active.add(id(optimizer))
        self._steps += 1
        late = bool(args[1:] or kwargs.get("closure")) or getattr(optimizer, "grad_scale", None) is not None
        self._wish_known = self._wish_known and not (args[1:] or kwargs.get("closure"))
        for i, p in self._members(optimizer):
            owner = self._owners[i]
            assert owner is not None
            state = optimizer.state.get(p, {})
            self._state[i] = {name: self._part(i, state[name]) for name in _STATE if isinstance(state.get(name), Tensor)}
            if "step" in state:
                self._state[i]["step"] = float(state["step"])
            self._hyper[i] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in owner[1].items() if k != "params"}
            if not late:
                self._use(i, p)

    def _stepped(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._active.discard(id(optimizer))
        for i, p in self._members(optimizer):
            if self._used[i] is None:
                self._use(i, p)

    def _members(self, optimizer: Optimizer) -> list[tuple[int, Tensor]]:
        tensors = self._isolated.tensors()
        return [(i, tensors[i]) for i, owner in enumerate(self._owners) if owner is not None and owner[0] is optimizer]

    def _use(self, i: int, p: Tensor) -> None:
        self._used[i] = None if p.grad is None else self._part(i, p.grad)

    def _part(self, i: int, tensor: Tensor) -> Tensor:
        """A copy of the entries looked at, flat and real."""
        tensor = tensor.detach()
        tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
        tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        at = self._indices[i]
        return tensor.reshape(-1).clone() if at is None else tensor.reshape(-1)[at]

    # --- the result -------------------------------------------------------------------------------------------------

    def _taken_apart(self) -> StepReport:
        parts = [self._attributed(i, w) for i, w in enumerate(self._isolated.live())]
        path, shares, failure = self._path()
        shares = shares or [torch.full_like(part[0], np.nan) for part in parts]
        value, partial, used, dw, blame = (_host([part[k] for part in parts]) for k in range(5))
        return StepReport(
            parameters=self._isolated.parameters,
            index=tuple(self._at),
            value=value,
            partial=partial,
            used=used,
            dw=dw,
            blame=blame.astype(np.uint8),
            share=_host(shares),
            attributions=tuple(part[5] for part in parts),
            kinds=tuple("" if owner is None else _name(owner[0]) for owner in self._owners),
            path=path,
            steps=self._steps,
            clipping_known=self._wish_known,
            failure=failure,
        )

    def _path(self) -> tuple[Path | None, list[Tensor], str]:
        """What the step did to the loss; where that cannot be computed, why: the causes are known without it."""
        if not self._explained:
            return None, [], ""
        try:
            path, shares = self._integrated()
        except Exception as error:  # noqa: BLE001 - the user's loss may raise anything
            return None, [], f"{type(error).__name__}: {error}"
        return path, shares, ""

    def _attributed(self, i: int, now: Tensor) -> tuple[Any, ...]:
        before, after = self._before[i], self._part(i, now)
        used = self._used[i]
        used = torch.zeros_like(before) if used is None else used
        wish = self._wish[i] if self._wish_known else None
        owner = self._owners[i]
        kind = "unknown" if owner is None else kind_of(owner[0])
        blame, moving, error = causes(kind, used, before, after, self._hyper[i], self._state[i], wish)
        bits = torch.stack([(blame[cause] > 0).double() * 2**bit for bit, cause in enumerate(CAUSES)]).sum(0)
        wide = before.double()
        partial = (used if wish is None else wish).double()
        return wide, partial, used.double(), after.double() - wide, bits, summed(blame, moving, error)

    @leaves_no_trace
    def _integrated(self) -> tuple[Path, list[Tensor]]:
        """The loss and its slopes along the way, and each weight's share of the change."""
        with self._isolated as isolated:
            start = [w.to(v.dtype) for w, v in zip(self._whole, isolated.weights, strict=True)]
            move = [v.detach() - w for w, v in zip(start, isolated.weights, strict=True)]
            sums = [torch.zeros_like(w) for w in start]
            slopes, losses = [], []
            for node, share in zip(NODES, SHARES, strict=True):
                for v, w, dw in zip(isolated.weights, start, move, strict=True):
                    with torch.no_grad():
                        v.copy_(w + node * dw)
                isolated.draws.rewind()
                loss, gradient = isolated.gradient()
                losses.append(loss.item())
                products = [torch.zeros_like(dw) if g is None else g * dw for g, dw in zip(gradient, move, strict=True)]
                slopes.append([product.sum().item() for product in products])
                for total, product in zip(sums, products, strict=True):
                    total.add_(product, alpha=share)
            allocated = np.array([total.sum().item() for total in sums])
            path = Path(
                losses[0], losses[-1], np.array(slopes), allocated, isolated.narrow, self._slope(isolated, start, move)
            )
            return path, [self._part(i, total) for i, total in enumerate(sums)]

    @staticmethod
    def _slope(isolated: IsolatedLoss, start: list[Tensor], move: list[Tensor]) -> float:
        """How fast the loss itself changes at the beginning of the way: g.dw, if g is its gradient."""
        values = []
        for node in (1e-4, -1e-4):
            for v, w, dw in zip(isolated.weights, start, move, strict=True):
                with torch.no_grad():
                    v.copy_(w + node * dw)
            isolated.draws.rewind()
            values.append(isolated.gradient()[0].item())
        return (values[0] - values[1]) / 2e-4

    @property
    def result(self) -> StepReport:
        """What was found. Raises `ProbeError` where there is nothing, with the reason."""
        if self._failed is not None:
            raise ProbeError(f"the step could not be taken apart: {self._failed}") from self._failed
        if self._report is None:
            raise ProbeError(f"this dissection has found nothing: {self._why}")
        return self._report

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.result, name)

    def __str__(self) -> str:
        return str(self.result)

    def _repr_html_(self) -> str | None:
        try:
            return self.result._repr_html_()
        except GradlensError:  # within its block: there is no result yet
            return None


def _none(model: Any) -> Tensor:
    raise AssertionError("there is no loss function")


def _unwrapped(given: Any) -> list[Optimizer]:
    listed = list(given) if isinstance(given, list | tuple | set | frozenset) else [given]
    found = []
    for wrapper in listed:
        optimizer = unwrap_optimizer(wrapper)
        if not isinstance(optimizer, Optimizer):
            raise ArgumentTypeError(f"optimizer is a torch.optim.Optimizer, or a list of them, not {type(wrapper).__name__}")
        found.append(optimizer)
    return found


def _name(optimizer: Optimizer) -> str:
    return KINDS.get(type(optimizer), f"({type(optimizer).__name__})")


def _host(parts: list[Tensor]) -> np.ndarray:
    return np.concatenate([flat(part).cpu().numpy() for part in parts])
