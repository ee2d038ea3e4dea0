"""The flight recorder: single weights of the moments around a step that went wrong."""

import numpy as np
import pytest
import torch

import gradlens
from gradlens.blocks import block_of
from gradlens.moments import as_moments
from gradlens.store.flight import AFTER, LAST, MOST, ROWS, Flight
from tests.analysis.made import snapshot


def run_of(path, spoil, steps=160):
    """A run whose gradient is spoilt by `spoil(model, step)` between backward and step."""
    case = gradlens.testing.healthy()
    case.optimizer = torch.optim.SGD(case.model.parameters(), lr=1e-3)
    with gradlens.watch(case.model, case.optimizer, run=path):
        for step, data in enumerate(case.batches(steps)):
            case.optimizer.zero_grad()
            case.loss(case.model, data).backward()
            spoil(case.model, step)
            case.optimizer.step()
    return gradlens.open_run(path)


def spoil_at(at, value):
    def spoil(model, step):
        if step == at:
            for parameter in model.parameters():
                parameter.grad.mul_(value)

    return spoil


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_the_steps_before_have_all_that_was_known(tmp_path, value):
    """The most sensitive weights of each of the last steps are there, once; in a healthy run they are thinned."""
    run = run_of(tmp_path / "spoilt", spoil_at(140, value))
    well = run_of(tmp_path / "well", lambda model, step: None)
    assert run.settings["flight"][0] == 140
    assert "flight" not in well.settings
    assert {s.step for s in run.snapshots() if s.top is not None} >= set(range(128, 141))
    assert not {s.step for s in well.snapshots() if s.top is not None} >= set(range(128, 141))
    for step in range(130, 140):
        weights = run.weights(step=step)
        assert not weights.duplicated(["parameter", "index"]).any()
        assert set(weights["parameter"]) == set(run.names())


def asked(flight, moments, **columns):
    """The numbers that it wants written for each of some moments."""
    result = []
    for number, wrong in enumerate(moments):
        block = block_of(snapshot(number, nan=[int(wrong), 0], **columns))
        assert flight.wrong(block) == [wrong]
        result.append(taken(flight, number, block, wrong))
    return result


def taken(flight, number, block, wrong):
    """The numbers that it wants written for one moment."""
    answers = {"wrong": np.array([wrong]), "written": np.array([False])}
    return [n for n, _ in flight.take(as_moments([(block, 0)]), number, **answers)]


@pytest.mark.parametrize("size", [2, 33, 100])
def test_it_does_not_matter_how_many_moments_come_at_once(size):
    """What is written is the same as of one moment after the other."""
    rng = np.random.default_rng(size)
    wrong, written = rng.random(300) < 0.01, rng.random(300) < 0.1
    moments = as_moments([(block_of(snapshot(number)), 0) for number in range(300)])

    def wanted(size):
        flight = Flight()
        parts = [slice(at, at + size) for at in range(0, 300, size)]
        return [
            n for at in parts for n, _ in flight.take(moments[at], at.start, wrong=wrong[at], written=written[at])
        ], flight.steps

    assert wanted(size) == wanted(1)
    assert len(wanted(1)[0]) > LAST


def test_what_is_held_is_bounded():
    """So many moments before, so many behind, and nothing while all is well."""
    wanted = asked(Flight(), [*[False] * 100, True, *[False] * 10])
    assert wanted[:100] == [[]] * 100
    assert wanted[100] == [*range(100 - LAST, 101)]
    assert [len(each) for each in wanted[101:]] == [1] * AFTER + [0] * (10 - AFTER)


def test_it_writes_a_few_times_a_run():
    """A training that is NaN from some step on does not fill the disk."""
    flight = Flight()
    written = sum(map(len, asked(flight, [True] * 500)))
    assert len(flight.steps) == MOST
    assert written == MOST * (AFTER + 1)


def test_a_large_model_holds_fewer_moments():
    """Rows are what takes memory."""
    flight = Flight()
    names = tuple(f"{i}.weight" for i in range(ROWS // 4))
    for number in range(10):
        block = block_of(snapshot(number, names))
        assert not taken(flight, number, block, False)
    block = block_of(snapshot(10, names, nan=1))
    assert taken(flight, 10, block, True) == [6, 7, 8, 9, 10]


def test_a_known_loss_scale_excuses_what_is_not_finite():
    """The scaler skips such steps."""
    assert Flight().wrong(block_of(snapshot(0, nan=[3, 0], scale=1024.0))) == [False]
    assert Flight().wrong(block_of(snapshot(0, nan=[3, 0], scale=np.nan))) == [True]
