"""Eleven small trainings of the kinds that public scripts have, written for `scripts.py`. Nothing is downloaded.

Each function of `SCRIPTS` makes a model, its optimizers and a `step`, which is what the body of such a script's loop does:
batches drawn from data in memory, forward, backward, clipping or accumulation where that kind has it, the optimizers, the
scheduler, and the loss as a number. All randomness is torch's or a seeded generator's, so that two copies of one training
are equal bit by bit. Images are scikit-learn's digits (enlarged, to 28 x 28 in place of MNIST) and a photograph of its own,
text is Python's documentation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics

import numpy as np
import torch
from models import GPT
from sklearn.datasets import load_digits, load_sample_image
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import LBFGS, SGD, Adadelta, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, StepLR


@dataclass(frozen=True)
class Loop:
    """A training: what it moves, and the body of its loop, which returns the loss."""

    target: nn.Module | dict[str, nn.Module]
    optimizers: list[Optimizer]
    step: Callable[[], float]

    def modules(self) -> list[nn.Module]:
        """All that have weights."""
        return list(self.target.values()) if isinstance(self.target, dict) else [self.target]


@dataclass(frozen=True)
class Script:
    """A kind of training, and how many steps of it a stretch times."""

    title: str
    start: Callable[[], Loop]
    steps: int
    warm_up: int


# --- data -------------------------------------------------------------------------------------------------------------


@cache
def digits(size: int = 8) -> tuple[Tensor, Tensor]:
    """Images `[1797, 1, size, size]` from 0 to 1, and `[1797]` classes."""
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return F.interpolate(images, size=(size, size), mode="bilinear").contiguous(), torch.tensor(y)


def batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches for ever."""
    while True:
        for rows in torch.randperm(len(x)).split(size)[:-1]:
            yield x[rows], y[rows]


def pages() -> str:
    """English with some code in it."""
    return "\n".join(topics[name] for name in sorted(topics))[:200_000]


@cache
def characters() -> tuple[Tensor, int]:
    """The text in characters, and how many there are."""
    return _numbered(pages())


@cache
def words() -> tuple[Tensor, int]:
    """The text in words, and how many there are."""
    return _numbered(pages().split())


def _numbered(tokens: str | list[str]) -> tuple[Tensor, int]:
    of = {token: i for i, token in enumerate(sorted(set(tokens)))}
    return torch.tensor([of[token] for token in tokens]), len(of)


# --- images -----------------------------------------------------------------------------------------------------------


def mnist() -> Loop:
    """Two convolutions, dropout, Adadelta, a learning rate that falls."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
        *(nn.Flatten(), nn.Linear(32 * 12 * 12, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10)),
    )
    optimizer = Adadelta(model.parameters(), lr=1.0)
    scheduler, data = StepLR(optimizer, step_size=28, gamma=0.7), batches(*digits(28), 64)

    def step() -> float:
        x, y = next(data)
        optimizer.zero_grad()
        loss = F.nll_loss(F.log_softmax(model(x), dim=1), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss.item()

    return Loop(model, [optimizer], step)


class Basic(nn.Module):
    """A residual block whose shortcut pads with zeros, as in ResNets for small images."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, b - a
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more)))


def resnet() -> Loop:
    """Twenty layers, SGD with momentum and weight decay, a cosine, and crops that are drawn at random."""
    widths = [8, 8, 8, 8, 16, 16, 16, 32, 32, 32]
    blocks = [Basic(a, b, 1 + (b > a)) for a, b in itertools.pairwise(widths)]
    stem = [nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler, data = CosineAnnealingLR(optimizer, T_max=1000), batches(*digits(16), 64)

    def step() -> float:
        x, y = next(data)
        down, right = torch.randint(3, (2,)).tolist()
        x = F.pad(x, (1, 1, 1, 1))[:, :, down : down + 16, right : right + 16]
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss.item()

    return Loop(model, [optimizer], step)


class VAE(nn.Module):
    """784, 400, 20 and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mean, self.log_variance = nn.Linear(784, 400), nn.Linear(400, 20), nn.Linear(400, 20)
        self.decode = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = F.relu(self.encode(x))
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        return self.decode(mean + torch.randn_like(mean) * (0.5 * log_variance).exp()), mean, log_variance


def vae() -> Loop:
    """A variational autoencoder with Adam; its loss is a sum over the batch."""
    model = VAE()
    optimizer, data = Adam(model.parameters(), lr=1e-3), batches(*digits(28), 128)

    def step() -> float:
        x = next(data)[0].flatten(1)
        optimizer.zero_grad()
        again, mean, log_variance = model(x)
        distance = -0.5 * torch.sum(1 + log_variance - mean**2 - log_variance.exp())
        loss = F.binary_cross_entropy(again, x, reduction="sum") + distance
        loss.backward()
        optimizer.step()
        return loss.item()

    return Loop(model, [optimizer], step)


def gan() -> Loop:
    """Convolutions against convolutions: two optimizers, three backward passes a step."""
    up = [nn.ConvTranspose2d(32, 32, 4), nn.BatchNorm2d(32), nn.ReLU()]
    up += [nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU()]
    generator = nn.Sequential(*up, nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Sigmoid())
    down = [nn.Conv2d(1, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.LeakyReLU(0.2)]
    discriminator = nn.Sequential(*down, nn.Conv2d(32, 1, 4), nn.Flatten(0))
    of_g = Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    of_d = Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    data, real, fake = batches(*digits(16), 64), torch.ones(64), torch.zeros(64)
    criterion = nn.BCEWithLogitsLoss()

    def step() -> float:
        of_d.zero_grad()
        on_real = criterion(discriminator(next(data)[0]), real)
        on_real.backward()
        images = generator(torch.randn(64, 32, 1, 1))
        on_fake = criterion(discriminator(images.detach()), fake)
        on_fake.backward()
        of_d.step()
        of_g.zero_grad()
        fooled = criterion(discriminator(images), real)
        fooled.backward()
        of_g.step()
        return on_real.item() + on_fake.item() + fooled.item()

    return Loop({"G": generator, "D": discriminator}, [of_d, of_g], step)


def siamese() -> Loop:
    """One network called twice a step, and a loss of the distance."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * 25, 64), nn.ReLU(), nn.Linear(64, 16)),
    )
    optimizer, data = RMSprop(model.parameters(), lr=1e-3), batches(*digits(16), 64)

    def step() -> float:
        (a, of_a), (b, of_b) = next(data), next(data)
        optimizer.zero_grad()
        distance, same = F.pairwise_distance(model(a), model(b)), of_a == of_b
        loss = torch.where(same, distance**2, (1 - distance).clamp(min=0) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Loop(model, [optimizer], step)


def superresolution() -> Loop:
    """From 16 x 16 to 32 x 32 by a pixel shuffle, on pieces of a photograph."""
    photo = torch.tensor(load_sample_image("china.jpg")).float().mean(-1) / 255
    convolutions = [nn.Conv2d(1, 32, 5, padding=2), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)]
    for layer in convolutions:
        nn.init.orthogonal_(layer.weight, nn.init.calculate_gain("relu"))
    layers = [part for layer in convolutions for part in (layer, nn.ReLU())]
    model = nn.Sequential(*layers, nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2))
    optimizer = Adam(model.parameters(), lr=1e-3)

    def step() -> float:
        tops, lefts = torch.randint(photo.shape[0] - 32, (8,)).tolist(), torch.randint(photo.shape[1] - 32, (8,)).tolist()
        large = torch.stack([photo[None, i : i + 32, j : j + 32] for i, j in zip(tops, lefts, strict=True)])
        optimizer.zero_grad()
        loss = F.mse_loss(model(F.avg_pool2d(large, 2)), large)
        loss.backward()
        optimizer.step()
        return loss.item()

    return Loop(model, [optimizer], step)


# --- sequences --------------------------------------------------------------------------------------------------------


class WordModel(nn.Module):
    """Embedding, two layers of LSTM, a decoder."""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.encoder, self.drop = nn.Embedding(vocabulary, width), nn.Dropout(0.2)
        self.rnn, self.decoder = nn.LSTM(width, width, 2, dropout=0.2), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden, state = self.rnn(self.drop(self.encoder(tokens)), state)
        return self.decoder(self.drop(hidden)), state


def word_lstm() -> Loop:
    """Truncated backpropagation: the state goes on without its graph; gradients are clipped, and SGD has no momentum."""
    text, vocabulary = words()
    model, columns = WordModel(vocabulary), text[: len(text) // 16 * 16].view(16, -1).t()
    optimizer, places = SGD(model.parameters(), lr=5.0), itertools.cycle(range(0, len(columns) - 21, 20))
    state: list[tuple[Tensor, ...] | None] = [None]

    def step() -> float:
        at = next(places)
        optimizer.zero_grad()
        out, after = model(columns[at : at + 20], state[0])
        loss = F.cross_entropy(out.flatten(0, 1), columns[at + 1 : at + 21].flatten())
        loss.backward()
        clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        state[0] = tuple(part.detach() for part in after)
        return loss.item()

    return Loop(model, [optimizer], step)


def tiny_gpt() -> Loop:
    """Two micro-batches a step, clipped, AdamW with weight decay on matrices alone, a warm-up."""
    text, vocabulary = characters()
    model = GPT(vocabulary, length=64, width=64, depth=3, heads=4)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim < 2]}]
    optimizer = AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 50))

    def step() -> float:
        total = 0.0
        for _ in range(2):
            rows = torch.randint(len(text) - 65, (8, 1)) + torch.arange(65)
            x, y = text[rows[:, :-1]], text[rows[:, 1:]]
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / 2
            loss.backward()
            total += loss.item()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return Loop(model, [optimizer], step)


class Waves(nn.Module):
    """Two LSTM cells, called once for each moment, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.LSTMCell(1, 24), nn.LSTMCell(24, 24), nn.Linear(24, 1)
        self.double()

    def forward(self, series: Tensor) -> Tensor:
        a = b = (series.new_zeros(len(series), 24), series.new_zeros(len(series), 24))
        outputs = []
        for moment in series.split(1, dim=1):
            a = self.first(moment, a)
            b = self.second(a[0], b)
            outputs.append(self.out(b[0]))
        return torch.cat(outputs, dim=1)


def time_series() -> Loop:
    """Sine waves and LBFGS, which calls a closure several times a step."""
    model = Waves()
    waves = torch.sin((torch.arange(41.0) + torch.randint(-80, 80, (24, 1))).double() / 6)
    optimizer = LBFGS(model.parameters(), lr=0.5, max_iter=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(waves[:, :-1]), waves[:, 1:])
        loss.backward()
        return loss

    return Loop(model, [optimizer], lambda: optimizer.step(closure).item())


# --- others -----------------------------------------------------------------------------------------------------------


def push(state: list[float], right: bool) -> list[float]:
    """The cart and its pole a fiftieth of a second later (Barto, Sutton and Anderson, 1983), by Euler's method."""
    x, speed, angle, turning = state
    sine, cosine = math.sin(angle), math.cos(angle)
    force = ((10.0 if right else -10.0) + 0.05 * turning**2 * sine) / 1.1
    bend = (9.8 * sine - cosine * force) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    rush = force - 0.05 * bend * cosine / 1.1
    return [x + 0.02 * speed, speed + 0.02 * rush, angle + 0.02 * turning, turning + 0.02 * bend]


def reinforce() -> Loop:
    """A pole on a cart: one episode a step, its log-probabilities weighted by what came after."""
    policy = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.ReLU(), nn.Linear(64, 2))
    optimizer, chance = Adam(policy.parameters(), lr=1e-2), np.random.default_rng(0)

    def step() -> float:
        state, said = chance.uniform(-0.05, 0.05, 4).tolist(), []
        while abs(state[0]) < 2.4 and abs(state[2]) < 0.21 and len(said) < 60:
            choice = torch.distributions.Categorical(logits=policy(torch.tensor([state])))
            action = choice.sample()
            said.append(choice.log_prob(action))
            state = push(state, bool(action.item()))
        returns, later = [], 0.0
        for _ in said:
            later = 1 + 0.99 * later
            returns.insert(0, later)
        worth = torch.tensor(returns)
        worth = (worth - worth.mean()) / (worth.std() + 1e-6)
        optimizer.zero_grad()
        loss = -(torch.cat(said) * worth).sum()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Loop(policy, [optimizer], step)


class GCN(nn.Module):
    """Two graph convolutions: a product with the sparse neighbourhoods after each matrix."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x: Tensor, near: Tensor) -> Tensor:
        hidden = F.dropout(F.relu(torch.sparse.mm(near, self.first(x))), 0.5, self.training)
        return F.log_softmax(torch.sparse.mm(near, self.second(hidden)), dim=1)


@cache
def neighbourhoods() -> Tensor:
    """Of each digit: itself and its five nearest, normalised by rows."""
    links = kneighbors_graph(digits()[0].flatten(1).numpy(), 5, include_self=False).tocoo()
    itself = np.arange(links.shape[0])
    places = torch.tensor(np.stack([np.append(links.row, itself), np.append(links.col, itself)]), dtype=torch.long)
    shares = torch.full((places.shape[1],), 1 / 6)
    return torch.sparse_coo_tensor(places, shares, links.shape, check_invariants=True).coalesce()


def graph() -> Loop:
    """All nodes in one batch, the classes of a tenth of them known, weight decay."""
    model, near, (x, y) = GCN(), neighbourhoods(), digits()
    x, known = x.flatten(1), torch.randperm(len(y))[:180]
    optimizer = Adam(model.parameters(), lr=1e-2, weight_decay=5e-4)

    def step() -> float:
        model.train()
        optimizer.zero_grad()
        loss = F.nll_loss(model(x, near)[known], y[known])
        loss.backward()
        optimizer.step()
        return loss.item()

    return Loop(model, [optimizer], step)


SCRIPTS = {
    "mnist": Script("convnet on 28 x 28 digits, Adadelta", mnist, 10, 10),
    "resnet": Script("ResNet-20 on small images, SGD", resnet, 12, 12),
    "vae": Script("variational autoencoder, Adam", vae, 80, 60),
    "gan": Script("GAN of convolutions, two Adams", gan, 25, 25),
    "siamese": Script("siamese convnet, RMSprop", siamese, 60, 40),
    "super-resolution": Script("super resolution, Adam", superresolution, 50, 40),
    "word-lstm": Script("word model, two LSTM layers, SGD, clipped", word_lstm, 15, 15),
    "tiny-gpt": Script("tiny GPT, AdamW, two micro-batches, clipped", tiny_gpt, 15, 15),
    "time-series": Script("time series, LSTM cells, LBFGS", time_series, 5, 5),
    "reinforce": Script("REINFORCE on a pole and a cart", reinforce, 60, 40),
    "graph": Script("graph convolutions, full batch", graph, 120, 60),
}
