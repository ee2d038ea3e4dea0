"""What is read is what was written; what is not asked for is not read."""

import dataclasses
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch

import gradlens
from gradlens import fields, frames
from gradlens.errors import ArgumentError, NothingCapturedError, RunDirectoryError
from gradlens.pooling import pool
from gradlens.records import Top
from gradlens.store import parts, rows, segment
from gradlens.store.answers import STORED
from gradlens.store.filters import Filter
from gradlens.store.run import Run, open_run
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


# --- filters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """400 steps of five parameters: 4,000 rows in several parts, of small row groups."""
    run = tmp_path_factory.mktemp("runs") / "long"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "GROUP", 100)
        with made.store(run, roll=1000) as store:
            for record in made.training(400, detail=False):
                store.write(record)
    return run


class Spy:
    """Counts the files that are opened, and the row groups and columns that are read."""

    def __init__(self, patch):
        self.files, self.groups, self.columns = 0, 0, set()
        opened, lock = parts.Reader.__init__, threading.Lock()  # files are read side by side

        def init(reader, *args):
            with lock:
                self.files += 1
            opened(reader, *args)

        patch.setattr(parts.Reader, "__init__", init)
        original = pq.ParquetFile.read_row_group

        def read_row_group(file, i, columns=None, **options):
            with lock:
                self.groups += 1
                self.columns |= set(columns)
            return original(file, i, columns=columns, **options)

        patch.setattr(pq.ParquetFile, "read_row_group", read_row_group)


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


def where(frame, parameters=None, steps=None, stage=None, columns=None):
    """The same filter, applied afterwards."""
    kept = np.ones(len(frame), bool)
    kept &= True if parameters is None else frame["parameter"].isin(parameters)
    kept &= True if steps is None else frame["step"].isin(list(steps))
    kept &= True if stage is None else frame["stage"] == stage
    result = frame[kept].reset_index(drop=True)
    return result if columns is None else result[columns]


QUESTIONS = [
    ({"parameters": "head.bias"}, {"parameters": ["head.bias"]}),
    ({"parameters": ["body.*"]}, {"parameters": ["body.0.weight", "body.0.bias"]}),
    ({"parameters": ("scale", "body.0.bias")}, {"parameters": ["scale", "body.0.bias"]}),
    ({"steps": 7}, {"steps": [7]}),
    ({"steps": [3, 1, 399, 3]}, {"steps": [1, 3, 399]}),
    ({"steps": range(10, 90, 7)}, {"steps": range(10, 90, 7)}),
    ({"steps": range(20, 30)}, {"steps": range(20, 30)}),
    ({"steps": slice(390, None)}, {"steps": range(390, 400)}),
    ({"steps": slice(None, 5)}, {"steps": range(5)}),
    ({"stage": "used"}, {"stage": "used"}),
    ({"columns": ["step", "parameter", "l2", "update_ratio"]}, {"columns": ["step", "parameter", "l2", "update_ratio"]}),
    ({"columns": "quantile_50", "stage": "used", "steps": 3}, {"columns": ["quantile_50"], "stage": "used", "steps": [3]}),
    (
        {"parameters": "*.weight", "steps": slice(100, 300), "stage": "backward",
         "columns": ["mean", "shape", "loss_change"]},
        {"parameters": ["body.0.weight", "head.weight"], "steps": range(100, 300), "stage": "backward",
         "columns": ["mean", "shape", "loss_change"]},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "afterwards"), QUESTIONS, ids=lambda value: ",".join(value))
def test_a_filter_gives_what_filtering_afterwards_gives(long, asked, afterwards):
    """Pushed down or not, the rows are the same; so are their order and their bits."""
    same(open_run(long).history(**asked), where(open_run(long).history(), **afterwards))


def test_filters_read_fewer_row_groups(long, spy):
    """One parameter, or a few steps, are read from the row groups that hold them, and only the columns that are needed."""
    run = open_run(long)
    run.history()
    there = [pq.read_metadata(path).num_row_groups for path in (long / "history").glob("*.parquet")]
    assert spy.groups == sum(there) >= 40
    assert set(fields.BY_NAME) <= spy.columns
    for asked, limit in [({"parameters": "head.bias"}, 12), ({"steps": slice(350, None)}, 10), ({"steps": 17}, 10)]:
        spy.groups, spy.columns = 0, set()
        run.history(**asked, columns=["step", "l2"])
        assert 0 < spy.groups <= limit, (asked, spy.groups)
        assert "square_sum" in spy.columns
        assert not spy.columns & {"sum", "quantile_50", "update_dot"}


def test_the_last_step_is_found_in_the_newest_file(long, spy):
    """`table()` opens the part that has the newest rows, once for its step and once for its rows, and no older one."""
    assert set(open_run(long).table()["step"]) == {399}
    assert spy.files == 2
    assert spy.groups <= 20


def test_files_of_earlier_steps_are_not_opened(long, spy):
    """Newest first, until one begins before the steps that are asked for."""
    there = len(list((long / "history").glob("*.parquet")))
    for steps, most in [(slice(395, None), 1), (slice(200, None), there), (0, there)]:
        spy.files = 0
        assert len(open_run(long).history(steps=steps, columns=["step"]))
        assert spy.files <= most
    spy.files = 0
    open_run(long).history(steps=slice(250, None), columns=["step"])
    assert 1 < spy.files < there


def test_questions_that_cannot_be_meant_are_errors(long):
    """A wrong name, column, stage or step is an error that names the near ones."""
    run = open_run(long)
    for ask, message in [
        (lambda: run.history(parameters="hed.bias"), "no parameter 'hed.bias'.*did you mean 'head.bias'"),
        (lambda: run.history(columns=["l22"]), "no column 'l22'.*'l2'"),
        (lambda: run.history(stage="usd"), "'usd' is not one of"),
        (lambda: run.table(stage="usd"), "'usd' is not one of"),
        (lambda: run.table(400), "nothing on step 400: there are 400, from 0 to 399; the nearest is 399"),
        (lambda: run.weights(by="size"), "'size' is not one of"),
        (lambda: run.weights(top=0), "top is a whole number"),
        (lambda: run.history(steps="all"), "steps is a number"),
        (lambda: run.history(steps=slice(0, 9, 2)), "range"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            ask()


def test_an_answer_that_does_not_fit_is_refused(long, monkeypatch):
    """Rows beyond a bound are an error that names the filters, not a full memory."""
    monkeypatch.setattr(rows, "MAX_BYTES", 100_000)
    with pytest.raises(ArgumentError, match=r"parameters=.*history"):
        open_run(long).history()
    assert len(open_run(long).history(columns=["step", "l2"], parameters="scale")) == 800


def test_what_was_read_is_not_read_again_when_a_file_is_gone(long, monkeypatch):
    """A file that a writer has just merged is looked for anew; what the others gave is kept, and counted once."""
    there = {path.name for path in (long / "history").glob("*.parquet")}
    opened, original, lock = [], parts.Reader.__init__, threading.Lock()

    def init(reader, path, table):
        with lock:
            opened.append(path.name)
            first = opened.count(path.name) == 1
        if path.name == max(there) and first:  # the newest, which is asked first
            raise FileNotFoundError(path)
        original(reader, path, table)

    whole = open_run(long).history()
    rows_of = rows.find(long, "history", STORED, Filter())
    monkeypatch.setattr(rows, "MAX_BYTES", sum(values.nbytes for values in rows_of.columns.values()))
    monkeypatch.setattr(parts.Reader, "__init__", init)
    same(open_run(long).history(), whole)
    assert sorted(opened) == sorted([*there, max(there)])
    assert len(there) > 2


def test_a_run_without_records_says_so(tmp_path):
    """A run that has only begun has empty answers, and errors where there is nothing to answer with."""
    made.write(tmp_path, [])
    run = open_run(tmp_path)
    assert list(run.history().columns) == list(fields.FRAME)
    assert (len(run.history()), run.steps(), run.names(), run.findings(), run.snapshots()) == (0, [], [], [], [])
    assert run.scalars().columns.tolist() == ["step"]
    assert len(run.histograms()) == 0
    for ask in (run.table, run.weights):
        with pytest.raises(NothingCapturedError, match="nothing in"):
            ask()
    with pytest.raises(NothingCapturedError, match="no records"):
        run.table(3)


def test_what_is_no_run_is_an_error(tmp_path):
    """A missing directory, another one, a file."""
    with pytest.raises(RunDirectoryError, match="is not there"):
        open_run(tmp_path / "missing")
    with pytest.raises(RunDirectoryError, match=r"has no run\.json"):
        open_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="is no directory"):
        open_run(tmp_path / "file")


def test_a_segment_is_checked_once_while_its_file_is_the_same(tmp_path, monkeypatch):
    """Of 10,000 parameters that takes a twentieth of a second; a file that was replaced is read anew."""
    loads = []
    real = segment.load
    monkeypatch.setattr(segment, "load", lambda path: loads.append(path.name) or real(path))
    with made.store(tmp_path) as store:
        store.write(made.snapshot(0))
        store.flush()
        for _ in range(3):
            assert open_run(tmp_path).names() == list(made.NAMES)
        assert loads.count("0000-rank0.json") == 1
        store.write(made.snapshot(1, of=made.parameters(["other"], [(2,)])))
        store.flush()
        assert open_run(tmp_path).names() == [*made.NAMES, "other"]


# --- other answers --------------------------------------------------------------------------------------------------


def test_scalars_have_a_row_a_step(tmp_path):
    """What was observed, one column a name; empty where it was not. A name that is taken stands apart."""
    losses = [made.snapshot(step, stage, scalars={"loss": step / 2}) for step in range(3) for stage in ("backward", "used")]
    late = made.snapshot(3, scalars={"loss": 1.5, "accuracy": 0.5, "step": 9.0})
    made.write(tmp_path, [*losses, late])
    scalars = open_run(tmp_path).scalars()
    assert scalars.columns.tolist() == ["step", "loss", "accuracy", "observed.step"]
    assert scalars["observed.step"].tolist()[-1] == 9.0
    assert scalars["loss"].tolist() == [0, 0.5, 1, 1.5]
    assert scalars["accuracy"].isna().tolist() == [True, True, True, False]
    assert open_run(tmp_path).scalars(steps=slice(2, None))["step"].tolist() == [2, 3]


def test_histograms_have_the_counts(tmp_path):
    """One row a bucket that is not empty, with its number."""
    record = made.snapshot(0)
    made.write(tmp_path, [record])
    frame = open_run(tmp_path).histograms()
    row, bucket = np.nonzero(record.histogram)
    assert frame["bucket"].tolist() == bucket.tolist()
    assert frame["count"].tolist() == record.histogram[row, bucket].tolist()
    assert frame["parameter"].tolist() == [made.NAMES[i] for i in row]
    one = open_run(tmp_path).histograms(parameters="scale")
    assert one["count"].sum() == record.histogram[4].sum()


def test_complex_weights_have_two_each(tmp_path):
    """An entry of a complex parameter is two weights, real and imaginary."""
    of = made.parameters(["z"], [(2, 3)], ["complex64"])
    record = made.snapshot(0, of=of)
    made.write(tmp_path, [record])
    weights = open_run(tmp_path).weights()
    assert len(weights) == 12
    assert all(len(index) == 3 and index[2] in (0, 1) for index in weights["index"])
    expected = frames.weights("z", (2, 3, 2), *(getattr(record.top, name)[0, :12] for name in ("index", "value", "partial")))
    same(weights, expected)


def _kept(step, pairs, stage="used", backward=0, rank=0):
    """A snapshot of one parameter [4, 4] that kept these weights: flat index and partial."""
    index, partial = np.full((1, fields.TOP), -1, np.int64), np.full((1, fields.TOP), np.nan)
    index[0, : len(pairs)], partial[0, : len(pairs)] = zip(*pairs, strict=True)
    record = made.snapshot(step, stage, backward, of=made.parameters(["w"], [(4, 4)]), rank=rank)
    return dataclasses.replace(record, top=Top(index, partial, np.zeros_like(partial)))


def test_signs_are_counted_over_the_steps_that_kept_a_weight(tmp_path):
    """Above 0 and below, each weight apart; 0 and NaN are neither, a step counts once, by its last backward, other stages do
    not."""
    records = [
        _kept(0, [(3, 1.0), (5, -1.0)], "backward"),
        _kept(0, [(3, -2.0), (5, -1.0)], "backward", backward=1),
        _kept(0, [(3, 9.0), (7, 9.0)]),
        _kept(1, [(3, -0.5), (5, 0.0), (6, np.nan)], "backward", backward=2),
        _kept(2, [(3, np.inf), (5, -1e-300)], "backward", backward=3),
    ]
    run = open_run(made.write(tmp_path, records))
    assert run.signs("w", stage="backward") == {("w", 3): (1, 2), ("w", 5): (0, 2), ("w", 6): (0, 0)}
    assert run.signs(stage="used") == {("w", 3): (1, 0), ("w", 7): (1, 0)}
    assert run.signs("w", stage="reduced") == {}


def test_signs_of_ranks_count_a_weight_once(tmp_path):
    """The copies of a weight are one: a step of two ranks is one step."""
    made.write(tmp_path, [_kept(step, [(3, -1.0)]) for step in range(3)])
    made.write(tmp_path, [_kept(step, [(3, -1.0), (8, 1.0)], rank=1) for step in range(3)], rank=1)
    assert open_run(tmp_path).signs("w", stage="used") == {("w", 3): (0, 3), ("w", 8): (3, 0)}


def test_many_parameters_are_answered_together(tmp_path):
    """The most sensitive of 3,000 parameters' weights, by every order, as live."""
    names = [f"layers.{i}.weight" for i in range(3000)]
    record = made.snapshot(0, of=made.parameters(names, [(4, 5)] * len(names)))
    made.write(tmp_path, [record])
    weights = open_run(tmp_path).weights(top=5, by="saliency")
    assert weights["saliency"].tolist() == sorted(np.abs(record.top.value * record.top.partial).ravel().tolist())[:-6:-1]


def test_the_offline_half_answers_without_torch(tmp_path):
    """Every question, in a process that never imports torch."""
    made.write(tmp_path, [*made.training(3), made.finding(2)])
    code = (
        "import sys, gradlens\n"
        f"run = gradlens.open_run({str(tmp_path)!r})\n"
        "answers = [run.history(), run.table(), run.weights(), run.findings(), run.scalars(), run.histograms(),"
        " run.snapshots(), run.steps(), run.names()]\n"
        "assert all(len(answer) for answer in answers)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- resuming -------------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on(tmp_path):
    """After going back to a checkpoint the newest rows win; the older ones are kept and marked."""
    first, second = made.training(10), made.training(10, first=6, seed=1)
    made.write(tmp_path, [*first, made.finding(3), made.finding(8, "old")])
    made.write(tmp_path, [*second, made.finding(9, "new")])
    run = open_run(tmp_path)
    kept = [record for record in first if record.step < 6]
    same(run.history(), frames.frame(kept + second))
    same(run.table(), frames.table(second[-1]))
    same(run.table(5), frames.table(kept[-1]))
    assert run.steps() == list(range(16))
    assert [finding.rule for finding in run.findings()] == ["made", "new"]
    assert run.scalars()["loss"].tolist() == [r.loss for r in kept + second if r.stage == "used"]
    assert run.weights().attrs == {"step": 15, "stage": "used"}

    everything = run.history(superseded=True)
    same(everything[list(fields.FRAME)].reset_index(drop=True), frames.frame(first + second))
    assert everything["segment"].tolist() == [0] * 100 + [1] * 100
    assert everything["superseded"].tolist() == [False] * 60 + [True] * 40 + [False] * 100


def test_a_resumed_run_that_has_written_nothing_replaces_nothing(tmp_path):
    """Only once the new lens has recorded a step do older records of it give way."""
    made.write(tmp_path, made.training(4))
    with made.store(tmp_path) as store:
        assert open_run(tmp_path).steps() == [0, 1, 2, 3]
        store.write(made.snapshot(2, seed=1))
        store.flush()
        assert open_run(tmp_path).steps() == [0, 1, 2]


def test_going_back_twice(tmp_path):
    """Each time the newest wins, from its first step on: what the second said of later steps is replaced too."""
    runs = [made.training(9), made.training(5, first=3, seed=1), made.training(2, first=5, seed=2)]
    for records in runs:
        made.write(tmp_path, records)
    expected = [r for r in runs[0] if r.step < 3] + [r for r in runs[1] if r.step < 5] + runs[2]
    same(open_run(tmp_path).history(), frames.frame(expected))
    assert open_run(tmp_path).steps() == list(range(7))


def test_watch_resumes_with_first_step(tmp_path):
    """Two lenses on one directory, one after the other: the run has the steps of both, as training saw them."""
    case = gradlens.testing.healthy()
    with gradlens.watch(case.model, case.optimizer, run=tmp_path) as lens:
        case.train(4)
        before = lens.history()
    with gradlens.watch(case.model, case.optimizer, run=tmp_path, first_step=2) as lens:
        case.train(3, first=2)
        after = lens.history()
    same(open_run(tmp_path).history(), pd.concat([before[before["step"] < 2], after], ignore_index=True))


# --- ranks ----------------------------------------------------------------------------------------------------------

PIECES = [("0:4,0:6", "0:3", "", "partial"), ("4:7,0:6", "3:5", "", "partial"), ("7:7,0:6", "5:5", "", "partial")]
HELD = ["w", "b", "copy", "summand"]


def ranks(steps, seed=0, world=3):
    """What each rank says of shards of two parameters, of a copy, and of a summand."""
    shapes = [(7, 6), (5,), (3,), (2,)]
    return [
        [made.snapshot(step, stage, of=made.parameters(HELD, shapes, pieces=PIECES[rank]), rank=rank, seed=seed)
         for step in steps for stage in ("reduced", "used")]
        for rank in range(world)
    ]  # fmt: skip


def write_ranks(run, records, **settings):
    for rank, own in enumerate(records):
        made.write(run, own, rank=rank, settings={"ranks": len(records), **settings})


def test_ranks_merge_as_pooling_does(tmp_path):
    """Pieces merge and copies count once: counts, extremes and statuses as `gradlens.pooling` says, sums up to rounding."""
    records = ranks(range(5))
    write_ranks(tmp_path, records)
    run = open_run(tmp_path)
    pooled = [pool(list(group)) for group in zip(*records, strict=True)]
    expected, read = frames.frame(pooled), run.history()
    whole = ~expected["parameter"].isin(["w", "b"])
    for name in fields.FRAME:
        if name in fields.QUANTILES:
            np.testing.assert_array_equal(read[name][whole], expected[name][whole])
            assert read[name][~whole].isna().all()
        elif read[name].dtype == "float64":
            np.testing.assert_allclose(read[name], expected[name], rtol=1e-9, err_msg=name)
        else:
            assert read[name].tolist() == expected[name].tolist(), name
    same(run.table(), run.history(steps=4, stage="used")[list(fields.TABLE)])
    assert run.ranks() == [0, 1, 2]


def test_records_of_ranks_are_pooled(tmp_path):
    """`snapshots()` gives what live writers would have got, quantiles, histograms and weights of the whole included."""
    records = ranks(range(2))
    write_ranks(tmp_path, records)
    run = open_run(tmp_path)
    for read, group in zip(run.snapshots(), zip(*records, strict=True), strict=True):
        expected = pool(list(group))
        assert (read.names, read.ranks, read.scalars) == (expected.names, 3, expected.scalars)
        for name in [*fields.BY_NAME, *fields.QUANTILES]:
            np.testing.assert_array_equal(read.columns[name], expected.columns[name], err_msg=name)
        np.testing.assert_array_equal(read.histogram, expected.histogram)
        np.testing.assert_array_equal(read.top.index, expected.top.index)
        np.testing.assert_array_equal(read.top.partial, expected.top.partial)
    for rank in range(3):
        assert [s.step for s in run.snapshots(rank=rank)] == [s.step for s in records[rank]]
        assert run.snapshots(rank=rank)[0].parameters == records[rank][0].parameters


def test_one_rank_has_its_own_rows(tmp_path):
    """`rank=` gives what that rank saw, unmerged."""
    records = ranks(range(3))
    write_ranks(tmp_path, records)
    for rank in range(3):
        same(open_run(tmp_path).history(rank=rank), frames.frame(records[rank]))


def test_the_scalars_are_the_lowest_ranks(tmp_path):
    """Each rank observes a loss of its own; rank 0's stands for the run."""
    for rank in (1, 0):
        made.write(tmp_path, [made.snapshot(0, rank=rank, scalars={"loss": float(rank)})], rank=rank)
    assert open_run(tmp_path).scalars()["loss"].tolist() == [0.0]


def test_fewer_ranks_replace_those_that_are_gone(tmp_path):
    """Resumed on fewer ranks, the rows of ranks that there no longer are give way too: they would be counted twice."""
    write_ranks(tmp_path, ranks(range(6)))
    one = [made.snapshot(step, "used", of=made.parameters(HELD, [(7, 6), (5,), (3,), (2,)]), seed=7) for step in range(4, 8)]
    write_ranks(tmp_path, [one])
    run = open_run(tmp_path)
    same(run.history(steps=slice(4, None)), frames.frame(one))
    assert set(run.history(rank=2)["step"]) == {0, 1, 2, 3}


# --- others' tools --------------------------------------------------------------------------------------------------


def test_pandas_reads_the_folder(long):
    """`pandas.read_parquet` takes a table's folder as it is, with names as words and rows that are those of the run."""
    frame = pd.read_parquet(long / "history").sort_values(["snapshot", "entry"], ignore_index=True)
    mine = open_run(long).history(columns=["step", "parameter", "stage", "status", "sum", "numel"])
    for name in mine.columns:
        assert frame[name].tolist() == mine[name].tolist() or frame[name].equals(mine[name])
    assert str(frame["time"].dtype).startswith("datetime64")


def test_pyarrow_and_others_read_by_glob(long):
    """A glob of `*.parquet` is one data set to pyarrow, and to polars and DuckDB where they are installed."""
    files = sorted(map(str, (long / "history").glob("*.parquet")))
    expected = open_run(long).history(parameters="head.bias", columns=["step", "sum"])["sum"]
    table = pyarrow.dataset.dataset(files).to_table(filter=pyarrow.dataset.field("parameter") == "head.bias")
    np.testing.assert_array_equal(np.sort(table["sum"].to_numpy()), np.sort(expected))


def test_polars_reads_by_glob(long):
    polars = pytest.importorskip("polars")
    frame = polars.scan_parquet(str(long / "history/*.parquet")).filter(polars.col("parameter") == "head.bias").collect()
    assert frame["step"].sort().to_list() == open_run(long).history(parameters="head.bias")["step"].tolist()


def test_duckdb_reads_by_glob(long):
    duckdb = pytest.importorskip("duckdb")
    query = f"select step, status from '{long}/history/*.parquet' where parameter = 'head.bias' order by snapshot"
    assert [step for step, _ in duckdb.sql(query).fetchall()] == open_run(long).history(parameters="head.bias")[
        "step"
    ].tolist()


def test_files_tell_the_extent_of_a_run(tmp_path):
    """How many rows there are, and the first and last step, of parts and of tails that are still written."""
    with made.store(tmp_path / "run", roll=7) as to:
        assert gradlens.open_run(tmp_path / "run").extent() is None
        for each in made.training(5, first=3):
            to.write(each)
        to.flush()
        assert gradlens.open_run(tmp_path / "run").extent() == (5 * 2 * len(made.NAMES), 3, 7)
    assert gradlens.open_run(tmp_path / "run").extent() == (5 * 2 * len(made.NAMES), 3, 7)


def test_a_name_that_looks_like_a_pattern_is_found_by_itself(tmp_path):
    """Brackets in a name do not keep it from being asked for, and thousands of names are asked for at once."""
    names = ("a[0].weight", "a0.weight", *(f"p{i}" for i in range(3000)))
    of = made.parameters(names, [(2,)] * len(names))
    run = gradlens.open_run(made.write(tmp_path / "run", [made.snapshot(0, of=of, detail=False)]))
    assert set(run.history(parameters=["a[0].weight"])["parameter"]) == {"a[0].weight", "a0.weight"}
    assert len(run.history(parameters=list(names[2:]))) == 3000


def test_a_reader_may_be_given_less_memory(tmp_path):
    """An answer beyond it is an error that names what to ask less of."""
    made.write(tmp_path / "run", made.training(20))
    with pytest.raises(ArgumentError, match=r"more than 0 MB; ask for less with columns=, parameters= or steps="):
        Run(tmp_path / "run", max_bytes=1000).history()


def test_a_run_is_read_while_the_interpreter_ends(tmp_path):
    """An atexit call reads it too, with files of two ranks, though no thread can be begun then."""
    for rank in (0, 1):
        made.write(tmp_path / "run", made.training(3, rank=rank), rank=rank)
    code = (
        "import atexit; from gradlens import open_run\n"
        f"atexit.register(lambda: print(len(open_run({str(tmp_path / 'run')!r}).snapshots())))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "6\n", done.stderr
