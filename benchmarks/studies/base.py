"""What studies of trainings share: the words, data that ship with scikit-learn and Python, models, the usual loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import gradlens

BATCH = 64

_watching: list[gradlens.Lens] = []
_seed = [0]  #: of models, and of the order in which they see the data


def told(loss: Tensor) -> Tensor:
    """The loss, which the lens is told before backward: so it belongs to this step."""
    for lens in _watching:
        lens.observe(loss=loss)
    return loss


@dataclass(eq=False)
class Training:
    """What a training loop has in its hands."""

    model: Any  #: a module, or a mapping of modules
    optimizers: list[torch.optim.Optimizer]
    step: Callable[[int], Tensor | float]  #: does it all, and gives the loss
    options: dict[str, Any] = field(default_factory=dict)  #: of watch()


@dataclass(frozen=True)
class Study:
    """A training, and what the rules should say of it.

    Thresholds may be tuned on the half `tuned`; the half `unseen` is measured alone.
    """

    name: str
    make: Callable[[], Training]
    rules: tuple[str, ...] = ()  #: one of these should find it; none: nothing to find
    within: int = 30  #: and no later than at this step
    kind: str = ""  #: of model where it is well, of mistake where it is ill
    half: str = "tuned"
    steps: int = 0  #: how many it takes; 0: as many as all


STUDIES: list[Study] = []

Maker = Callable[[], Training]


def well(make: Maker) -> Maker:
    """A training with nothing to find."""
    STUDIES.append(Study(make.__name__, make, kind="written by hand"))
    return make


def ill(*rules: str, within: int = 30) -> Callable[[Maker], Maker]:
    """A training with a mistake, and the rules that may name it."""

    def add(make: Maker) -> Maker:
        STUDIES.append(Study(make.__name__, make, rules, within, "written by hand"))
        return make

    return add


# --- data -----------------------------------------------------------------------------------------------------------


@cache
def digits() -> tuple[Tensor, Tensor]:
    """`[1797, 64]` pixels from 0 to 1, and `[1797]` classes."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


@cache
def diabetes() -> tuple[Tensor, Tensor]:
    """`[442, 10]` features of unit variance, and `[442, 1]` progressions as they are: 25 to 346."""
    x, y = load_diabetes(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0), torch.tensor(y, dtype=torch.float32)[:, None]


@cache
def text() -> tuple[Tensor, int]:
    """Characters as numbers, and how many there are."""
    whole = "\n".join(topics[name] for name in sorted(topics))[:200_000]
    letters = {letter: i for i, letter in enumerate(sorted(set(whole)))}
    return torch.tensor([letters[letter] for letter in whole]), len(letters)


def examples(k: int, size: int = BATCH, data: Callable[[], tuple[Tensor, Tensor]] = digits) -> tuple[Tensor, Tensor]:
    """A step's batch, drawn at random."""
    x, y = data()
    rows = torch.randint(len(x), (size,), generator=torch.Generator().manual_seed(k + 1_000_003 * _seed[0]))
    return x[rows], y[rows]


def sentences(k: int, size: int = 16, length: int = 48) -> tuple[Tensor, Tensor]:
    """A step's characters, `[size, length]`, and those that follow."""
    whole, _ = text()
    starts = torch.randint(
        len(whole) - length - 1, (size,), generator=torch.Generator().manual_seed(k + 1_000_003 * _seed[0])
    )
    rows = starts[:, None] + torch.arange(length)
    return whole[rows], whole[rows + 1]


# --- models and loops -----------------------------------------------------------------------------------------------


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.ReLU, norm: bool = False) -> nn.Sequential:
    """Linear layers with activations in between."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), act()]
    return nn.Sequential(*layers[: -2 if norm else -1])


def cnn() -> nn.Sequential:
    """Three convolutions with batch normalisation."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(32, 10)),
    )


class Residual(nn.Module):
    """x + branch(x), whose last normalisation may begin at 0 (Goyal et al. 2017)."""

    def __init__(self, width: int, zero: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        if zero:
            nn.init.zeros_(self.nb.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.nb(self.b(F.relu(self.na(self.a(x))))))


class Language(nn.Module):
    """A transformer over characters."""

    def __init__(
        self, width: int = 64, depth: int = 3, *, first: bool = True, tied: bool = False, vocabulary: int = 0
    ) -> None:
        super().__init__()
        n = vocabulary or text()[1]
        self.token, self.place = nn.Embedding(n, width), nn.Embedding(64, width)
        layer = [
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=first, activation="gelu"
            )
            for _ in range(depth)
        ]
        self.blocks, self.norm, self.head = nn.ModuleList(layer), nn.LayerNorm(width), nn.Linear(width, n, bias=not tied)
        for table in (self.token, self.place):
            nn.init.normal_(table.weight, std=0.02)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.token(x) + self.place(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return self.head(self.norm(h))


class Recurrent(nn.Module):
    """A recurrent network over characters."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, width: int = 96, layers: int = 2) -> None:
        super().__init__()
        n = text()[1]
        self.token, self.rnn, self.head = nn.Embedding(n, 32), kind(32, width, layers, batch_first=True), nn.Linear(width, n)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        h, state = self.rnn(self.token(x), state)
        return self.head(h), state


def spoken(model: nn.Module, k: int) -> Tensor:
    """The cross entropy of the next character."""
    x, y = sentences(k)
    out = model(x)
    out = out[0] if isinstance(out, tuple) else out
    return F.cross_entropy(out.flatten(0, 1), y.flatten())


def digit(model: nn.Module, k: int) -> Tensor:
    """The cross entropy of a batch of digits."""
    x, y = examples(k)
    return F.cross_entropy(model(x), y)


def plain(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[nn.Module, int], Tensor],
    *,
    clip: float = 0.0,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> Training:
    """The loop of every tutorial."""

    def step(k: int) -> Tensor:
        optimizer.zero_grad()
        value = loss(model, k)
        told(value).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if schedule:
            schedule.step()
        return value.detach()

    return Training(model, [optimizer], step)


def sgd(model: nn.Module, rate: float = 0.1, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, **more)


def adam(model: nn.Module, rate: float = 1e-3, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=rate, **more)


def adamw(model: nn.Module, rate: float = 1e-3, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, **more)
