"""Small trained models whose full Hessians are known: minima, saddles, kinks, weight decay, attention, recurrence."""

import functools

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


@functools.cache
def digits():
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16, dtype=torch.float64).reshape(-1, 1, 8, 8)
    return F.avg_pool2d(x, 2).reshape(-1, 16)[:400], torch.tensor(y)[:400]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 10)

    def forward(self, x):
        return self.out(self.cell(x.reshape(len(x), 4, 4))[0][:, -1])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), nn.Linear(4, 10)

    def forward(self, x):
        return self.out(self.layer(x.reshape(len(x), 4, 4)).mean(1))


def classifier(make, steps=150, lr=0.02, decay=0.0):
    x, y = digits()

    def loss(m, rows=slice(None)):
        value = F.cross_entropy(m(x[rows]), y[rows])
        return value + decay / 2 * sum(p.square().sum() for p in m.parameters()) if decay else value

    return make, loss, steps, lr


def autoencoder():
    x, _ = digits()
    return lambda: nn.Sequential(nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 16)), lambda m: F.mse_loss(m(x), x), 150, 0.02


def linear_at_saddle():
    """A deep linear net next to 0, where the gradient is small and the Hessian indefinite."""
    x, _ = digits()

    def make():
        model = nn.Sequential(nn.Linear(16, 6, bias=False), nn.Linear(6, 16, bias=False))
        for p in model.parameters():
            nn.init.normal_(p, std=1e-3)
        return model

    return make, lambda m: F.mse_loss(m(x), x), 0, 0.0


#: name -> (make, loss, steps of Adam, its learning rate)
MODELS = {
    "tanh MLP": classifier(lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10))),
    "ReLU MLP": classifier(lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))),
    "softplus MLP with weight decay": classifier(
        lambda: nn.Sequential(nn.Linear(16, 12), nn.Softplus(), nn.Linear(12, 10)), decay=0.01
    ),
    "softmax regression": classifier(lambda: nn.Linear(16, 10)),
    "CNN": classifier(
        lambda: nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(24, 10))
    ),
    "BatchNorm MLP": classifier(
        lambda: nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 10)), steps=60
    ),
    "GRU": classifier(Recurrent, steps=60),
    "transformer": classifier(Attentive, steps=60),
    "autoencoder": autoencoder(),
    "linear net at a saddle": linear_at_saddle(),
}


@functools.cache
def trained(name, seed=0):
    """A model in float64, its loss, and its full Hessian."""
    make, loss, steps, lr = MODELS[name]
    torch.manual_seed(seed)
    model = make().double()
    optimizer = torch.optim.Adam(model.parameters(), lr) if steps else None
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    model.zero_grad()
    return model, loss, hessian(model, loss)


def hessian(model, loss):
    """All rows at once, by differentiating the gradient again."""
    parameters = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.autograd.grad(loss(model), parameters, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in gradient])
        each = torch.eye(len(flat), dtype=flat.dtype)
        rows = torch.autograd.grad(flat, parameters, each, is_grads_batched=True, materialize_grads=True)
    full = torch.cat([row.reshape(len(flat), -1) for row in rows], 1).numpy()
    return (full + full.T) / 2 if np.isfinite(full).all() else full
