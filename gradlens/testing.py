"""Small models with a known illness, each with its data and loss, and a writer that keeps what it gets.

    case = gradlens.testing.vanishing()
    lens = gradlens.watch(case.model, case.optimizer)
    case.train(50)
    lens.findings()             # names what `case.rule` and `case.parameters` say

Every call makes a fresh model with the same weights and the same data; the global random state is left alone. Data is made
up: eight features of which a fixed random network makes the class.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradlens.errors import ArgumentError
from gradlens.records import Finding, Record, Snapshot
from gradlens.selection import Select, predicate

FEATURES, CLASSES, BATCH = 8, 4, 32

Batch = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Case:
    """A model, its optimizer, its loss and its batches, and what the rules should say of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[nn.Module, Batch], Tensor]  #: of one batch, as the probes take it
    rule: str | None = None  #: the rule that finds the illness; None: nothing to find
    parameters: tuple[str, ...] = ()  #: those it names
    batch: Callable[[int], Batch] = field(default=lambda step: batch(step))  #: the batch of a step

    def batches(self, steps: int, first: int = 0) -> Iterator[Batch]:
        """The batches of some steps: the same ones each time."""
        return (self.batch(step) for step in range(first, first + steps))

    def train(self, steps: int, first: int = 0) -> list[float]:
        """A plain training loop: the loss before each step."""
        losses = []
        for data in self.batches(steps, first):
            self.optimizer.zero_grad()
            loss = self.loss(self.model, data)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


def batch(step: int, size: int = BATCH) -> Batch:
    """`size` made-up examples, `[size, 8]` features and `[size]` classes of four; each step has its own."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, FEATURES, generator=generator)
    teacher = torch.Generator().manual_seed(12345)
    hidden = torch.randn(FEATURES, 16, generator=teacher), torch.randn(16, CLASSES, generator=teacher)
    return x, (torch.tanh(x @ hidden[0]) @ hidden[1]).argmax(dim=1)


def classify(model: nn.Module, data: Batch) -> Tensor:
    """The cross entropy of a batch."""
    x, y = data
    return functional.cross_entropy(model(x), y)


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _stack(width: int, depth: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """`depth` linear layers named `0`, `2`, `4`, ...: the last one gives the classes."""
    sizes = [FEATURES] + [width] * (depth - 1)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


# --- models ---------------------------------------------------------------------------------------------------------


def healthy() -> Case:
    """A perceptron of three layers under Adam: nothing to find."""
    model = _seeded(lambda: _stack(32, 3, nn.ReLU))
    return Case(model, torch.optim.Adam(model.parameters(), lr=1e-3), classify)


def vanishing(depth: int = 12) -> Case:
    """A deep stack of sigmoids: each layer passes on less than a quarter of the gradient, and the first ones get none."""
    model = _seeded(lambda: _stack(32, depth, nn.Sigmoid))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Case(model, optimizer, classify, rule="vanishing", parameters=("0.weight",))


def exploding(depth: int = 16) -> Case:
    """A deep stack with weights three times too large and no normalisation: each layer triples the gradient."""

    def make() -> nn.Module:
        model = _stack(32, depth, nn.ReLU)
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=3 * (2 / layer.in_features) ** 0.5)
        return model

    model = _seeded(make)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-10)
    return Case(model, optimizer, classify, rule="exploding", parameters=("0.weight",))


class _Hidden(nn.Module):
    """Three named layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 32)
        self.hidden = nn.Linear(32, 32)
        self.last = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.relu(self.hidden(x))
        return self.last(x)


def dead_relu() -> Case:
    """A layer of rectifiers whose biases keep every one of them shut: nothing before it learns either."""

    def make() -> nn.Module:
        model = _Hidden()
        nn.init.constant_(model.hidden.bias, -100.0)
        return model

    model = _seeded(make)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return Case(model, optimizer, classify, rule="dead", parameters=("hidden.weight", "hidden.bias"))


class _Branched(_Hidden):
    """A second head that the loss never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(32, CLASSES)


def absent_branch() -> Case:
    """A model with a head that its loss does not depend on."""
    model = _seeded(_Branched)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return Case(model, optimizer, classify, rule="absent", parameters=("auxiliary.weight", "auxiliary.bias"))


class _Unit(nn.Module):
    """`x / |x|`, written so that its derivative at 0 is 0/0."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-6)


class _Normed(_Hidden):
    """The first layer's output is scaled to length one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 32, bias=False)
        self.unit = _Unit()

    def forward(self, x: Tensor) -> Tensor:
        x = self.unit(self.first(x))
        x = torch.relu(self.hidden(x))
        return self.last(x)


def nonfinite(step: int = 5) -> Case:
    """A norm that has no derivative at 0: at one step an all-zero example meets it, and a gradient becomes NaN.

    The loss of that step is finite, and so are the partials behind the norm; `first.weight` before it gets NaN. From the
    next step on everything is NaN, as the optimizer has written it into the weights.
    """

    def poisoned(at: int) -> Batch:
        x, y = batch(at)
        if at == step:
            x[3] = 0.0
        return x, y

    model = _seeded(_Normed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return Case(model, optimizer, classify, rule="nonfinite", parameters=("first.weight",), batch=poisoned)


class _WrongSwish(torch.autograd.Function):
    """`x * sigmoid(x)`, whose backward forgets that the sigmoid moves too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * torch.sigmoid(x)


class _Wrong(_Hidden):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = _WrongSwish.apply(self.hidden(x))
        return self.last(x)


def wrong_backward() -> Case:
    """A custom function with a mistake in its backward: it trains, but `first` and `hidden` get wrong partials.

    No rule can see that in the numbers of one gradient; `gradlens.check_partials` does.
    """
    model = _seeded(_Wrong)
    return Case(model, torch.optim.Adam(model.parameters(), lr=1e-3), classify)


#: Every case whose illness a rule finds.
ILL: tuple[Callable[[], Case], ...] = (vanishing, exploding, dead_relu, absent_branch, nonfinite)


# --- writers --------------------------------------------------------------------------------------------------------


class RecordingWriter:
    """A writer that keeps its records; told to, it fails.

        RecordingWriter(OSError("disk full"), after=3)      # takes three records, then raises on each
        RecordingWriter(OSError("gone"), on="flush")

    `error` is raised by the call named by `on` (`write`, `flush`, `close`) once it was called `after` times.
    """

    def __init__(self, error: BaseException | None = None, *, on: str = "write", after: int = 0) -> None:
        if on not in ("write", "flush", "close"):
            raise ArgumentError(f"on={on!r} is not a call of a writer: write, flush, close")
        self.records: list[Record] = []
        self.calls: dict[str, int] = {"write": 0, "flush": 0, "close": 0}
        self._error, self._on, self._after = error, on, after

    def write(self, record: Record) -> None:
        """Keep it."""
        self._called("write")
        self.records.append(record)

    def flush(self) -> None:
        """Count it."""
        self._called("flush")

    def close(self) -> None:
        """Count it."""
        self._called("close")

    @property
    def snapshots(self) -> list[Snapshot]:
        """The snapshots among the records."""
        return [record for record in self.records if isinstance(record, Snapshot)]

    @property
    def findings(self) -> list[Finding]:
        """The findings among the records."""
        return [record for record in self.records if isinstance(record, Finding)]

    def _called(self, call: str) -> None:
        self.calls[call] += 1
        if self._error is not None and call == self._on and self.calls[call] > self._after:
            raise self._error


# --- assertions for suites of your own ------------------------------------------------------------------------------


def assert_all_trained(watched: Any, *, but: Select = None) -> None:
    """Fail unless each parameter got a gradient that is not 0 and was moved by an optimizer, at some step.

    Args:
        watched: A lens or a run, of some steps with an optimizer.
        but: Glob pattern(s) on names, or a callable `(name, tensor) -> bool`, of parameters that need not train.
    """
    history = watched.history()
    used = history[history["stage"] == "used"]
    if not len(used):
        raise AssertionError("no optimizer stepped: watch(model, optimizer), and train some steps")
    excused = (lambda name, tensor: False) if but is None else predicate(but)
    problems = []
    for name, rows in used.groupby("parameter", sort=False):
        if excused(str(name), torch.empty(0)):
            continue
        words = sorted(set(rows["status"].astype(str)))
        if "ok" not in words:
            problems.append(f"{name} never had a gradient (status {', '.join(words)})")
        elif not (rows["update_l2"] > 0).any():
            problems.append(f"{name} had a gradient, and no optimizer moved it")
    if problems:
        raise AssertionError("\n".join([f"{len(problems)} parameters were not trained:", *problems]))


def assert_finite(watched: Any) -> None:
    """Fail if a partial, a weight or an update of a lens or a run was NaN or infinite, and name the first."""
    history = watched.history()
    columns = [name for name in ("nan", "inf", "weight_nonfinite", "update_nonfinite") if name in history]
    bad = history[(history[columns].fillna(0) > 0).any(axis=1)]
    if len(bad):
        first = bad.iloc[0]
        counts = ", ".join(f"{int(first[name])} {name}" for name in columns if first[name] > 0)
        raise AssertionError(
            f"not finite in {bad['parameter'].nunique()} parameters, first in {first['parameter']} at step {first['step']} "
            f"({first['stage']}): {counts}; gradlens.trace_nonfinite(model, loss_fn, batch) names the operation"
        )


def assert_healthy(diagnosis: Any, *, confidence: float = 0.0) -> None:
    """Fail if a diagnosis (of `lens.diagnosis()` or `run.diagnosis()`) says that something is wrong, at least so sure."""
    diagnosis = diagnosis.diagnosis() if hasattr(diagnosis, "diagnosis") else diagnosis
    if diagnosis.ill and diagnosis.confidence >= confidence:
        raise AssertionError(str(diagnosis))
