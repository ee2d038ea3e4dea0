"""Rows in frames and files: those that the lens saw, while it trains and from what was recorded."""

import io
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import gradlens
from gradlens import fields
from gradlens.errors import ArgumentError, ClosedError
from gradlens.store.run import open_run
from gradlens.writers import CSV, Frame, JSONLines
from gradlens.writers.base import Writer
from tests.store import made


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training with all three beside its run; what the lens says of it."""
    place = tmp_path_factory.mktemp("export")
    frame, csv, lines = Frame(), CSV(place / "all.csv"), JSONLines(place / "all.jsonl")
    case = gradlens.testing.absent_branch()
    rules = [*gradlens.rules.DEFAULT, gradlens.rules.Absent(steps=3)]
    with gradlens.watch(case.model, case.optimizer, run=place / "run", writers=[frame, csv, lines], rules=rules) as lens:
        for step in range(12):
            lens.observe(loss=sum(case.train(1, first=step)))
            lens.flush()
        return place, frame, lens.history(), lens.findings()


def as_read(frame):
    """What pandas reads from its own file: shapes are text there."""
    return pd.read_csv(io.StringIO(frame.to_csv(index=False)))


def of_kind(path, kind):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "kind"} for line in lines if line["kind"] == kind]


# --- live -----------------------------------------------------------------------------------------------------------


def test_a_frame_has_what_the_lens_saw(trained):
    """Rows, dtypes and bits of `lens.history()`; findings and scalars beside them."""
    _, frame, history, findings = trained
    pd.testing.assert_frame_equal(frame.frame, history, check_exact=True)
    assert findings
    pd.testing.assert_frame_equal(frame.findings, gradlens.to_frame(findings))
    assert frame.scalars["step"].tolist() == list(range(12))  # the first step has the loss of its backward
    assert frame.scalars["loss"].notna().all()


def test_a_csv_file_reads_as_the_history(trained):
    """Every number back to its bits; empty cells where there is nothing."""
    place, _, history, _ = trained
    pd.testing.assert_frame_equal(pd.read_csv(place / "all.csv"), as_read(history), check_exact=True)


def test_json_lines_have_rows_scalars_and_findings(trained):
    """Each line says what it is; rows are those of the history, scalars one line a step, findings those of the lens."""
    place, frame, history, findings = trained
    rows = pd.DataFrame(of_kind(place / "all.jsonl", "row"))
    assert rows.columns.tolist() == list(fields.FRAME)
    for name in fields.FRAME:
        given = history[name].map(list).tolist() if name == "shape" else history[name].tolist()
        assert [None if value != value else value for value in rows[name].tolist()] == [
            None if value != value else value for value in given
        ], name
    scalars = of_kind(place / "all.jsonl", "scalars")
    assert [(line["step"], line["loss"]) for line in scalars] == list(
        zip(*map(list, frame.scalars.to_numpy().T), strict=True)
    )
    told = of_kind(place / "all.jsonl", "finding")
    assert [(line["rule"], line["step"], line["seen"]) for line in told] == [(f.rule, f.step, f.seen) for f in findings]


# --- offline --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [400_000, 30])
def test_a_replayed_run_gives_the_same(trained, tmp_path, monkeypatch, rows):
    """From the records: frame, CSV and JSON lines as they were written live, in one piece or in many."""
    monkeypatch.setattr("gradlens.store.run.REPLAYED", rows)
    place, frame, _, findings = trained
    again, csv, lines = Frame(), CSV(tmp_path / "all.csv"), JSONLines(tmp_path / "all.jsonl")
    run = open_run(place / "run")
    for writer in (again, csv, lines):
        run.replay(writer)
    pd.testing.assert_frame_equal(again.frame, frame.frame, check_exact=True)
    pd.testing.assert_frame_equal(again.scalars, frame.scalars, check_exact=True)
    pd.testing.assert_frame_equal(again.findings, gradlens.to_frame(sorted(findings, key=lambda finding: finding.step)))
    assert (tmp_path / "all.csv").read_bytes() == (place / "all.csv").read_bytes()
    for kind in ("row", "scalars"):
        assert of_kind(tmp_path / "all.jsonl", kind) == of_kind(place / "all.jsonl", kind)


def test_a_part_of_a_run_is_replayed(trained):
    """Filters as of `history()`; findings of those steps."""
    place, _, history, _ = trained
    part = Frame()
    open_run(place / "run").replay(part, steps=range(3, 6), parameters="*.weight", stage="used")
    kept = history["step"].isin(range(3, 6)) & history["parameter"].str.endswith("weight") & (history["stage"] == "used")
    pd.testing.assert_frame_equal(part.frame, history[kept].reset_index(drop=True), check_exact=True)
    assert set(part.findings["step"]) <= {3, 4, 5}


def test_replaying_needs_no_torch(trained, tmp_path):
    """Exports of a run start at once."""
    place, *_ = trained
    code = (
        "import sys, gradlens\n"
        f"run = gradlens.open_run({str(place / 'run')!r})\n"
        f"for writer in (gradlens.writers.CSV({str(tmp_path / 'a.csv')!r}), gradlens.writers.Frame(), "
        f"gradlens.writers.JSONLines({str(tmp_path / 'a.jsonl')!r})):\n"
        "    run.replay(writer)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- one by one -----------------------------------------------------------------------------------------------------


def test_they_are_writers(tmp_path):
    """All three have write, flush and close, and what the package lists is there."""
    for writer in (Frame(), CSV(io.StringIO()), JSONLines(io.StringIO())):
        assert isinstance(writer, Writer)
    for name in gradlens.writers.__all__:
        assert getattr(gradlens.writers, name) is not None
    assert set(gradlens.writers.__all__) == set(gradlens.writers._LAZY)
    with pytest.raises(AttributeError, match="JSONLines"):
        gradlens.writers.JsonLines  # noqa: B018


def test_a_frame_may_keep_the_last_snapshots_only():
    """So many of them, and only the columns asked for."""
    frame = Frame(["step", "l2"], last=4)
    for record in made.training(10):
        frame.write(record)
    assert frame.frame.columns.tolist() == ["step", "l2"]
    assert frame.frame["step"].unique().tolist() == [8, 9]


@pytest.mark.parametrize("kind", [CSV, JSONLines])
def test_rows_wait_for_a_flush_and_no_longer_than_memory_allows(tmp_path, monkeypatch, kind):
    """flush() puts them in the file; so do many rows, and a second."""
    path = tmp_path / "file"
    writer = kind(path, columns=["step", "parameter"])

    def lines():
        return len(path.read_text().splitlines())

    writer.write(made.snapshot(0, scalars={}))
    assert lines() == 0
    writer.flush()
    headed = kind is CSV
    assert lines() == 5 + headed
    monkeypatch.setattr("gradlens.writers.export.ROWS", 10)
    writer.write(made.snapshot(1, scalars={}))
    assert lines() == 5 + headed
    writer.write(made.snapshot(2, scalars={}))
    assert lines() == 15 + headed
    writer._due = 0.0
    writer.write(made.snapshot(3, scalars={}))
    assert lines() == 20 + headed
    writer.close()
    writer.close()
    with pytest.raises(ClosedError, match=kind.__name__):
        writer.write(made.snapshot(4))


@pytest.mark.parametrize("kind", [CSV, JSONLines])
def test_a_file_that_is_there_is_not_written_over(tmp_path, kind):
    """It is an error, unless append is asked for: then the file goes on, with one line of names."""
    path = tmp_path / "file"
    records = made.training(4)
    once = kind(io.StringIO())
    for half in (records[:4], records[4:]):
        with pytest.raises(ArgumentError, match="append=True") if path.exists() else _nothing():
            kind(path)
        writer = kind(path, append=True)
        for record in half:
            writer.write(record)
            once.write(record)
        writer.close()
    once.flush()
    assert path.read_text() == once._file.getvalue()


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_a_csv_file_with_other_columns_is_refused(tmp_path):
    """Rows of other columns would be read under wrong names."""
    (tmp_path / "file").write_text("step,loss\n0,1.0\n")
    with pytest.raises(ArgumentError, match="other columns than step, parameter"):
        CSV(tmp_path / "file", columns=["step", "parameter"], append=True)


def test_wrong_columns_are_named():
    """With their neighbours."""
    for make in (Frame, lambda columns: CSV(io.StringIO(), columns=columns)):
        with pytest.raises(ArgumentError, match=r"no column 'l22'.*'l2'"):
            make(["l22"])
    with pytest.raises(ArgumentError, match="last=0"):
        Frame(last=0)


def test_what_is_not_finite_is_null_in_json():
    """Not every reader knows NaN; a hostile record still gives lines that any of them reads."""
    file = io.StringIO()
    writer = JSONLines(file)
    writer.write(made.snapshot(0, scalars={"loss": float("nan"), "accuracy": 1.0}))
    writer.write(made.finding(0, value=float("inf")))
    writer.close()
    assert not file.closed
    lines = [json.loads(line, parse_constant=pytest.fail) for line in file.getvalue().splitlines()]
    assert lines[0] == {"kind": "scalars", "loss": None, "accuracy": 1.0, "step": 0}
    assert lines[-1]["value"] is None
    assert any(value is None for line in lines[1:-1] for value in line.values())


def test_a_full_disk_switches_the_export_off_alone(tmp_path):
    """A file that cannot be written is named once; training and the other writers go on."""
    case, other = gradlens.testing.healthy(), Frame()
    with (
        open("/dev/full", "w") as full,
        pytest.warns(gradlens.GradlensWarning, match="CSV failed and is switched off.*No space"),
    ):
        with gradlens.watch(case.model, case.optimizer, writers=[CSV(full), other]) as lens:
            for step in range(4):
                case.train(1, first=step)
                lens.flush()
        full.flush = lambda: None
    assert other.frame["step"].unique().tolist() == [0, 1, 2, 3]
    assert np.isfinite(other.frame["l2"]).all()
