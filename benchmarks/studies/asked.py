"""Mistakes as people ask about them, in models and data of their own: each broken, and mended by what the answer says.

Written before any rule was asked about them, and measured as they are: an unseen half of the unseen half.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import cache

import torch
from sklearn.datasets import load_iris, make_blobs, make_circles, make_swiss_roll
from torch import Tensor, nn
from torch.nn import functional as F

from studies.base import Training, _seed
from studies.loops import drawn, enter, single
from studies.recipes import scaled


def both(name: str, kind: str, rules: str, make: Callable[..., Training], steps: int = 200, half: str = "unseen") -> None:
    """A training as it was asked about, `make(True)`, and as it was answered."""
    enter(name, half, kind, functools.partial(make, True), rules, steps)
    enter(name.partition("__")[0], half, "asked, and answered", functools.partial(make, False), steps=steps)


def generator(k: int) -> torch.Generator:
    return torch.Generator().manual_seed(k + 1_000_003 * _seed[0])


@cache
def iris() -> tuple[Tensor, Tensor]:
    """`[150, 4]` measures of flowers, standardised, and their kind."""
    x, y = load_iris(return_X_y=True)
    return scaled(torch.tensor(x, dtype=torch.float32)), torch.tensor(y)


@cache
def roll() -> tuple[Tensor, Tensor]:
    """`[1000, 3]` points of a rolled sheet, and `[1000]` how far along the roll, standardised."""
    x, y = make_swiss_roll(1000, noise=0.1, random_state=0)
    return scaled(torch.tensor(x, dtype=torch.float32)), scaled(torch.tensor(y, dtype=torch.float32))


@cache
def rings() -> tuple[Tensor, Tensor]:
    """`[600, 2]` points of two rings, and which ring."""
    x, y = make_circles(600, noise=0.05, factor=0.5, random_state=0)
    return scaled(torch.tensor(x, dtype=torch.float32)), torch.tensor(y)


@cache
def clouds() -> tuple[Tensor, Tensor]:
    """`[800, 6]` points of five clouds, and which cloud."""
    x, y = make_blobs(800, n_features=6, centers=5, cluster_std=2.0, random_state=0)
    return scaled(torch.tensor(x, dtype=torch.float32)), torch.tensor(y)


# --- a segmentation whose output is squashed twice --------------------------------------------------------------------


def discs(k: int, n: int = 16, side: int = 24) -> tuple[Tensor, Tensor]:
    """`[n, 1, side, side]` noisy images of a disc, and `[n, 1, side, side]` where it is."""
    g = generator(k)
    centre, radius = torch.rand(n, 2, 1, 1, generator=g) * side, 3 + 5 * torch.rand(n, 1, 1, generator=g)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    mask = ((x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2 < radius**2).float()[:, None]
    return mask + 0.5 * torch.randn(mask.shape, generator=g), mask


class Segmenter(nn.Module):
    """Down, up, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 24, 3, stride=2, padding=1)
        self.up, self.out = nn.ConvTranspose2d(24, 12, 2, stride=2), nn.Conv2d(24, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.silu(self.fine(x))
        return self.out(torch.cat([fine, F.silu(self.up(F.silu(self.coarse(fine))))], 1))


def segmentation(broken: bool) -> Training:
    model = Segmenter()

    def loss(k: int) -> Tensor:
        x, mask = discs(k)
        made = model(x)
        return F.binary_cross_entropy_with_logits(torch.sigmoid(made) if broken else made, mask)

    return single(model, torch.optim.Adam(model.parameters(), lr=3e-3), loss)


both("discs_unet__sigmoid_in_the_model", "softmax or sigmoid twice", "sigmoid-twice", segmentation)


# --- attention over rows that are nothing but padding -----------------------------------------------------------------


class Reader(nn.Module):
    """Finds how often the first symbol occurs, by attention over a padded row."""

    def __init__(self) -> None:
        super().__init__()
        self.symbol, self.attend = nn.Embedding(8, 32), nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        h = self.symbol(x)
        return self.head(self.attend(h, h, h, key_padding_mask=padding)[0].mean(1))


def padded(broken: bool) -> Training:
    model = Reader()

    def loss(k: int) -> Tensor:
        g = generator(k)
        x, length = torch.randint(1, 8, (32, 12), generator=g), torch.randint(1, 13, (32, 1), generator=g)
        if broken and k > 20:
            length[0] = 0  # an empty example
        padding = torch.arange(12) >= length
        return F.cross_entropy(model(x.masked_fill(padding, 0), padding), x[:, 0])

    return single(model, torch.optim.Adam(model.parameters(), lr=2e-3), loss)


both("symbols_attention__an_empty_row", "masked row", "masked-row nonfinite", padded, 160)


# --- an autoencoder whose targets lie outside what it can say ---------------------------------------------------------


def autoencoder(broken: bool) -> Training:
    model = nn.Sequential(nn.Flatten(), nn.Linear(576, 48), nn.ELU(), nn.Linear(48, 576), nn.Sigmoid())

    def loss(k: int) -> Tensor:
        image = discs(k)[1]
        return F.mse_loss(model(image), image.flatten(1) * (255 if broken else 1))

    return single(model, torch.optim.Adam(model.parameters(), lr=2e-3), loss)


both("discs_autoencoder__targets_up_to_255", "targets out of range", "out-of-range", autoencoder, half="tuned")


# --- a column against a row -------------------------------------------------------------------------------------------


def column(broken: bool) -> Training:
    model = nn.Sequential(nn.Linear(3, 40), nn.Softplus(), nn.Linear(40, 40), nn.Softplus(), nn.Linear(40, 1))

    def loss(k: int) -> Tensor:
        x, y = drawn(roll, k, 50)
        return F.huber_loss(model(x), y) if broken else F.huber_loss(model(x)[:, 0], y)

    return single(model, torch.optim.RMSprop(model.parameters(), lr=2e-3), loss)


both("roll_softplus__column_against_row", "broadcast", "broadcast", column)


# --- two tasks, and the loss of one is a number -----------------------------------------------------------------------


class TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.kind, self.size = nn.Sequential(nn.Linear(3, 24), nn.Mish()), nn.Linear(24, 3), nn.Linear(24, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.kind(h), self.size(h)[:, 0]


def two_tasks(broken: bool) -> Training:
    model = TwoTasks()

    def loss(k: int) -> Tensor:
        x, y = drawn(iris, k, 40)
        kind, size = model(x[:, :3])
        first, second = F.cross_entropy(kind, y), F.mse_loss(size, x[:, 3])
        return first + (second.item() if broken else second)

    return single(model, torch.optim.Adam(model.parameters(), lr=5e-3), loss)


both("iris_two_tasks__item_of_a_loss", "loss cut from the model", "cut absent", two_tasks)


# --- batch normalisation of one example -------------------------------------------------------------------------------


def alone(broken: bool) -> Training:
    model = nn.Sequential(
        *(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 16, 3), nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU()),
        nn.Linear(32, 5),
    )
    if broken:
        model[4] = nn.BatchNorm1d(32, momentum=0.1)

    def loss(k: int) -> Tensor:
        x, y = drawn(clouds, k, 1 if broken else 32)
        if broken:  # what people do as BatchNorm1d refuses a single row: normalise over the features instead
            h = model[3](model[2](model[1](model[0](x))))
            h = F.batch_norm(h[:, :, None, None].expand(1, 32, 1, 2), None, None, model[4].weight, model[4].bias, True)
            return F.cross_entropy(model[6](model[5](h[..., 0].flatten(1))), y)
        return F.cross_entropy(model(x), y)

    return single(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), loss)


both("clouds_conv1d__batches_of_one", "batch normalisation", "batchnorm-of-one", alone)


# --- embeddings in a list ---------------------------------------------------------------------------------------------


class Table(nn.Module):
    """A model of columns of categories, each with an embedding; in a plain list no optimizer has them."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        tables = [nn.Embedding(6, 8) for _ in range(4)]
        self.tables = tables if broken else nn.ModuleList(tables)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([table(x[:, i]) for i, table in enumerate(self.tables)], 1))


def categories(broken: bool) -> Training:
    model = Table(broken)

    def loss(k: int) -> Tensor:
        x, y = drawn(iris, k, 40)
        return F.cross_entropy(model((x * 1.2 + 3).long().clamp(0, 5)), y)

    return single(model, torch.optim.AdamW(model.parameters(), lr=1e-2), loss)


both("iris_embeddings__in_a_plain_list", "parameters left out", "unregistered", categories)


# --- a schedule for epochs that is stepped for each batch -------------------------------------------------------------


def scheduled(broken: bool) -> Training:
    model = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(), nn.Linear(32, 32), nn.LeakyReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)

    def step(k: int) -> Tensor:
        optimizer.zero_grad()
        x, y = drawn(rings, k, 60)
        value = F.cross_entropy(model(x), y)
        value.backward()
        optimizer.step()
        if broken or k % 40 == 39:
            schedule.step()
        return value.detach()

    return Training(model, [optimizer], step)


both("rings_decay__stepped_for_each_batch", "learning rate gone", "lr_gone", scheduled, 240)


# --- evaluation mode that is never left -------------------------------------------------------------------------------


def validated(broken: bool) -> Training:
    model = nn.Sequential(
        *(nn.Linear(6, 48), nn.BatchNorm1d(48), nn.Hardswish(), nn.Dropout(0.2)),
        *(nn.Linear(48, 24), nn.BatchNorm1d(24), nn.Hardswish(), nn.Linear(24, 5)),
    )
    optimizer = torch.optim.NAdam(model.parameters(), lr=2e-3)
    x, y = clouds()

    def step(k: int) -> Tensor:
        if k % 25 == 24:
            model.eval()
            with torch.no_grad():
                (model(x).argmax(1) == y).float().mean()
            if not broken:
                model.train()
        optimizer.zero_grad()
        rows = torch.randint(len(x), (40,), generator=generator(k))
        value = F.cross_entropy(model(x[rows]), y[rows])
        value.backward()
        optimizer.step()
        return value.detach()

    return Training(model, [optimizer], step)


both("clouds_hardswish__left_in_eval", "evaluation mode", "eval_mode", validated)


# --- a density whose width becomes 0 ----------------------------------------------------------------------------------


def density(broken: bool) -> Training:
    model = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2))

    def loss(k: int) -> Tensor:
        x, y = drawn(roll, k, 50)
        mean, width = model(x).unbind(1)
        width = F.relu(width) if broken else F.softplus(width) + 1e-3
        return (torch.log(width) + 0.5 * ((y - mean) / width) ** 2).mean()

    return single(model, torch.optim.Adam(model.parameters(), lr=2e-3), loss)


both("roll_density__width_of_a_relu", "NaN", "edge", density, 120, "tuned")
