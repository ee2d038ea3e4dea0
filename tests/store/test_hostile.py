"""Whatever the files of a run are, every question has an answer or an error of gradlens, in bounded memory."""

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradlens.errors import ArgumentError, CorruptRunError, GradlensError, NothingCapturedError, RunDirectoryError
from gradlens.store import parts, rows
from gradlens.store.run import open_run
from gradlens.store.tables import STAGES, STATUSES, TABLES
from gradlens.store.tail import Tail
from tests.store import made

QUESTIONS = {
    "history": lambda run: run.history(),
    "some": lambda run: run.history(parameters="head.*", steps=slice(1, 3), columns=["step", "l2"], superseded=True),
    "table": lambda run: run.table(),
    "weights": lambda run: run.weights(top=3),
    "findings": lambda run: run.findings(),
    "scalars": lambda run: run.scalars(),
    "activations": lambda run: run.activations(),
    "histograms": lambda run: run.histograms(),
    "snapshots": lambda run: run.snapshots(),
    "steps": lambda run: run.steps(),
    "settings": lambda run: (run.settings, run.names(), run.ranks(), run.noise_scale()),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that was closed and one whose writer was killed: every kind of file that there is."""
    folder = tmp_path_factory.mktemp("runs")
    closed, killed = folder / "closed", folder / "killed"
    records = [*made.training(4), made.finding(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "GROUP", 10)
        made.write(closed, records, roll=30)
    with made.store(folder / "open") as store:
        for i, record in enumerate(records):
            store.write(record)
            if i % 3 == 0:
                store.flush()
        store.flush()
        shutil.copytree(folder / "open", killed)
    return closed, killed


def ask(run, questions=QUESTIONS):
    """Every question: its answer, or the error of gradlens. Any other error is the test's."""
    try:
        opened = open_run(run)
    except (CorruptRunError, RunDirectoryError) as error:
        return dict.fromkeys(questions, error)
    answers = {}
    for name, question in questions.items():
        try:
            answers[name] = question(opened)
        except (CorruptRunError, RunDirectoryError, NothingCapturedError) as error:
            answers[name] = error
        except ArgumentError as error:
            assert name == "some", "only the filter can be wrong, of a parameter that is no longer there"
            answers[name] = error
    return answers


def damaged(draw, data):
    """The bytes cut, flipped, overwritten, doubled, moved, or others."""
    data = bytearray(data)
    at = draw.randrange(len(data) + 1)
    how = draw.choice(["cut", "flip", "flip", "flip", "zeros", "noise", "double", "insert", "nothing", "invented"])
    if how == "cut":
        del data[at:]
    elif how == "flip":
        for _ in range(draw.choice([1, 1, 2, 8])):
            near_the_end = draw.randrange(max(len(data) - 3000, 0), len(data))  # where Parquet keeps its footer
            data[draw.choice([draw.randrange(len(data)), near_the_end])] ^= 1 << draw.randrange(8)
    elif how in ("zeros", "noise"):
        end = min(len(data), at + draw.choice([1, 4, 16, 200]))
        data[at:end] = bytes(end - at) if how == "zeros" else draw.randbytes(end - at)
    elif how == "double":
        data[at:at] = data[at : at + 200]
    elif how == "insert":
        data[at:at] = draw.randbytes(draw.choice([1, 7, 100]))
    else:
        data = bytearray() if how == "nothing" else bytearray(draw.randbytes(1000))
    return bytes(data)


@pytest.mark.filterwarnings("ignore::gradlens.errors.GradlensWarning")
@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds", [range(first, first + 50) for first in range(0, 300, 50)], ids=lambda seeds: f"{seeds[0]}-"
)
def test_a_damaged_file_gives_an_error_or_the_truth(tmp_path, runs, seeds):
    """Cut, flipped, overwritten: never another error, and no answer that is wrong without a word.

    What a torn end has lost is in `notes`; what a tail lacks that was cut between two frames nobody can know.
    """
    truth = {run: ask(run) for run in runs}
    for seed in seeds:
        draw = random.Random(seed)
        original, run = draw.choice(runs), tmp_path / str(seed)
        shutil.copytree(original, run)
        files = sorted(path for path in run.rglob("*.*") if path.is_file() and path.suffix != ".lock")
        path = draw.choice(files)
        before = path.read_bytes()
        path.write_bytes(damaged(draw, before))
        answers = ask(run)
        shorter = before.startswith(path.read_bytes())  # as if the last records had never been written
        if path.suffix == ".parquet" or not (shorter or open_notes(run)):
            for name in ("history", "some", "table", "weights", "scalars", "histograms"):
                if not isinstance(answers[name], GradlensError):
                    pd.testing.assert_frame_equal(answers[name], truth[original][name], check_exact=True)
        shutil.rmtree(run)


def open_notes(run):
    try:
        return open_run(run).notes
    except GradlensError:
        return []


# --- invented -------------------------------------------------------------------------------------------------------

EXTREME = {
    "float64": st.one_of(st.floats(), st.sampled_from([np.nan, np.inf, 1e308, -1e308])),
    **{
        name: st.one_of(st.integers(-2, 300), st.sampled_from([np.iinfo(name).min, np.iinfo(name).max]))
        .filter(lambda n, name=name: np.iinfo(name).min <= n <= np.iinfo(name).max)
        for name in ("int8", "int16", "int32", "int64")
    },
}  # fmt: skip
#: Values that pass, so that hostile ones of other columns are looked at too.
MEANT = {
    "entry": st.integers(0, 4), "stage": st.integers(0, len(STAGES) - 1), "status": st.integers(0, len(STATUSES) - 1),
    "bucket": st.integers(0, 255), "step": st.integers(0, 3), "backward": st.integers(0, 1), "snapshot": st.integers(0, 3),
    "index": st.integers(0, 9),
}  # fmt: skip


@st.composite
def invented(draw, table):
    """Rows with right columns and dtypes; of a few columns any value, of the others such as pass."""
    count = draw(st.integers(1, 6))
    wild = draw(st.sets(st.sampled_from(list(TABLES[table])), max_size=2))
    result = {}
    for name, dtype in TABLES[table].items():
        if name in wild or name in MEANT:
            values = EXTREME[dtype] if name in wild else MEANT[name] if table != "scalars" or name != "entry" else st.just(0)
            result[name] = np.array(draw(st.lists(values, min_size=count, max_size=count)), dtype)
        else:
            result[name] = np.arange(count).astype(dtype)
    return result


@pytest.mark.parametrize("table", list(TABLES))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_invented_rows_of_a_tail_never_crash(tmp_path_factory, table, data):
    """Rows with a right checksum and any numbers in them: an answer, or an error that names the file."""
    run = made.write(tmp_path_factory.mktemp("invented"), [*made.training(1), made.activations(0)])
    tail = Tail(run / table / "_0000-rank0-000007.tail", TABLES[table])
    tail.append([data.draw(invented(table))])
    tail.close()
    with np.errstate(all="ignore"):
        ask(run)


@pytest.mark.parametrize("table", list(TABLES))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_invented_rows_of_a_part_never_crash(tmp_path_factory, table, data):
    """The same as Parquet, with the right schema."""
    run = made.write(tmp_path_factory.mktemp("invented"), [*made.training(1), made.activations(0)])
    made_up = data.draw(invented(table))
    path = run / table / "0000-rank0-000000-000000.parquet"
    original = pq.read_table(path)
    count = len(made_up["step"])
    columns = {}
    for field in original.schema:
        if field.name in ("stage", "status"):
            words = [*STAGES, *STATUSES, "", "other"]
            columns[field.name] = pa.array([words[n % len(words)] for n in made_up[field.name].tolist()]).dictionary_encode()
        elif field.name in made_up:
            columns[field.name] = pa.array(made_up[field.name]).cast(field.type)
        else:
            columns[field.name] = pa.array(original[field.name].to_pylist()[:1] * count, field.type)
    pq.write_table(pa.table(columns), path)
    with np.errstate(all="ignore"):
        ask(run)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_invented_json_never_crashes(tmp_path_factory, data):
    """Any value in place of one of `run.json`, of a segment's file, or of a finding."""
    run = made.write(tmp_path_factory.mktemp("invented"), [made.snapshot(0), made.finding(0)])
    path = run / data.draw(st.sampled_from(["run.json", "segments/0000-rank0.json", "findings/0000-rank0.jsonl"]))
    content = json.loads(path.read_text())
    content.pop("checksum", None)
    name = data.draw(st.sampled_from(sorted(content)))
    content[name] = data.draw(JSON)
    if name == "parameters" and data.draw(st.booleans()) and path.parent.name == "segments":
        content[name] = [
            ["w", data.draw(st.lists(st.integers(-1, 1 << 62), max_size=4)), "float32", data.draw(st.text())]
        ] * 5
    path.write_text(json.dumps(content) + "\n")
    ask(run)


# --- memory and patience --------------------------------------------------------------------------------------------


def test_a_small_file_of_very_many_rows_does_not_fill_the_memory(tmp_path, monkeypatch):
    """400,000 equal rows take 100 KB on disk: they are refused once they pass the bound, long before all were read."""
    run = made.write(tmp_path, [made.snapshot(0)])
    path = run / "history" / "0000-rank0-000000-000000.parquet"
    table = pq.read_table(path)
    many = table.take(pa.array(np.zeros(10_000, np.int64)))
    with pq.ParquetWriter(path, many.schema, compression="zstd") as writer:
        for _ in range(40):
            writer.write_table(many)
    assert path.stat().st_size < 1 << 20
    monkeypatch.setattr(rows, "MAX_BYTES", 10 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(ArgumentError, match="ask for less with columns="):
            open_run(run).history()
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    assert pa.default_memory_pool().bytes_allocated() < 40 << 20


BOMB = """
    import sys
    import gradlens
    run = gradlens.open_run(sys.argv[1])
    try:
        run.history()
    except gradlens.errors.CorruptRunError as error:
        assert "the column status takes 536,8" in str(error), error
    else:
        raise SystemExit("it was read")
    (peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(peak)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux to know the largest memory of a process")
def test_a_word_of_a_gigabyte_is_not_unfolded(tmp_path):
    """A file of some hundred KB, whose dictionary has one word of 512 MB, is refused before it takes that memory."""
    made.write(tmp_path, made.training(3))
    (part,) = (tmp_path / "history").glob("*.parquet")
    table = pq.read_table(part)
    word = pa.DictionaryArray.from_arrays(pa.array([0] * len(table), pa.int32()), pa.array(["a" * (1 << 29)]))
    at = table.schema.get_field_index("status")
    table = table.set_column(at, table.schema.field(at), word)
    pq.write_table(table, part, compression="zstd", use_dictionary=["status"], write_statistics=["step", "entry"])
    assert part.stat().st_size < 1 << 20
    command = [sys.executable, "-c", textwrap.dedent(BOMB), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400_000  # KB; what is imported takes some 170,000 of them


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path):
    """Only regular files are opened: to open a pipe would wait for a writer that never comes."""
    run = made.write(tmp_path, [made.snapshot(0)])
    os.mkfifo(run / "history" / "_0000-rank0-000005.tail")
    os.mkfifo(run / "segments" / "0001-rank0.json")
    os.mkfifo(run / "findings" / "0001-rank0.jsonl")
    assert open_run(run).steps() == [0]
    assert open_run(run).findings() == []


def test_a_part_without_its_segment_is_an_error(tmp_path):
    """Its rows refer to nothing."""
    run = made.write(tmp_path, [made.snapshot(0)])
    (run / "segments" / "0000-rank0.json").unlink()
    with pytest.raises(CorruptRunError, match=r"belongs to a segment of which there is no 0000-rank0\.json"):
        open_run(run).history()


def test_a_run_that_is_removed_while_it_is_read_says_so(tmp_path):
    """A question after that is an error, not an empty answer."""
    run = open_run(made.write(tmp_path / "run", [made.snapshot(0)]))
    shutil.rmtree(tmp_path / "run")
    for question in (run.history, run.table, run.steps, run.findings, run.names):
        with pytest.raises(RunDirectoryError, match="the run was removed"):
            question()
