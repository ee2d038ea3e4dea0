"""What the feature `activations` adds to a step, on the training thread:  python benchmarks/activations.py

Three copies of a model train in turn, one step each: bare, watched, and watched with the feature. Processor time of the
training thread, which other processes disturb little; the median of all steps. `us_a_module` is what the feature adds for
each module that is read.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import gradlens

FEATURES = ("updates", "flips")


def mlp() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    layers = [module for _ in range(3) for module in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, 10)), lambda: torch.randn(32, 64)


def cnn() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    blocks = [
        module
        for a, b in ((3, 32), (32, 64), (64, 128))
        for module in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 16, 10)), lambda: torch.randn(64, 3, 32, 32)


MODELS = {"mlp, 32 examples": (mlp, 1500), "cnn, 64 images of 32 x 32": (cnn, 60)}


def measured(make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]], steps: int) -> tuple[list[float], int]:
    """Median seconds of processor time a step: bare, watched, with activations; and how many modules are read."""
    trainings, lenses = [], []
    for features in (None, FEATURES, (*FEATURES, "activations")):
        model, batch = make()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        trainings.append((model, batch, optimizer))
        lenses.append(None if features is None else gradlens.watch(model, optimizer, features=features))
    times: list[list[float]] = [[], [], []]
    for step in range(steps):
        for i in (range(3), reversed(range(3)))[step % 2]:
            model, batch, optimizer = trainings[i]
            x = batch()
            began = time.thread_time()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            times[i].append(time.thread_time() - began)
    read = len(set(lenses[2].activations()["module"]))  # type: ignore[union-attr]
    for lens in lenses[1:]:
        lens.close()  # type: ignore[union-attr]
    return [statistics.median(each[len(each) // 5 :]) for each in times], read


def main() -> None:
    torch.set_num_threads(1)
    print("| | modules | bare | watched | with activations | us_a_module |")
    for name, (make, steps) in MODELS.items():
        (bare, watched, more), read = measured(make, steps)
        numbers = " | ".join(f"{1e3 * each:.2f} ms" for each in (bare, watched, more))
        print(f"| {name} | {read} | {numbers} | {1e6 * (more - watched) / read:.1f} |")


if __name__ == "__main__":
    sys.exit(main())
