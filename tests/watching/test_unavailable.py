"""What was asked for and cannot be had is a finding, and not an empty column."""

import pytest

import gradlens
from gradlens import kernels
from gradlens.records import Severity
from gradlens.testing import RecordingWriter, healthy
from gradlens.watching import tables


def told(steps=3, **options):
    """The findings of a healthy training watched in this way, and its history."""
    case = healthy()
    with gradlens.watch(case.model, case.optimizer, rules=(), **options) as lens:
        case.train(steps)
    return {finding.rule: finding for finding in lens.findings()}, lens.history()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"features": ()},
        {"memory": 0, "features": ()},
        {"memory": 100},
        {"stage": ("backward", "accumulated", "used"), "features": ("updates", "flips", "evidence")},
        {"stage": "backward", "features": ("flips", "evidence")},
        {"stage": "used"},
    ],
    ids=str,
)
def test_what_can_be_had_needs_no_word(options):
    """No finding where every column that was asked for has values."""
    assert told(**options)[0] == {}


def test_updates_need_the_used_gradient():
    """Their columns stand on its rows: without it there are none, and an info says so."""
    found, history = told(stage="backward")
    assert set(found) == {"updates-unavailable"}
    finding = found["updates-unavailable"]
    assert finding.severity == Severity.INFO
    assert "stages read are backward" in finding.seen
    assert 'add "used"' in finding.remedy
    assert history["update_ratio"].isna().all()


def test_evidence_needs_each_backward():
    """As `lens.weights()` would have no verdict."""
    found, _ = told(stage=("accumulated", "used"), features=("evidence",))
    assert set(found) == {"evidence-unavailable"}
    assert "stages read are accumulated, used" in found["evidence-unavailable"].seen


def test_no_memory_is_no_updates_and_no_flips():
    """The one finding names both, and the bytes that would hold every weight."""
    found, history = told(memory=0)
    assert set(found) == {"memory"}
    assert found["memory"].severity == Severity.WARNING
    assert "columns of updates and flips are empty" in found["memory"].seen
    assert f"{3 * 4 * 1476:,} bytes" in found["memory"].remedy
    assert history[["update_ratio", "cosine"]].isna().all().all()


def test_one_process_has_nothing_to_average():
    """Its `reduced` rows are its own gradients, and an info says which they are."""
    found, history = told(stage=("accumulated", "reduced"), features=())
    assert set(found) == {"reduced-unavailable"}
    assert found["reduced-unavailable"].stage == "reduced"
    rows = {stage: group["square_sum"].tolist() for stage, group in history.groupby("stage")}
    assert rows["reduced"] == rows["accumulated"]


def test_it_is_said_at_the_start_and_everywhere():
    """Before anything was captured, with the number of the first step, to the writers and to the callback."""
    writer, heard, case = RecordingWriter(), [], healthy()
    with gradlens.watch(
        case.model, case.optimizer, memory=0, first_step=40, writers=[writer], on_finding=heard.append
    ) as lens:
        assert [(finding.rule, finding.step) for finding in lens.findings()] == [("memory", 40)]
        case.train(2)
    assert writer.findings == heard == lens.findings()
    assert len(heard) == 1
    assert "memory" in lens.report()


def test_a_captured_graph_is_left_alone(monkeypatch):
    """While CUDA captures a graph nothing of ours is launched, and a warning says that the replays are not read."""
    case = healthy()
    with gradlens.watch(case.model, case.optimizer, rules=()) as lens:
        case.train(2)
        monkeypatch.setattr(tables, "capturing_cuda_graph", lambda: True)
        monkeypatch.setattr(kernels, "summarize", None)  # not to be asked
        case.train(2, first=2)
        monkeypatch.undo()
        case.train(2, first=4)
        lens.flush()
        (finding,) = lens.findings()
        assert finding.rule == "cuda-graph"
        assert finding.step == 2
        assert "nor will replays" in finding.seen
        assert sorted(lens.history()["step"].unique()) == [0, 1, 4, 5]
