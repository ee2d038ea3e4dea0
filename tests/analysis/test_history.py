"""The succession of snapshots: bounded, laid over each other by step, read while it grows."""

import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradlens.analysis.history import History
from gradlens.blocks import block_of, concatenate
from gradlens.errors import ArgumentError, NothingCapturedError
from gradlens.records import Parameters, Stage

from .made import snapshot


def filled(*snapshots, **options):
    history = History(**options)
    for one in snapshots:
        history.append(one)
    return history


def test_it_keeps_the_newest():
    """Past its length the oldest snapshots leave."""
    history = filled(*(snapshot(step) for step in range(5)), maxlen=3)
    assert [s.step for s in history] == [2, 3, 4]
    assert len(history) == 3
    assert history.steps() == [2, 3, 4]


def test_rows_are_bounded_too():
    """A model with very many parameters keeps fewer snapshots, and never fewer than one."""
    wide = tuple(f"p{i}" for i in range(10))
    assert len(filled(*(snapshot(step, wide) for step in range(9)), max_rows=45)) == 4
    assert len(filled(*(snapshot(step, wide) for step in range(9)), max_rows=5)) == 1


def test_only_the_newest_keep_what_is_large():
    """Histograms and most sensitive weights stay with the newest snapshots alone."""
    history = filled(*(snapshot(step, top=True, histogram=True) for step in range(6)), keep_histograms=2)
    assert [s.histogram is not None for s in history] == [False] * 4 + [True] * 2
    assert [s.top is not None for s in history] == [False] * 4 + [True] * 2


def test_moments_that_leave_at_once_keep_nothing_large_either():
    """A block that is longer than the history stays while one of its moments does: the rest of it is as light."""
    block = concatenate([block_of(snapshot(step, top=True, histogram=True)) for step in range(10)])
    history = History(maxlen=4, keep_histograms=2)
    (columns,) = history.extend([(block, at) for at in range(10)])
    assert [detail is not None for detail in columns.details] == [True] * 10
    history.trim()
    assert [detail is not None for detail in columns.details] == [False] * 8 + [True] * 2
    assert [s.step for s in history] == [6, 7, 8, 9]


def test_nothing_is_kept_of_what_is_large_when_asked():
    """With keep_histograms=0 no snapshot has one."""
    history = filled(snapshot(0, histogram=True), snapshot(1, histogram=True), keep_histograms=0)
    assert [s.histogram for s in history] == [None, None]


def test_latest_may_ask_for_a_stage():
    """The newest snapshot of a stage is found behind newer ones of other stages."""
    history = filled(snapshot(0), snapshot(0, stage=Stage.USED), snapshot(1))
    assert history.latest().step == 1
    assert history.latest("used").step == 0
    assert history.latest(Stage.REDUCED) is None
    assert History().latest() is None


def test_latest_of_a_stage_leaves_with_its_snapshot():
    """What has left is not the newest of its stage any more, and one that became lighter still is."""
    others = [snapshot(step) for step in range(3)]
    history = filled(snapshot(0, stage="used", top=True), *others, maxlen=4, keep_histograms=2)
    assert history.latest("used") is next(iter(history))
    assert history.latest("used").top is None
    history.append(snapshot(3))
    assert history.latest("used") is None
    assert history.recent(9, "used") == []


def test_recent_counts_steps_and_not_snapshots():
    """The last steps come with all their backwards."""
    history = filled(*(snapshot(step, backward=k) for step in range(4) for k in range(3)), snapshot(3, stage="used"))
    assert [(s.step, s.backward) for s in history.recent(2, "backward")] == [(2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]
    assert len(history.recent(1)) == 4
    assert history.recent(99, "reduced") == []


def test_at_takes_the_last_stage_read():
    """One reading that covers every parameter is the answer itself."""
    used = snapshot(3, stage=Stage.USED)
    assert filled(snapshot(3), used).at() is used
    assert filled(snapshot(3), used).at(stage="backward").stage == "backward"
    assert filled(snapshot(3), used, snapshot(4)).at(3) is used


def test_at_lays_readings_over_each_other():
    """Each parameter gets the last row that was read of it, and rows stand in model order."""
    whole = ("g.weight", "g.bias", "d.weight", "d.bias")
    history = filled(
        snapshot(7, whole, abs_max=[1, 2, 3, 4], loss=0.5),
        snapshot(7, ("d.weight", "d.bias"), stage=Stage.USED, abs_max=[30, 40], status=["ok", "nonfinite"]),
    )
    merged = history.at()
    assert merged.names == whole
    assert merged.column("abs_max").tolist() == [1, 2, 30, 40]
    assert merged.status.tolist() == ["ok", "ok", "ok", "nonfinite"]
    assert merged.parameters.shapes == ((10, 10), (100,), (10, 10), (100,))
    assert merged.loss == 0.5
    assert [(part.stage, part.names) for part in history.parts()] == [("backward", whole[:2]), ("used", whole[2:])]


def test_at_puts_a_hole_where_the_model_has_it():
    """A later reading of some parameters does not change the order of the others."""
    history = filled(snapshot(0, ("a", "b", "c", "d")), snapshot(0, ("b", "d"), "used"), snapshot(0, ("c",), "used"))
    assert history.at().names == ("a", "b", "c", "d")


def test_at_keeps_what_each_row_is_a_piece_of():
    """Rows of shards still say which piece they are when readings are laid over each other."""
    shards = Parameters(("a.weight", "b.weight"), ((8, 4), (8, 4)), ("float32",) * 2, ("0:4,0:4", ""))
    other = Parameters(("c.weight",), ((2,),), ("float32",), ("1:2",))
    both = filled(snapshot(0, shards.names, parameters=shards), snapshot(0, other.names, parameters=other)).at()
    assert {name: both.parameters.piece(row) for row, name in enumerate(both.names)} == {
        "a.weight": "0:4,0:4",
        "b.weight": "",
        "c.weight": "1:2",
    }
    whole = filled(snapshot(0, ("a", "b")), snapshot(0, ("c",))).at()
    assert whole.parameters.pieces == ()


def test_at_keeps_top_and_histogram_only_if_all_parts_have_them():
    """A merged snapshot has no half-filled histogram."""
    with_all = filled(snapshot(0, ("a", "b"), top=True, histogram=True), snapshot(0, ("b",), top=True, histogram=True))
    assert with_all.at().histogram.shape[0] == 2
    assert with_all.at().top.index.shape[0] == 2
    some = filled(snapshot(0, ("a", "b")), snapshot(0, ("b",), top=True, histogram=True))
    assert some.at().histogram is None
    assert some.at().top is None


@given(st.lists(st.sets(st.sampled_from("abcdef"), min_size=1), min_size=1, max_size=5))
def test_at_is_what_overwriting_gives(coverage):
    """Merging readings equals writing them one after the other into a dictionary, in model order."""
    history, expected = History(), {}
    for k, names in enumerate(coverage):
        ordered = tuple(sorted(names))
        history.append(snapshot(0, ordered, backward=k, abs_max=[k + 10.0] * len(ordered)))
        expected.update(dict.fromkeys(ordered, k + 10.0))
    merged = history.at()
    assert dict(zip(merged.names, merged.column("abs_max"), strict=True)) == expected
    everything = [part.names for part in history.parts()]
    assert sorted(name for names in everything for name in names) == sorted(expected)


def test_series_has_one_value_a_step():
    """A parameter's column over time takes the last reading of each step, of any stage or of one."""
    history = filled(
        snapshot(0, abs_max=1), snapshot(0, stage="used", abs_max=2), snapshot(5, ("b",), abs_max=9), snapshot(6, abs_max=3)
    )
    steps, values = history.series("a.bias", "abs_max")
    assert steps.tolist() == [0, 6]
    assert values.tolist() == [2, 3]
    assert history.series("a.bias", "abs_max", "backward")[1].tolist() == [1, 3]
    assert history.series("a.weight", "rms")[1] == pytest.approx([0.01, 0.01])
    assert [len(x) for x in history.series("nobody", "rms")] == [0, 0]


def test_errors_say_what_there_is():
    """An empty history, an unknown step and an unknown stage each get an answer that helps."""
    with pytest.raises(NothingCapturedError, match=r"run loss.backward\(\) after watch"):
        History().at()
    history = filled(snapshot(10), snapshot(20))
    with pytest.raises(ArgumentError, match="from 10 to 20; the nearest is 10"):
        history.at(12)
    with pytest.raises(ArgumentError, match="did you mean 'used'"):
        history.at(stage="use")
    with pytest.raises(NothingCapturedError, match="of stage 'reduced'"):
        history.at(stage="reduced")
    with pytest.raises(ArgumentError, match="keeps nothing"):
        History(maxlen=0)


def test_readers_see_whole_answers_while_it_grows():
    """Iterating, asking and appending at once neither raises nor gives a torn step."""
    history, stop, wrong = History(maxlen=50), threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                seen = [s.step for s in history]
                if seen != sorted(seen) or len(seen) > 50:
                    wrong.append(seen)
                if seen:
                    history.at()
                    history.series("a.bias", "rms")
                    history.recent(5)
            except Exception as error:
                wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    readers = [threading.Thread(target=read) for _ in range(3)]
    try:
        for reader in readers:
            reader.start()
        for step in range(400):
            history.append(snapshot(step))
    finally:
        stop.set()
        for reader in readers:
            reader.join()
        sys.setswitchinterval(interval)
    assert not wrong
    assert np.array_equal([s.step for s in history], np.arange(350, 400))
