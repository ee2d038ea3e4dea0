"""The models that costs are stated for, made here: nothing is downloaded. Data is noise, which takes as long as any.

Three MLPs that differ only in depth, since a small model pays for each parameter; a GPT, a ResNet-18 and a convnet, which
pay for their weights; and a thousand tiny tensors. Two also with a larger batch: a step costs more then, watching does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its optimizer and the loss of one batch."""

    title: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer]
    loss: Callable[[], Loss]
    steps: int  #: that a round of the benchmark times
    warm_up: int = 18  #: steps before that


def convnet() -> nn.Module:
    """14 tensors, 24,170 weights."""

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*block(1, 16), *block(16, 32), *block(32, 64)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        same = a == b and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18() -> nn.Module:
    """62 tensors, 11.7 million weights: ResNet-18 with a stem for small images and 1,000 classes."""
    blocks, a = [], 64
    for b, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        blocks.append(Residual(a, b, stride))
        a = b
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class Block(nn.Module):
    """A transformer block, as GPT-2's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = (t.view(n, length, self.heads, -1).transpose(1, 2) for t in self.qkv(self.ln1(x)).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class GPT(nn.Module):
    """148 tensors, 16.2 million weights by default; the head is tied to the embedding."""

    def __init__(
        self,
        vocabulary: int = 4096,
        length: int = 128,
        width: int = 320,
        depth: int = 12,
        heads: int = 5,
        *,
        affine: bool = True,  # of the last norm
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.ln = nn.LayerNorm(width, elementwise_affine=affine)
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln(x), self.tokens.weight)


def small_gpt() -> nn.Module:
    """98 tensors, 8.4 million weights."""
    return GPT(vocabulary=8192, width=256, depth=8, heads=4, affine=False)


def mlp(hidden: int, width: int = 32) -> Callable[[], nn.Module]:
    """An MLP with that many hidden layers: two parameters a layer, and two of the last one."""

    def make() -> nn.Module:
        layers = [layer for _ in range(hidden) for layer in (nn.Linear(width, width), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(width, 10))

    return make


def thousand() -> nn.Module:
    """1,000 tensors, 36,000 weights."""
    return nn.Sequential(*(layer for _ in range(500) for layer in (nn.Linear(8, 8), nn.Tanh())))


def _classes(shape: tuple[int, ...], classes: int) -> Callable[[], Loss]:
    def make() -> Loss:
        x, y = torch.randn(shape), torch.randint(classes, shape[:1])
        return lambda model: F.cross_entropy(model(x), y)

    return make


def _text(batch: int, length: int, vocabulary: int = 4096) -> Callable[[], Loss]:
    def make() -> Loss:
        text = torch.randint(vocabulary, (batch, length + 1))
        return lambda model: F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    return make


def _sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _adam(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=1e-3)


def _adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-4)


def _pictures(batch: int) -> Callable[[], Loss]:
    return _classes((batch, 3, 32, 32), 1000)


_images = _classes((64, 1, 28, 28), 10)

_vectors = _classes((64, 32), 10)

TASKS = {
    "mlp-8": Task("MLP, 8 parameters", mlp(3), _adam, _vectors, 2500, 600),
    "mlp-42": Task("MLP, 42 parameters", mlp(20), _adam, _vectors, 800, 300),
    "mlp-202": Task("MLP, 202 parameters", mlp(100), _adam, _vectors, 200, 80),
    "gpt": Task("GPT, 98 parameters, 8.4 million weights, 256 tokens", small_gpt, _adamw, _text(2, 128, 8192), 12, 6),
    "convnet": Task("convnet, 14 parameters, 24 thousand weights, 64 images", convnet, _sgd, _images, 60, 30),
    "resnet": Task("ResNet-18, 62 parameters, 11.7 million weights, 16 images", resnet18, _sgd, _pictures(16), 5, 3),
    "gpt-16m": Task("GPT, 148 parameters, 16.2 million weights, 512 tokens", GPT, _adamw, _text(4, 128), 5, 3),
    "thousand": Task("1,000 parameters of 8 to 64 weights", thousand, _sgd, _classes((32, 8), 8), 30, 20),
    "resnet-64": Task("ResNet-18, 64 images", resnet18, _sgd, _pictures(64), 4, 3),
    "gpt-2048": Task("GPT, 16.2 million weights, 2,048 tokens", GPT, _adamw, _text(16, 128), 4, 3),
}
