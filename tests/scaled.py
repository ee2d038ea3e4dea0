"""A training with a GradScaler whose gradients are clipped, in the right order or before they are unscaled."""

import torch
from torch import nn

import gradlens


def clipped(model, x, y, *, steps, given, right):
    """The closed lens of it; `given`: watch() is told of the scaler, `right`: gradients are unscaled before that."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    lens = gradlens.watch(model, optimizer, **({"scaler": scaler} if given else {}))
    for _ in range(steps):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if right:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    lens.close()
    return lens
