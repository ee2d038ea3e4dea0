"""The allowance, and the samples that fit into it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradlens
from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.records import Parameters
from gradlens.statistics.memory import Plan, parse_bytes


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0, 0), (4096, 4096), ("256MiB", 256 * 2**20), ("1.5 GB", 1_500_000_000), ("64kb", 64_000), ("2G", 2**31), ("7", 7)],
)
def test_amounts_of_memory(given, expected):
    """Numbers are bytes; text has decimal or binary units."""
    assert parse_bytes(given) == expected


@pytest.mark.parametrize("given", ["", "MiB", "12 parsecs", "-1MiB", -5])
def test_what_is_no_amount_is_refused(given):
    """Nonsense says how to write it."""
    with pytest.raises(ArgumentError, match="memory"):
        parse_bytes(given)


@pytest.mark.parametrize("given", [True, None, 1.5])
def test_other_types_are_refused(given):
    """Booleans and floats are no bytes."""
    with pytest.raises(ArgumentTypeError):
        parse_bytes(given)


shapes = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(shapes=shapes, allowance=st.integers(0, 200_000), buffers=st.integers(0, 3), itemsize=st.sampled_from([2, 4, 8]))
def test_a_plan_stays_inside_its_allowance(shapes, allowance, buffers, itemsize):
    """What is taken never exceeds the allowance, and it is all that is needed where that fits; a view has what it says."""
    plan = Plan(shapes, [itemsize] * len(shapes), allowance, buffers)
    assert plan.taken <= max(allowance, 0)
    if plan.needed <= allowance:
        assert all(sample.whole for sample in plan.samples)
    for shape, sample in zip(shapes, plan.samples, strict=True):
        assert sample.view(torch.zeros(shape)).numel() == sample.count


def test_a_sample_is_a_view_of_distinct_entries_that_visits_every_column():
    """The stride shares no factor with an axis, so that each column of a matrix is met."""
    plan = Plan([(512, 64)], [4], 512 * 64, 1)
    (sample,) = plan.samples
    x = torch.arange(512 * 64).reshape(512, 64)
    view = sample.view(x)
    assert view.data_ptr() >= x.data_ptr()
    assert len(view.unique()) == sample.count <= 512 * 64 // 4
    assert len((view % 64).unique()) == 64
    assert math.gcd(sample.stride, 64) == 1


def test_small_parameters_stay_whole():
    """The largest parameter is thinned first."""
    plan = Plan([(1000, 1000), (10,)], [4, 4], 40_000, 1)
    assert not plan.samples[0].whole
    assert plan.samples[1].whole


def test_the_sample_is_the_same_each_time_and_seeded():
    """The same seed gives the same sample; another gives another start."""
    plans = [Plan([(1000, 1000)], [4], 40_000, 1, seed=seed) for seed in (0, 0, 1)]
    assert plans[0].samples == plans[1].samples
    assert plans[0].samples != plans[2].samples


def test_the_choice_is_described():
    """One line says how much memory, and what share of the weights it is for."""
    assert "every weight" in Plan([(10,)], [4], 2**20, 2).describe()
    assert "no room for updates and flips" in Plan([(10,)], [4], 0, 2).describe()
    assert "no buffers" in Plan([(10,)], [4], 2**20, 0).describe()
    assert "%" in Plan([(1000, 1000)], [4], 40_000, 1).describe()


def model(*shapes, dtype="float32"):
    return Parameters(tuple(f"p{i}" for i in range(len(shapes))), shapes, (dtype,) * len(shapes))


def test_samples_are_chosen_anew_when_the_model_changes():
    """Within the same allowance, by row, and not while parameters are as planned."""
    plan = Plan.of(model((1000, 10), (10,)), 20_000, 1, more=0, what="flips")
    first = plan.samples
    assert plan.samples_of(model((1000, 10), (10,))) is first
    grown = plan.samples_of(model((10,), (1000, 10), (1000, 10), (10,)))
    assert [sample.whole for sample in grown] == [True, False, False, True]
    assert plan.taken <= 20_000
    assert plan.samples_of(model((1000, 10), (10,))) == first
    assert [sample.whole for sample in plan.samples_of(model((4, 4)))] == [True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_what_is_needed_follows_the_type(dtype):
    """Bytes an entry of each copy, and `more` for each number, of which a complex entry has two."""
    itemsize, numbers = getattr(torch, dtype).itemsize, 2 if dtype == "complex64" else 1
    plan = Plan.of(model((7, 3), dtype=dtype), 10**6, 3, more=11, what="everything")
    assert plan.needed == plan.taken == 21 * (3 * itemsize + 11 * numbers)
    assert plan.needed == Plan([(7, 3)], [itemsize], 10**6, 3, more=11, pairs=numbers == 2).needed


@pytest.mark.parametrize("memory", ["1MiB", 4_000])
def test_parameters_that_come_later_have_buffers_too(memory):
    """Adapters put into a watched model have updates, flips and evidence, and nobody calls them unmoved."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"body": nn.Linear(16, 16), "head": nn.Linear(16, 2)})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with gradlens.watch(net, optimizer, memory=memory, features=("updates", "flips", "evidence")) as lens:
        for step in range(8):
            if step == 2:
                net["adapter"] = nn.Linear(16, 16)
                optimizer.add_param_group({"params": net["adapter"].parameters()})
            optimizer.zero_grad()
            for _ in range(2):
                x = net["body"](torch.randn(8, 16))
                (net["head"](x + net["adapter"](x) if "adapter" in net else x) ** 2).mean().backward()
            optimizer.step()
        table, weights = lens.table().set_index("parameter"), lens.weights("adapter.weight")
    assert (table.loc["adapter.weight", ["update_ratio", "cosine"]] > 0).all()
    assert (table["sampled"] == 1).all() == (memory == "1MiB")
    assert weights["agree"].notna().sum() == (
        256 if memory == "1MiB" else round(256 * table.loc["adapter.weight", "sampled"])
    )
    assert not [finding for finding in lens.findings() if finding.rule == "unmoved"]
