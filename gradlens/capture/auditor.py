"""Looks at what is beside the gradients: the loss's graph, the modules' mode, the optimizers' settings.

It looks in the first passes, then each time the run has grown by half: a look takes some hundred microseconds. Settings are
compared at each observed step, and noted when they changed by a tenth. What it finds are facts; rules say what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradlens._torch import local_part
from gradlens.capture import features
from gradlens.capture.attachment import Attachment, parts, walk
from gradlens.capture.graph import walk as walk_graph
from gradlens.capture.losses import loss_of
from gradlens.capture.unregistered import Unregistered
from gradlens.facts import Fact, Features, Graph, Group, Modes, Settings
from gradlens.schedules import Growing

GROWTH = 1.5  #: of the steps, from look to look
EVERY = 4  #: the first so many steps are all looked at
PASSES = 4  #: backward passes of one step that are looked at
BROKEN = (
    3  #: passes that are looked at because their loss is NaN or infinite: what lies behind the last layer is still there
)
NOTICED = 0.1  #: a change of the learning rate that is noted, beside the last one noted
FIRST_CHANGES, LATER = 200, 50  #: changes that are all noted, and of which fraction of the run a later one is
NAMED = 64  #: modules that a fact names

_DROPOUT = nn.modules.dropout._DropoutNd
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


class Auditor:
    """What one lens looks at beside gradients. Nothing here raises into a training step."""

    def __init__(
        self,
        attachment: Attachment,
        optimizers: Callable[[], Iterable[Optimizer]],
        note: Callable[[Fact], None],
        fault: Callable[[str, Exception], None],
    ) -> None:
        self._attachment, self._optimizers, self._note, self._fault = attachment, optimizers, note, fault
        self._strangers = Unregistered()
        self._steps, self._step, self._passes, self._looks = Growing(GROWTH), -1, 0, False
        self._broken = 0  # looks that were taken because a loss was not finite
        self._modes: Modes | None = None
        self._settings: dict[int, tuple[Any, Settings]] = {}
        self._changes: dict[int, int] = {}

    def pass_begins(self, roots: Sequence[Any], step: int, loss: float | Tensor | None = None) -> None:
        """An outermost backward pass from these roots has reached its first hook."""
        try:
            due = self._due(step)
            broken = type(loss) is float and not math.isfinite(loss) and self._broken < BROKEN
            if (due or broken) and len(roots) == 1 and type(roots[0]) is Tensor:
                self._broken += broken
                self._look(roots[0], step, self._passes - 1, values=broken)
        except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
            self._fault("a look at the loss's graph", error)

    def observed(self, loss: Any, step: int) -> None:
        """The user observed a loss whose backward has not run: numbers inside its graph are still there."""
        try:
            if type(loss) is Tensor and loss.grad_fn is not None and loss.is_cpu and self._will_look():
                names = self._names()
                self._note(replace(walk_graph(loss, names, values=True), step=step, backward=0, loss=float(loss.detach())))
        except Exception as error:  # noqa: BLE001
            self._fault("a look at the observed loss's graph", error)

    def optimizer_steps(self, index: int, optimizer: Optimizer, step: int) -> None:
        """An optimizer of the lens is about to step."""
        try:
            last = self._settings.get(index)
            if last is not None and not self._changed(index, last, optimizer.param_groups, step):
                return
            settings = self._read(index, optimizer, step)
            self._settings[index] = ([_key(group) for group in optimizer.param_groups], settings)
            self._note(settings)
        except Exception as error:  # noqa: BLE001
            self._fault("the optimizer's settings", error)

    # --- when -------------------------------------------------------------------------------------------------------

    def _due(self, step: int) -> bool:
        """Whether this pass is looked at."""
        if step != self._step:
            self._step, self._passes = step, 0
            self._looks = self._steps.due(always=self._steps.count < EVERY)
        self._passes += 1
        return self._looks and self._passes <= PASSES

    def _will_look(self) -> bool:
        return self._steps.count < EVERY or self._steps.next_is_due

    # --- the graph --------------------------------------------------------------------------------------------------

    def _names(self) -> dict[int, str]:
        """Every parameter of what is watched, selected or not, by id."""
        names: dict[int, str] = {}
        for prefix, part in parts(self._attachment.target()).items():
            if isinstance(part, nn.Module):
                names |= {id(tensor): name for name, _, _, tensor in walk(part, f"{prefix}." if prefix else "")}
            else:
                names[id(part)] = prefix
        for slot, tensor in zip(self._attachment.slots, self._attachment.tensors(), strict=True):
            if tensor is not None:
                names[id(tensor)] = slot.name
        return names

    def _look(self, root: Tensor, step: int, backward: int, *, values: bool = False) -> None:
        names = self._names()
        leaves: dict[int, Tensor] = {}
        graph = walk_graph(root, names, leaf=leaves.__setitem__, values=values)
        owned = {id(p) for optimizer in self._optimizers() for group in optimizer.param_groups for p in group["params"]}
        strange = self._strangers.look(graph, leaves, names.keys() | owned, step)
        loss = loss_of([root])
        outside = tuple(names[id(t)] for t in leaves.values() if owned and id(t) in names and id(t) not in owned)
        self._note(
            replace(
                graph,
                step=step,
                backward=backward,
                loss=loss if isinstance(loss, float) else None,
                strange=strange,
                outside=outside,
                left=_left(leaves, owned) if not backward else math.nan,
            )
        )
        self._look_at_features(root, graph, names, step, backward)
        self._look_at_modes(step)

    def _look_at_features(self, root: Tensor, graph: Graph, names: dict[int, str], step: int, backward: int) -> None:
        if graph.compiled:
            return
        node = features.last_layer(root)
        batch = None if node is None else features.features_of(node)
        if batch is not None and len(batch) > 1:
            numbers = features.spread_of(batch)
            made = features.output_spread(node, batch)
            name = features.name_of(node, names)
            self._note(Features(step, backward, name, output_spread=math.nan if made is None else made, **numbers))  # type: ignore[arg-type]
        for at, data in features.inputs_of(root):
            self._note(Features(step, backward, f"input:{features.name_of(at, names)}", **features.spread_of(data)))  # type: ignore[arg-type]
        for kind, deviation, noise, at in features.latents(root):
            name = f"{kind}:{features.name_of(at, names)}"
            self._note(Features(step, backward, name, deviation, noise, 0.0))  # type: ignore[arg-type]

    # --- modules ----------------------------------------------------------------------------------------------------

    def _look_at_modes(self, step: int) -> None:
        modules = [
            (f"{prefix}.{name}".strip("."), module)
            for prefix, part in self._attachment.target().items()
            if isinstance(part, nn.Module)
            for name, module in part.named_modules()
        ]
        if not modules:
            return
        acting = [(n, m) for n, m in modules if isinstance(m, _BATCH_NORM) or (isinstance(m, _DROPOUT) and m.p > 0)]
        training = any(m.training for n, m in modules[:1]) or any(m.training for _, m in modules)
        modes = Modes(
            step,
            training=training,
            evaluated=tuple(n for n, m in acting if not m.training)[:NAMED],
            dropout=tuple(n for n, m in acting if isinstance(m, _DROPOUT))[:NAMED],
            normalised=tuple(n for n, m in acting if isinstance(m, _BATCH_NORM))[:NAMED],
            types=self._types(modules) if self._modes is None else self._modes.types,
        )
        if self._modes is None or replace(modes, step=0) != replace(self._modes, step=0):
            self._modes = modes
            self._note(modes)

    def _types(self, modules: Sequence[tuple[str, nn.Module]]) -> dict[str, str]:
        """By module, its class: of those that own parameters, and of the one that follows each in the model."""
        return {name: type(module).__name__ for name, module in modules if not any(True for _ in module.children())}

    # --- settings ---------------------------------------------------------------------------------------------------

    def _changed(self, index: int, last: tuple[Any, Settings], groups: Sequence[Any], step: int) -> bool:
        before, settings = last
        if len(before) != len(groups):
            return True
        for (rate, *others), group in zip(before, groups, strict=True):
            if others != [group.get("weight_decay"), group.get("eps"), len(group["params"])]:
                return True
            now = group.get("lr")
            if rate is not now and _moved(_number(rate), _number(now)):
                count = self._changes.get(index, 0)
                if count < FIRST_CHANGES or step >= settings.step + max(1, settings.step // LATER):
                    self._changes[index] = count + 1
                    return True
        return False

    def _read(self, index: int, optimizer: Optimizer, step: int) -> Settings:
        names = self._names()
        groups = []
        for group in optimizer.param_groups:
            given = group["params"]
            betas = group.get("betas")
            groups.append(
                Group(
                    lr=_number(group.get("lr")),
                    weight_decay=_number(group.get("weight_decay", 0.0)),
                    eps=_number(group["eps"]) if isinstance(group.get("eps"), int | float) else None,
                    momentum=_number(betas[0]) if isinstance(betas, tuple) else _optional(group.get("momentum")),
                    parameters=tuple(names[id(p)] for p in given if id(p) in names),
                    strange=tuple(tuple(p.shape) for p in given if id(p) not in names),
                    dtypes=tuple(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in given)),
                )
            )
        kind = type(optimizer).__name__
        decoupled = any(group.get("decoupled_weight_decay") for group in optimizer.param_groups) or kind in _DECOUPLED
        return Settings(step, kind, index, tuple(groups), decoupled)


def _key(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The settings of a group that are compared at each step."""
    return group.get("lr"), group.get("weight_decay"), group.get("eps"), len(group["params"])


def _left(leaves: Mapping[int, Tensor], owned: set[int]) -> float:
    """The share of these leaves whose `.grad` has something in it as a pass begins, by a few entries of a few of them.

    A tensor, on its way from a device; NaN of none.
    """
    there = [leaf for leaf in leaves.values() if id(leaf) in owned]
    some = there[:: -(-len(there) // SAMPLED)] if there else []
    found: list[Tensor] = []
    for leaf in some:
        gradient = None if leaf.grad is None else local_part(leaf.grad.detach())
        if gradient is not None and gradient.layout == torch.strided and gradient.numel() and not gradient.is_meta:
            with torch.no_grad():
                found.append((gradient.reshape(-1)[:: stride(gradient.numel())] != 0).any())
    if not some:
        return math.nan
    if not found or len({each.device for each in found}) > 1:
        return 0.0
    return torch.stack(found).sum() / len(some)  # type: ignore[return-value]


SAMPLED = 16  #: parameters, and entries of each


def stride(n: int) -> int:
    """From one sampled entry of `n` to the next, without a common factor: else all may be of one column, of one input.

    An input that is always 0, as the corner of an image, leaves its whole column of a gradient 0.
    """
    step = max(n // SAMPLED, 1)
    while math.gcd(step, n) > 1:
        step += 1
    return step


_DECOUPLED = frozenset({"AdamW", "SGDW", "Lion", "Adafactor", "Muon", "LAMB", "RAdamW"})


def _number(value: Any) -> float:
    """A setting as a number; NaN where it is on a device, or none."""
    if isinstance(value, Tensor):
        return float(value) if value.device.type == "cpu" and value.numel() == 1 else math.nan
    return float(value) if isinstance(value, int | float) else math.nan


def _optional(value: Any) -> float | None:
    return None if value is None else _number(value)


def _moved(old: float, new: float) -> bool:
    """Whether a learning rate changed by a tenth or more."""
    if old == new or (math.isnan(old) and math.isnan(new)):
        return False
    return not abs(new - old) < NOTICED * abs(old)
