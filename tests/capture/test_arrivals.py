"""The table in the docstring of `arrivals` is what happens."""

import re

import pytest
import torch

from gradlens.capture import arrivals
from gradlens.capture.arrivals import TRANSITIONS, Act, Arrival, Arrivals, State
from gradlens.capture.attachment import Slot


def documented():
    """The table of the module's docstring: `{(state, arrival): (state, act)}`."""
    lines = arrivals.__doc__.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["state"])
    columns = [Arrival[word] for word in lines[start].split()[1:]]
    table = {}
    for line in lines[start + 1 : start + 1 + len(State)]:
        name, *cells = re.findall(r"[A-Z_]+(?:!| \([a-z+]+\))?", line.strip())
        assert len(cells) == len(columns), line
        for arrival, cell in zip(columns, cells, strict=True):
            act = (
                Act.READ
                if cell.endswith("!")
                else Act.HOLD
                if "(hold)" in cell
                else Act.ADD
                if "(+)" in cell
                else Act.NOTHING
            )
            table[State[name], arrival] = State[re.match("[A-Z]+", cell)[0]], act
    return table


def test_the_docstring_has_the_transitions():
    """Each state and each arrival, with what follows and what is done."""
    assert documented() == TRANSITIONS
    assert len(TRANSITIONS) == len(State) * len(Arrival)


@pytest.mark.parametrize(("state", "arrival"), TRANSITIONS, ids=lambda value: value.name)
def test_each_transition_happens(state, arrival):
    """From each state each arrival leads where the table says; what is held, added or read is as it says."""
    slot = Slot("w", None, "", torch.zeros(2))
    seen, kept, g = Arrivals(), torch.ones(2), torch.full((2,), 3.0)
    seen.states[slot] = state
    if state in (State.HELD, State.PENDING, State.SUMMED):
        seen.tensors[slot] = kept
    after, act = TRANSITIONS[state, arrival]
    assert seen.arrive(slot, arrival, g) is (act is Act.READ)
    assert seen.state(slot) is after
    assert seen.has(slot) is (after in arrivals.ARRIVED)
    if act is Act.HOLD:
        assert seen.tensors[slot] is g
    if act is Act.ADD:
        before = 1.0 if state in (State.HELD, State.PENDING, State.SUMMED) else 0.0
        assert seen.tensors[slot].tolist() == [before + 3.0] * 2
        assert seen.tensors[slot] is not g
    if after in (State.READ, State.UNDEFINED) and state is not after:
        assert slot not in seen.tensors
    if (state, arrival) == (State.HELD, Arrival.ACCUMULATED):
        assert seen.bytes == 8


def test_what_a_plain_pass_noted_is_fresh():
    """But for a slot whose gradient turned out undefined."""
    slots = [Slot(name, None, "", torch.zeros(1)) for name in "ab"]
    seen = Arrivals()
    seen.arrive(slots[1], Arrival.NONE)
    seen.noted += slots
    seen.settle()
    assert [seen.state(slot) for slot in slots] == [State.FRESH, State.UNDEFINED]
    assert list(seen.arrived()) == slots[:1]
