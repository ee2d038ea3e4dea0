"""What is read is what was written; what is not asked for is not read."""

import numpy as np
import pandas as pd
import pytest
import torch

import gradlens
from gradlens import fields, frames
from gradlens.store.run import open_run
from tests.store import made


def same(read, expected):
    """Equal bit for bit: columns, dtypes, values."""
    pd.testing.assert_frame_equal(read, expected, check_exact=True)


# --- a run is what the lens saw -------------------------------------------------------------------------------------


def watched(run, steps=6, case=None, **options):
    """A short training, its lens closed, and what the lens said before."""
    case = case or gradlens.testing.healthy()
    with gradlens.watch(case.model, case.optimizer, run=run, **options) as lens:
        for step in range(steps):
            lens.observe(loss=sum(case.train(1, first=step)))
        return lens.history(), lens.table(), lens.findings(), lens.weights(top=10_000)


def test_history_and_table_are_those_of_the_lens(tmp_path):
    """The same rows, columns, dtypes and bits as the lens gives, of every step and of the last."""
    history, table, _, _ = watched(tmp_path)
    run = open_run(tmp_path)
    same(run.history(), history)
    same(run.table(), table)
    assert run.names() == history["parameter"].unique().tolist()
    assert run.steps() == list(range(6))


@pytest.mark.parametrize("stage", ["backward", "used"])
def test_the_table_of_a_step_and_stage_is_that_of_the_lens(tmp_path, stage):
    """`table(step, stage=...)` asks both for the same."""
    case = gradlens.testing.healthy()
    with gradlens.watch(case.model, case.optimizer, run=tmp_path) as lens:
        case.train(5)
        expected = lens.table(3, stage=stage)
        lens.flush()
        same(open_run(tmp_path).table(3, stage=stage), expected)
    same(open_run(tmp_path).table(3, stage=stage), expected)


@pytest.mark.parametrize("case", [gradlens.testing.absent_branch, gradlens.testing.nonfinite], ids=["absent", "nonfinite"])
def test_findings_are_those_of_the_lens(tmp_path, case):
    """Findings come back as they were, field by field; and so do rows of absent and of broken gradients."""
    history, table, findings, _ = watched(tmp_path, 12, case())
    run = open_run(tmp_path)
    assert findings
    assert run.findings() == findings
    same(run.history(), history)
    same(run.table(), table)


def test_two_optimizers_and_accumulation_read_back(tmp_path):
    """Several backwards a step, and optimizers that each read their own parameters."""
    case = gradlens.testing.healthy()
    first, last = torch.optim.SGD(case.model[0].parameters(), 0.1), torch.optim.Adam(case.model[2:].parameters(), 1e-3)
    with gradlens.watch(case.model, [first, last], run=tmp_path, stage=["backward", "accumulated", "used"]) as lens:
        for step in range(4):
            for half in range(2):
                case.loss(case.model, case.batch(2 * step + half)).backward()
            first.step()
            last.step()
            case.model.zero_grad()
        history, table = lens.history(), lens.table()
    run = open_run(tmp_path)
    same(run.history(), history)
    same(run.table(), table)


def test_weights_are_those_of_the_lens_once_gradients_are_gone(tmp_path):
    """The most sensitive weights of the last step, with their indices, and of which step and stage they are."""
    case = gradlens.testing.healthy()
    with gradlens.watch(case.model, case.optimizer, run=tmp_path) as lens:
        case.train(3)
        case.optimizer.zero_grad()
        expected = lens.weights(top=40)
        one = lens.weights("0.weight", top=3, by="saliency")
    run = open_run(tmp_path)
    for read, live in ((run.weights(top=40), expected), (run.weights("0.weight", top=3, by="saliency"), one)):
        same(read, live)
        assert read.attrs == live.attrs == {"step": 2, "stage": "used"}
    assert run.weights()["parameter"].unique().tolist() == run.names()


def test_snapshots_are_the_records_that_were_written(tmp_path):
    """Every number of every record, hostile ones too; histograms and weights where they were kept."""
    written = made.training(3)
    made.write(tmp_path, written)
    read = open_run(tmp_path).snapshots()
    assert len(read) == len(written)
    for a, b in zip(read, written, strict=True):
        assert (a.step, a.backward, a.stage, a.time, a.rank, a.scalars) == (
            b.step,
            b.backward,
            b.stage,
            b.time,
            b.rank,
            b.scalars,
        )
        assert a.parameters == b.parameters
        assert a.status.tolist() == b.status.tolist()
        for name in [*fields.BY_NAME, *fields.QUANTILES]:
            np.testing.assert_array_equal(a.columns[name], b.columns[name], err_msg=name)
            assert a.columns[name].dtype == b.columns[name].dtype
        np.testing.assert_array_equal(a.scale, b.scale)
        np.testing.assert_array_equal(a.histogram, b.histogram)
        for name in ("index", "partial", "value"):
            np.testing.assert_array_equal(getattr(a.top, name), getattr(b.top, name), err_msg=name)
    same(frames.frame(read), frames.frame(written))
    same(open_run(tmp_path).history(), frames.frame(written))
