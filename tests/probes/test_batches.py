"""Batches tell how large they are."""

import numpy as np
import pytest
import torch

from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.probes.batches import batch_size, check_batches, counted


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.ones(3, 2), 3),
        (np.ones((4, 2)), 4),
        ((torch.ones(5), 1), 5),
        ({"n": 1, "x": torch.ones(6, 1)}, 6),
        ([[1, torch.ones(7)]], 7),
        ((torch.ones(0, 2), torch.ones(4)), 4),
        ({"x": torch.ones(0, 2), "y": []}, 0),
        (torch.tensor(1.0), None),
        ("text", None),
        (3, None),
    ],
)
def test_the_size_of_a_batch_is_that_of_its_first_tensor(batch, size):
    """Tensors, arrays, tuples, dicts and what is nested in them tell their size; anything else has none."""
    assert batch_size(batch) == size


@pytest.mark.parametrize(
    "batches",
    [
        (torch.ones(8, 3), torch.zeros(8, dtype=torch.int64)),
        [torch.ones(8, 3), torch.zeros(8)],
        (np.ones((8, 3)), np.zeros(8, dtype=int)),
        (torch.ones(8, 3), torch.ones(8, 5)),
    ],
)
def test_one_batch_in_place_of_batches_is_noticed(batches):
    """`(x, y)` is refused with what to give; so is a tensor, whose rows would be taken for batches."""
    with pytest.raises(ArgumentTypeError, match=r"one batch, \(x, y\).*\[batch\]"):
        check_batches(batches)
    with pytest.raises(ArgumentTypeError, match=r"x\.split\(32\)"):
        check_batches(batches[0])


@pytest.mark.parametrize(
    "batches",
    [
        torch.ones(100, 3).split(32),
        [torch.ones(8, 3)] * 3,
        [(torch.ones(8, 3), torch.ones(8))] * 2,
        [torch.ones(8, 3)],
        iter([torch.ones(2)]),
    ],
)
def test_batches_are_taken(batches):
    """Pieces of one tensor, lists of tensors, pairs, and iterators are batches."""
    check_batches(batches)


def test_sizes_are_asked_or_listed():
    """A function of the batch, or a number each, replaces the first dimension; what is no size is named."""
    batches = [torch.ones(7, 4), torch.ones(7, 2)]
    assert [n for _, n in counted(batches, "", False)] == [7, 7]
    assert [n for _, n in counted(batches, "", False, lambda batch: batch.shape[1])] == [4, 2]
    assert [n for _, n in counted(batches, "", False, [4, 2])] == [4, 2]
    assert [n for _, n in counted(batches, "", False, torch.tensor([4, 2]))] == [4, 2]
    with pytest.raises(ArgumentError, match="1 numbers"):
        list(counted(batches, "", False, [4]))
    with pytest.raises(ArgumentError, match="the size of batch 0"):
        list(counted(batches, "", False, lambda batch: -1))
    with pytest.raises(ArgumentTypeError, match="function of a batch"):
        list(counted(batches, "", False, 4))
