"""Trainings that are well, as parts: models and data of the two halves, and the habits that are good.

The halves share no pair of model and data. The unseen half has data of its own: wine, breast cancer, two photographs,
Friedman's function, spirals, moons and sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_sample_images, load_wine, make_friedman1, make_moons
from torch import Tensor, nn

from studies.base import Language, Residual, cnn, diabetes, digits, mlp, text
from studies.parts import Parts


@dataclass(frozen=True)
class Recipe:
    """A training that is well."""

    name: str
    half: str
    make: Callable[[], Parts]
    steps: int = 160


RECIPES: dict[str, Recipe] = {}


def recipe(half: str, steps: int = 160) -> Callable[[Callable[[], Parts]], Callable[[], Parts]]:
    """Enter a training into the table."""

    def add(make: Callable[[], Parts]) -> Callable[[], Parts]:
        RECIPES[make.__name__] = Recipe(make.__name__, half, make, steps)
        return make

    return add


def by(kind: type[torch.optim.Optimizer], rate: float, **more: Any) -> dict[str, Any]:
    """The optimizer as parts have it."""
    return {"optimizer": functools.partial(kind, lr=rate, **more), "rate": rate}


SGD, Adam, AdamW, RMSprop = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop

# --- data of the unseen half ----------------------------------------------------------------------------------------


def scaled(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


@cache
def wine() -> tuple[Tensor, Tensor]:
    x, y = load_wine(return_X_y=True)
    return scaled(torch.tensor(x, dtype=torch.float32)), torch.tensor(y)


@cache
def tumours() -> tuple[Tensor, Tensor]:
    x, y = load_breast_cancer(return_X_y=True)
    return scaled(torch.tensor(x, dtype=torch.float32)), torch.tensor(y, dtype=torch.float32)[:, None]


@cache
def patches() -> tuple[Tensor, Tensor]:
    """`[2000, 3, 12, 12]` of two photographs, and which one each is of."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for photo in load_sample_images().images:
        image = torch.tensor(photo, dtype=torch.float32).permute(2, 0, 1) / 255
        rows = torch.randint(image.shape[1] - 12, (1000,), generator=generator).tolist()
        places = torch.randint(image.shape[2] - 12, (1000,), generator=generator).tolist()
        result.append(torch.stack([image[:, a : a + 12, b : b + 12] for a, b in zip(rows, places, strict=True)]))
    x = torch.cat(result)
    return (x - x.mean()) / x.std(), torch.arange(2).repeat_interleave(1000)


@cache
def friedman() -> tuple[Tensor, Tensor]:
    x, y = make_friedman1(1000, noise=0.5, random_state=2)
    return scaled(torch.tensor(x, dtype=torch.float32)), scaled(torch.tensor(y, dtype=torch.float32))[:, None]


@cache
def spirals() -> tuple[Tensor, Tensor]:
    """Three arms."""
    generator = torch.Generator().manual_seed(3)
    t, arm = torch.rand(900, generator=generator), torch.arange(900) % 3
    angle = 3 * t + 2.1 * arm + 0.1 * torch.randn(900, generator=generator)
    return scaled(torch.stack([t * angle.cos(), t * angle.sin()], 1)), arm


@cache
def moons() -> tuple[Tensor, Tensor]:
    x, y = make_moons(800, noise=0.15, random_state=4)
    return scaled(torch.tensor(x, dtype=torch.float32)), torch.tensor(y)


@cache
def waves() -> tuple[Tensor, Tensor]:
    x = 6 * torch.rand(800, 1, generator=torch.Generator().manual_seed(5)) - 3
    return x, (2 * x).sin() + 0.3 * x


@cache
def majorities() -> tuple[Tensor, Tensor]:
    """`[2000, 15]` symbols of four, and the one that is there most often."""
    x = torch.randint(4, (2000, 15), generator=torch.Generator().manual_seed(6))
    return x, torch.stack([(x == s).sum(1) for s in range(4)], 1).argmax(1)


@cache
def sums() -> tuple[Tensor, Tensor]:
    """`[2000, 12]` symbols of eight, and by place the sum of this one and the one before, modulo eight."""
    x = torch.randint(8, (2000, 12), generator=torch.Generator().manual_seed(7))
    return x, (x + torch.cat([torch.zeros(2000, 1, dtype=torch.long), x[:, :-1]], 1)) % 8


@cache
def characters() -> tuple[Tensor, Tensor]:
    """`[4000, 32]` characters, and those that follow."""
    whole, _ = text()
    starts = torch.randint(len(whole) - 33, (4000, 1), generator=torch.Generator().manual_seed(8))
    rows = starts + torch.arange(32)
    return whole[rows], whole[rows + 1]


def standard(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same with targets of unit variance."""
    return data[0], (data[1] - data[1].mean()) / data[1].std()


# --- models ---------------------------------------------------------------------------------------------------------


class Sequence(nn.Module):
    """A recurrent net over symbols; of the last place, or of each."""

    def __init__(self, kind: type[nn.RNNBase], symbols: int, classes: int, width: int = 48, every: bool = False) -> None:
        super().__init__()
        self.token, self.rnn = nn.Embedding(symbols, 16), kind(16, width, batch_first=True)
        self.head, self.every = nn.Linear(width, classes), every

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(self.token(x))[0]
        return self.head(h if self.every else h[:, -1])


class Encoder(nn.Module):
    """A transformer over symbols without a mask; their mean, or each place."""

    def __init__(self, symbols: int, classes: int, places: int, *, every: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(symbols, 32), nn.Parameter(0.02 * torch.randn(places, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=dropout, batch_first=True, norm_first=every)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.every = nn.Linear(32, classes), every

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.token(x) + self.place)
        return self.head(h if self.every else h.mean(1))


class Patchwork(nn.Module):
    """A small vision transformer: patches of 2 x 2 of an image of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(4, 32), nn.Parameter(0.02 * torch.randn(16, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.head(self.norm(self.blocks(self.embed(parts) + self.place).mean(1)))


class Plainly(nn.Module):
    """x + branch(x) without normalisation; the branch's last convolution begins small."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        with torch.no_grad():
            self.b.weight.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


def convolutions(channels: int, out: int, norm: Callable[[int], nn.Module] | None = None) -> nn.Sequential:
    """Two convolutions with pooling, then two linear layers."""
    n = norm or (lambda _: nn.Identity())
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1), n(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 24, 3, padding=1), n(24), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, out)),
    )


def residual(block: Callable[[int], nn.Module], channels: int, out: int, square: bool = False) -> nn.Sequential:
    first = (nn.Unflatten(1, (1, 8, 8)),) if square else ()
    return nn.Sequential(
        *first,
        *(nn.Conv2d(channels, 16, 3, padding=1), block(16), block(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, out)),
    )


# --- the tuned half -------------------------------------------------------------------------------------------------


@recipe("tuned")
def digits_mlp() -> Parts:
    return Parts(mlp(64, 64, 32, 10), *digits(), "classes", **by(Adam, 2e-3))


@recipe("tuned")
def digits_tanh() -> Parts:
    return Parts(mlp(64, 64, 64, 10, act=nn.Tanh), *digits(), "classes", **by(SGD, 0.05, momentum=0.9))


@recipe("tuned")
def digits_cnn() -> Parts:
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *convolutions(1, 10))
    return Parts(model, *digits(), "classes", **by(SGD, 0.05, momentum=0.9))


@recipe("tuned")
def digits_cnn_batchnorm() -> Parts:
    return Parts(cnn(), *digits(), "classes", **by(Adam, 2e-3))


@recipe("tuned")
def digits_resnet() -> Parts:
    return Parts(residual(Residual, 1, 10, square=True), *digits(), "classes", **by(SGD, 0.05, momentum=0.9))


@recipe("tuned")
def digits_vit() -> Parts:
    return Parts(Patchwork(), *digits(), "classes", **by(AdamW, 2e-3))


@recipe("tuned")
def threes() -> Parts:
    x, y = digits()
    return Parts(mlp(64, 32, 1), x, (y == 3).float()[:, None], "binary", **by(Adam, 2e-3))


@recipe("tuned")
def diabetes_mlp() -> Parts:
    return Parts(mlp(10, 32, 1), *standard(diabetes()), "values", **by(Adam, 3e-3))


@recipe("tuned")
def diabetes_sgd() -> Parts:
    return Parts(mlp(10, 32, 32, 1), *standard(diabetes()), "values", **by(SGD, 0.02, momentum=0.9))


@recipe("tuned")
def digits_autoencoder() -> Parts:
    x, _ = digits()
    return Parts(mlp(64, 48, 12, 48, 64), x, x, "values", **by(Adam, 2e-3))


@recipe("tuned")
def characters_transformer() -> Parts:
    return Parts(Language(48, 2), *characters(), "tokens", size=8, **by(AdamW, 1e-3))


@recipe("tuned")
def characters_lstm() -> Parts:
    n = text()[1]
    return Parts(Sequence(nn.LSTM, n, n, every=True), *characters(), "tokens", size=12, clip=1.0, **by(Adam, 3e-3))


# --- the unseen half ------------------------------------------------------------------------------------------------


@recipe("unseen")
def wine_mlp() -> Parts:
    return Parts(mlp(13, 24, 24, 3), *wine(), "classes", size=24, **by(Adam, 3e-3))


@recipe("unseen")
def spirals_momentum() -> Parts:
    return Parts(mlp(2, 64, 64, 3), *spirals(), "classes", size=48, **by(SGD, 0.1, momentum=0.9))


@recipe("unseen")
def moons_selu() -> Parts:
    return Parts(mlp(2, 32, 32, 2, act=nn.SELU), *moons(), "classes", size=40, **by(AdamW, 3e-3))


@recipe("unseen")
def tumours_mlp() -> Parts:
    return Parts(mlp(30, 24, 1), *tumours(), "binary", **by(Adam, 2e-3))


@recipe("unseen")
def tumours_leaky() -> Parts:
    return Parts(mlp(30, 32, 16, 1, act=nn.LeakyReLU), *tumours(), "binary", **by(SGD, 0.05, momentum=0.9))


@recipe("unseen")
def patches_cnn() -> Parts:
    return Parts(convolutions(3, 2), *patches(), "classes", **by(RMSprop, 1e-3))


@recipe("unseen")
def patches_groupnorm() -> Parts:
    return Parts(convolutions(3, 2, lambda n: nn.GroupNorm(4, n)), *patches(), "classes", **by(Adam, 2e-3))


@recipe("unseen")
def patches_batchnorm() -> Parts:
    return Parts(convolutions(3, 2, nn.BatchNorm2d), *patches(), "classes", **by(SGD, 0.05, momentum=0.9))


@recipe("unseen")
def patches_resnet_batchnorm() -> Parts:
    return Parts(residual(Residual, 3, 2), *patches(), "classes", **by(AdamW, 2e-3))


@recipe("unseen")
def patches_resnet_plain() -> Parts:
    return Parts(residual(Plainly, 3, 2), *patches(), "classes", **by(Adam, 2e-3))


@recipe("unseen")
def friedman_mlp() -> Parts:
    return Parts(mlp(10, 48, 24, 1), *friedman(), "values", **by(Adam, 3e-3))


@recipe("unseen")
def friedman_gelu() -> Parts:
    return Parts(mlp(10, 32, 32, 1, act=nn.GELU), *friedman(), "values", size=50, **by(AdamW, 3e-3))


@recipe("unseen")
def waves_tanh() -> Parts:
    return Parts(mlp(1, 48, 48, 1, act=nn.Tanh), *waves(), "values", size=40, **by(SGD, 0.05, momentum=0.9))


@recipe("unseen")
def majorities_gru() -> Parts:
    return Parts(Sequence(nn.GRU, 4, 4), *majorities(), "classes", **by(Adam, 5e-3))


@recipe("unseen")
def majorities_transformer() -> Parts:
    return Parts(Encoder(4, 4, 15), *majorities(), "classes", **by(Adam, 2e-3))


@recipe("unseen")
def sums_transformer() -> Parts:
    return Parts(Encoder(8, 8, 12, every=True, dropout=0.0), *sums(), "tokens", **by(AdamW, 3e-3))


@recipe("unseen", steps=220)
def sums_lstm() -> Parts:
    return Parts(Sequence(nn.LSTM, 8, 8, every=True), *sums(), "tokens", clip=1.0, **by(Adam, 1e-2))


@recipe("unseen")
def patches_autoencoder() -> Parts:
    x, _ = patches()
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Upsample(scale_factor=2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        *(nn.Upsample(scale_factor=2), nn.Conv2d(16, 3, 3, padding=1)),
    )
    return Parts(model, x, x, "values", **by(Adam, 3e-3))
