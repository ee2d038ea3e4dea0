"""What is looked at beside gradients: here, what earlier steps left in `.grad`, by a few entries."""

import math

import pytest
import torch
from torch import nn

import gradlens
from gradlens.capture.auditor import SAMPLED, stride
from gradlens.facts import Graph


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 64, 1024, 64 * 128, 3 * 3 * 27 * 64, 10**6, 997])
def test_sampled_entries_lie_in_all_columns(n):
    """The stride has no factor in common with the entries, so none with the columns; and takes about so many."""
    step = stride(n)
    assert math.gcd(step, n) == 1
    assert SAMPLED // 2 <= len(range(0, n, step)) <= 2 * SAMPLED or n < 2 * SAMPLED


@pytest.mark.parametrize("zeroed", [False, True])
def test_what_is_left_of_inputs_with_constant_pixels(zeroed):
    """Pixels that are always 0 leave columns of 0 in the first layer's gradient, which is left there all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with gradlens.watch(model, optimizer, writers=[], rules=()) as lens:
        for _ in range(4):
            x = torch.rand(16, 64)
            x[:, ::8] = 0
            model(x).square().mean().backward()
            optimizer.step()
            if zeroed:
                optimizer.zero_grad()
        lens.flush()
        looks = [fact.left for fact in lens._recorder.history.facts if isinstance(fact, Graph)]
    assert looks == [0.0, *[0.0 if zeroed else 1.0] * 3]
