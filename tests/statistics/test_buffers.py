"""The buffers: what is kept of one step is compared with the next, whole or by sample, and forgotten when it must be."""

import pytest
import torch

from gradlens import fields, kernels
from gradlens.records import Parameters
from gradlens.statistics.buffers import Buffer, summarize
from gradlens.statistics.memory import Plan

SHAPES = ((6, 5), (7,), ())
PARAMETERS = Parameters(("a", "b", "c"), SHAPES, ("float32",) * 3)
ROWS = [0, 1, 2]


def buffer(allowance=1 << 20):
    return Buffer(Plan(SHAPES, (4, 4, 4), allowance, 1)).use(PARAMETERS)


def gradients(seed, dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=made).to(dtype) for shape in SHAPES]


def test_what_was_kept_together_is_found_together():
    """The rooms of one step serve the next as they are, the same tensors with the newest numbers."""
    last = buffer()
    assert last.together(ROWS, gradients(0)) is None
    last.keep(ROWS, gradients(0))
    first = last.together(ROWS, gradients(1))
    last.keep(ROWS, gradients(1))
    assert last.together(ROWS, gradients(2)) is first
    assert all(torch.equal(kept, g) for kept, g in zip(first, gradients(1), strict=True))


def test_several_lists_of_rows_are_found_in_turn():
    """Each list that was kept together is, whatever was kept in between; rows that two lists share have one room."""
    last = buffer()
    last.keep(ROWS[:2], gradients(0)[:2])
    last.keep(ROWS[1:], gradients(1)[1:])
    first, second = last.together(ROWS[:2], gradients(2)[:2]), last.together(ROWS[1:], gradients(2)[1:])
    assert first[1] is second[0]
    assert torch.equal(first[1], gradients(1)[1])
    assert last.together(ROWS[:2], gradients(2)[:2]) is first
    assert last.together(ROWS[1:], gradients(2)[1:]) is second


@pytest.mark.parametrize("allowance", [1 << 20, 40])
def test_rooms_of_rows_that_were_never_kept_together(allowance):
    """They are those of the single rows, where each has one and is whole; the same object each time."""
    last = buffer(allowance)
    last.keep(ROWS[:2], gradients(0)[:2])
    assert last.rooms(PARAMETERS, ROWS, kept=False) is None
    last.keep(ROWS[2:], gradients(0)[2:])
    rooms = last.rooms(PARAMETERS, ROWS, kept=True)
    if allowance == 40:
        assert rooms is None
    else:
        assert rooms is last.rooms(PARAMETERS, ROWS, kept=True)
        assert all(room is last.get(row) for row, room in enumerate(rooms))
        last.forget()
        assert last.rooms(PARAMETERS, ROWS, kept=True) is None
        assert last.rooms(PARAMETERS, ROWS, kept=False) is rooms
        last.fill(ROWS[:2], kernels.StableTensors(rooms[:2]))
        assert last.rooms(PARAMETERS, ROWS[:2], kept=True)[0] is rooms[0]
        assert last.rooms(PARAMETERS, ROWS, kept=True) is None
        others = Parameters(("d", "b", "c"), SHAPES, ("float32",) * 3)
        assert last.rooms(others, ROWS, kept=False) is None
        assert last.get(0) is None  # cleared, as for `use`


@pytest.mark.parametrize("what", ["forgotten", "other rows", "another type", "sparse", "other parameters", "by sample"])
def test_what_is_of_another_time_or_kind_is_not(what):
    """Rows that were forgotten, never kept together, of another type or layout, or sampled are looked at one by one."""
    last, rows, tensors = buffer(40 if what == "by sample" else 1 << 20), ROWS, gradients(1)
    last.keep(ROWS, gradients(0))
    if what == "forgotten":
        last.forget()
    elif what == "other rows":
        rows, tensors = [0, 2], [tensors[0], tensors[2]]
    elif what == "another type":
        tensors = gradients(1, torch.bfloat16)
    elif what == "sparse":
        tensors = [tensors[0].to_sparse(), *tensors[1:]]
    elif what == "other parameters":
        last.use(Parameters(("a", "b", "d"), SHAPES, ("float32",) * 3))
    assert last.together(rows, tensors) is None


def test_what_is_forgotten_is_kept_again_in_the_same_rooms():
    """What was forgotten is not found, by row or together, until it is kept again: then in the rooms that were there."""
    last = buffer()
    last.keep(ROWS, gradients(0))
    rooms = last.together(ROWS, gradients(1))
    last.forget()
    assert last.get(1) is None
    assert last.together(ROWS, gradients(1)) is None
    last.keep(ROWS, gradients(1))
    assert last.together(ROWS, gradients(2)) is rooms


@pytest.mark.parametrize("allowance", [1 << 20, 40])
def test_flips_are_those_of_the_step_before(allowance):
    """With a sparse gradient and another type in between, each row's flips are against its last dense one of that type."""
    last = buffer(allowance)
    steps = [gradients(0), gradients(1), [gradients(2)[0].to_sparse(), *gradients(2)[1:]], gradients(3)]
    steps += [gradients(4, torch.float64), gradients(5, torch.float64)]
    kept = [None] * 3
    for step in steps:
        numbers, flips = summarize(ROWS, step, [None] * 3, last)
        table = numbers.clone()
        if flips is not None:
            first = fields.AT[fields.FLIPS[0].name]
            table[flips[0], first : first + len(fields.FLIPS)] = flips[1]
        for row, g in enumerate(step):
            moving = table[row, fields.AT["flip_moving"]].item()
            if g.layout != torch.strided:
                continue
            view, before = last.view(row, g), kept[row]
            known = before is not None and before.dtype == g.dtype
            assert moving == (int(((view != 0) & (last.view(row, before) != 0)).sum()) if known else 0)
            kept[row] = g.clone()
