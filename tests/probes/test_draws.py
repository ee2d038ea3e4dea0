"""Two evaluations draw the same random numbers, and generators that nothing is drawn from are left alone."""

import random

import numpy as np
import pytest
import torch

from gradlens.probes.draws import Draws
from gradlens.probes.untouched import ProcessState

DRAWING = {
    "torch": lambda: torch.rand(3).tolist(),
    "numpy": lambda: np.random.rand(3).tolist(),
    "Python": lambda: [random.random() for _ in range(3)],
}


def begun(own=()):
    draws = Draws()
    draws.begin(ProcessState(own), own=bool(own))
    return draws


@pytest.mark.parametrize("settles", [False, True])
@pytest.mark.parametrize("kind", DRAWING)
def test_a_rewound_evaluation_draws_the_same(kind, settles):
    """Before and after it is known which generator it draws from."""
    draws = begun()
    first = DRAWING[kind]()
    if settles:
        draws.settle()
    for _ in range(2):
        draws.rewind()
        assert DRAWING[kind]() == first


@pytest.mark.parametrize("settles", [False, True])
@pytest.mark.parametrize("kind", DRAWING)
def test_an_evaluation_can_be_drawn_again_from_any_moment(kind, settles):
    """From where `state` was called, and not from the start."""
    draws = begun()
    DRAWING[kind]()
    if settles:
        draws.settle()
    states = draws.state()
    second = DRAWING[kind]()
    draws.put_back(states)
    assert DRAWING[kind]() == second


def test_nothing_is_read_or_set_where_nothing_is_drawn():
    """Once that was seen, not even what others draw meanwhile is undone."""
    draws = begun()
    draws.settle(draws.state())
    assert draws.state() == ()
    before = torch.rand(1)
    draws.rewind()
    draws.put_back(draws.state())
    assert not torch.equal(torch.rand(1), before)


def test_a_generator_of_the_users_own_is_always_put_back():
    """Its draws are not looked at, so it is never taken for unused."""
    own = torch.Generator().manual_seed(0)
    draws = begun([own])
    first = torch.rand(3, generator=own)
    draws.settle()
    draws.rewind()
    assert torch.equal(torch.rand(3, generator=own), first)
