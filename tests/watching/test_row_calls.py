"""Gradients that are read in their hooks, one by one: the same rows as where all are read at once."""

import pandas
import pytest
import torch
from torch import nn

import gradlens
from gradlens.statistics.table import Piece
from gradlens.watching.row_calls import joined


def recorded(hooks, features, steps=12):
    """The tables of a training with somebody else's hooks, or without."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters() if hooks else ():
        parameter.register_post_accumulate_grad_hook(lambda p: None)
    with gradlens.watch(model, optimizer, features=features) as lens:
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        lens.flush()
        return [lens.table(step, stage="backward") for step in range(steps)]


@pytest.mark.parametrize("features", [(), ("flips",), ("updates", "flips")])
def test_rows_that_were_read_in_hooks_are_those_that_are_read_together(features):
    """Every column of every step, bit for bit."""
    for one, other in zip(recorded(True, features), recorded(False, features), strict=True):
        assert len(one) == 4
        pandas.testing.assert_frame_equal(one, other, check_exact=True)


def test_pieces_of_one_row_are_joined_in_the_models_order():
    """Others stay as they are."""
    rows = torch.arange(12.0).double().view(4, 3)
    several = Piece([0, 2], rows[:2])
    pieces = joined([Piece([3], rows[2:3]), several, Piece([1], rows[3:])])
    assert [list(piece.rows) for piece in pieces] == [[1, 3], [0, 2]]
    assert torch.equal(pieces[0].numbers, rows[[3, 2]])
    assert pieces[1] is several


@pytest.mark.parametrize("odd", [{"skipped": True}, {"divisor": 2.0}])
def test_a_piece_with_facts_of_its_own_is_not_joined(odd):
    """Its numbers are to be divided otherwise, or count for nothing."""
    rows = torch.ones(3, 2).double()
    pieces = [Piece([2], rows[:1]), Piece([1], rows[1:2], **odd), Piece([0], rows[2:])]
    assert [list(piece.rows) for piece in joined(pieces)] == [[0, 2], [1]]
