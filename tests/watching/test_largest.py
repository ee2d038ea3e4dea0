"""The largest entries, a chunk at a time, are those that a sort of everything puts first."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens.watching.largest import Largest


def collected(lists, count, chunk):
    best = Largest(count)
    for source, key in enumerate(lists):
        for start in range(0, len(key), chunk):
            part = key[start : start + chunk]
            best.add(source, start, part, part * 2, part * 4)
    return best.result()


def sorted_out(lists, count):
    everything = [(float(x), source, i) for source, key in enumerate(lists) for i, x in enumerate(key.tolist())]
    everything.sort(key=lambda each: (math.isnan(each[0]), -each[0] if not math.isnan(each[0]) else 0, each[1:]))
    return everything[:count]


keys = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf, math.nan]) | st.floats(0, 4, width=32), max_size=40)


@settings(max_examples=200, deadline=None)
@given(st.lists(keys, min_size=1, max_size=4), st.integers(1, 50), st.integers(1, 20))
def test_it_is_the_head_of_a_stable_sort(lists, count, chunk):
    """Equal keys by their order, NaN last, whatever the chunks."""
    tensors = [torch.tensor(each, dtype=torch.float32) for each in lists]
    found, wanted = collected(tensors, count, chunk), sorted_out(tensors, count)
    if not wanted:
        assert found is None
        return
    assert list(zip(found.source.tolist(), found.index.tolist(), strict=True)) == [each[1:] for each in wanted]
    for i, (key, _, _) in enumerate(wanted):
        assert math.isnan(key) or (found.key[i] == key and found.value[i] == 2 * key and found.partial[i] == 4 * key)


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_few_are_kept_whatever_the_order(order):
    """Rising keys, each above the bar, do not pile up."""
    keys = {"rising": torch.arange(100_000.0), "falling": torch.arange(100_000.0).flip(0), "equal": torch.ones(100_000)}[
        order
    ]
    best, most = Largest(10), 0
    for start in range(0, len(keys), 1000):
        part = keys[start : start + 1000]
        best.add(0, start, part, part, part)
        most = max(most, sum(len(each.key) for each in best._parts))
    assert most < 10_000
    assert best.result().index.tolist() == keys.sort(descending=True, stable=True).indices[:10].tolist()


def test_keys_of_several_types_are_compared_exactly():
    """A bar of float64 does not rise when it is rounded to float32."""
    high = torch.tensor([1.0 + 2**-30, 0.5], dtype=torch.float64)
    best = Largest(1)
    best.add(0, 0, high * 0.999, high, high)
    best.add(1, 0, torch.tensor([1.0, 0.9999999], dtype=torch.float32), torch.ones(2), torch.ones(2))
    assert (best.result().source.tolist(), best.result().index.tolist()) == ([1], [0])
    tight = Largest(1)
    tight.add(0, 0, torch.tensor([1.0 - 2**-30], dtype=torch.float64), torch.ones(1), torch.ones(1))
    tight.add(1, 0, torch.tensor([1.0], dtype=torch.float32), torch.ones(1), torch.ones(1))
    assert tight.result().source.tolist() == [1], "1 - 2**-30 becomes 1 in float32"
