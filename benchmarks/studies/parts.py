"""A training in pieces, of which a mistake replaces one.

`Parts` is what a tutorial's loop has in its hands. `assembled` runs that loop: draw a batch, `zero_grad`, forward, loss,
`backward`, clip, `step`, schedule. A mistake is a function that takes parts and changes one of them; so is a habit that is
good (accumulation, a schedule, autocast), which must stay without a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studies.base import Training, _seed

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Parts:
    """A training in pieces."""

    model: nn.Module
    x: Tensor
    y: Tensor
    task: str  #: classes, binary, values or tokens: what output and target are
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    size: int = 32  #: examples of a batch
    loss: Loss | None = None  #: None: the usual one of the task
    clip: float = 0.0
    micro: int = 1  #: backward passes to a step
    divide: bool = True  #: the loss of each by their number
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    trained: Callable[[nn.Module], Iterable[Tensor]] = nn.Module.parameters  #: what the optimizer gets
    order: tuple[str, ...] = ("zero", "backward", "step")  #: `zero` inside of `backward`: see `zero_each`
    zero_each: bool = False  #: zero_grad before each micro-batch
    before: Callable[[int], None] | None = None  #: called before each step
    unscaled: str = (
        ""  #: with a GradScaler: "right" clips after unscale_, "wrong" before, "never" steps with scaled gradients
    )
    autocast: Any = None  #: a type
    width: Any = torch.float32  #: the type of floating inputs
    output: Callable[[Tensor], Tensor] = field(default=lambda o: o)  #: what is done to the model's output before the loss
    rate: float = 1e-3  #: as given to the optimizer, for mistakes that multiply it
    options: dict[str, Any] = field(default_factory=dict)  #: of watch()


USUAL: dict[str, Loss] = {
    "classes": F.cross_entropy,
    "tokens": lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()),
    "binary": F.binary_cross_entropy_with_logits,
    "values": F.mse_loss,
}


def assembled(p: Parts) -> Training:
    """The loop over these parts."""
    optimizer = p.optimizer(p.trained(p.model))
    schedule = p.schedule(optimizer) if p.schedule else None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if p.unscaled else None
    loss_of = p.loss or USUAL[p.task]

    def batch(k: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(p.x), (p.size,), generator=torch.Generator().manual_seed(k + 1_000_003 * _seed[0]))
        x = p.x[rows]
        return (x.to(p.width) if x.is_floating_point() else x), p.y[rows]

    def forward(k: int) -> Tensor:
        x, y = batch(k)
        if p.autocast is None:
            return loss_of(p.output(p.model(x)).float(), y)
        with torch.autocast("cpu", p.autocast):
            out = p.output(p.model(x))
        return loss_of(out.float(), y)

    def backward(k: int) -> Tensor:
        total = torch.zeros(())
        for i in range(p.micro):
            if p.zero_each:
                optimizer.zero_grad()
            loss = forward(k * p.micro + i)
            total += loss.detach() / p.micro
            loss = loss / p.micro if p.divide and p.micro > 1 else loss
            (scaler.scale(loss) if scaler else loss).backward()
        return total

    def step() -> None:
        if scaler and p.unscaled == "right":
            scaler.unscale_(optimizer)
        if p.clip:
            nn.utils.clip_grad_norm_([q for g in optimizer.param_groups for q in g["params"]], p.clip)
        if scaler and p.unscaled != "never":
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()

    def whole(k: int) -> Tensor:
        if p.before:
            p.before(k)
        loss = torch.zeros(())
        for name in p.order:
            if name == "zero":
                optimizer.zero_grad()
            elif name == "backward":
                loss = backward(k)
            else:
                step()
        if schedule:
            schedule.step()
        return loss

    return Training(p.model, [optimizer], whole, p.options)
