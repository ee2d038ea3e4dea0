"""Batches tell how large they are."""

import numpy as np
import pytest
import torch

from gradlens.probes.batches import batch_size


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
