"""A damaged file is an error that names it, never the end of the process; and no reader counts a row twice."""

import os
import random
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradlens import open_run
from gradlens.store import parts, tables
from gradlens.store.finish import finish
from gradlens.store.store import Store
from gradlens.writers import CSV, Frame, JSONLines
from tests.analysis.made import snapshot


def written(run, steps, roll=40, **columns):
    """A run of small parts, closed."""
    store = Store(run, roll=roll)
    for step in steps:
        store.write(snapshot(step, loss=1.0, **columns))
        store.flush()
    store.close()
    return run


FLIPS = """
import os, sys, warnings
from pathlib import Path
from gradlens.errors import GradlensError
from gradlens.store.parts import Reader
from gradlens.store.tables import TABLES
path, good = Path(sys.argv[1]), Path(sys.argv[1]).read_bytes()
bits = [int(word) for word in sys.stdin.read().split()]
said = 0
for bit in bits:
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bad)
    try:
        reader = Reader(path, "history")
        reader.bounds("step")
        for rows in reader.read(list(TABLES["history"]), lambda *_: True):
            pass
        reader.close()
    except GradlensError as error:
        assert str(path) in str(error), error
        said += 1
print(said)
"""


@pytest.mark.parametrize("where", ["footer", "pages"])
def test_a_flipped_bit_is_an_error_and_never_the_end(where, tmp_path):
    """Every byte of a footer, one of its bits; and bits anywhere else: all in one process, which lives."""
    run = written(tmp_path / "run", range(20))
    path = sorted((run / "history").glob("*.parquet"))[0]
    data = path.read_bytes()
    with open(path, "rb") as file:
        start, _ = parts._footer(file)
    chance = random.Random(0)
    inside = range(start, len(data)) if where == "footer" else range(start)
    bits = [8 * byte + chance.randrange(8) for byte in chance.sample(inside, min(len(inside), 2500))]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FLIPS), str(path)],
        input=" ".join(map(str, bits)), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-500:]
    if where == "footer":
        assert int(result.stdout) == len(bits)


def test_a_part_of_another_program_reads(tmp_path):
    """Without our mark it is Parquet like any other; with a mark that is elsewhere it was cut or damaged."""
    run = written(tmp_path / "run", range(20))
    path = sorted((run / "history").glob("*.parquet"))[0]
    before = open_run(run).history()
    pq.write_table(pq.read_table(path), path)
    assert open_run(run).history().equals(before)


def test_a_glob_never_counts_a_row_twice(tmp_path, monkeypatch):
    """Whoever reads `history/*.parquet`, while parts are merged and after a kill at any moment of it."""
    run, seen = tmp_path / "run", []

    def glob():
        steps = []
        for path in sorted((run / "history").glob("*.parquet")):
            try:
                steps += pq.read_table(path, columns=["step", "entry"]).to_pylist()
            except (FileNotFoundError, pa.ArrowInvalid):
                continue
        keys = [(row["step"], row["entry"]) for row in steps]
        seen.append(len(keys) - len(set(keys)))

    unlink, replace = os.unlink, os.replace
    for name, real in (("unlink", unlink), ("replace", replace)):

        def looked_at(*args, real=real, **options):
            glob()
            result = real(*args, **options)
            glob()
            return result

        monkeypatch.setattr(os, name, looked_at)
    written(run, range(600))
    assert len(seen) > 20
    assert max(seen) == 0
    assert len(list((run / "history").glob("*.parquet"))) < 600 // 20
    assert open_run(run).steps() == list(range(600))


@pytest.mark.parametrize("unlinked", [0, 3, 8])
@pytest.mark.parametrize("how", ["finish", "store"])
def test_a_merge_that_was_killed_is_finished(unlinked, how, tmp_path):
    """Before, while and after the eight are removed: `open_run` has every row once at once, plain readers after
    `gradlens finish`, or when the next lens opens the directory."""
    run = written(tmp_path / "run", range(160), roll=40)
    own = [part for part in tables.parts(run / "history") if part.first == part.last][:2]
    before = open_run(run).history()
    output = tables.part(run / "history", own[0].key, own[0].first, own[1].last)
    names = [name for name, *_ in open_run(run)._segments()[0].parameters]
    assert parts.merge([p.path for p in own], tables.hidden(output), "history", own[0].key, names, lambda: True)
    for part in own[: min(unlinked, 2)]:
        part.path.unlink()
    assert open_run(run).history().equals(before)
    if how == "finish":
        finish(run)
    else:
        Store(run, {"first_step": 160}).close()
    assert output.exists()
    assert not any(part.path.exists() for part in own)
    assert not tables.hidden(output).exists()
    assert open_run(run).history().equals(before)
    steps = [pq.read_table(path, columns=["step", "entry"]).num_rows for path in (run / "history").glob("*.parquet")]
    assert sum(steps) == len(before)


# --- NaN is no zero -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [90, 100])
def test_what_is_not_finite_is_no_zero(bad, tmp_path):
    """Shares are of all entries, and where nothing is finite sizes and shares are empty: live, on disk, exported."""
    import torch

    import gradlens

    layer = torch.nn.Linear(10, 10, bias=False)
    with gradlens.watch(layer, run=tmp_path / "run") as lens:
        layer(torch.zeros(1, 10)).sum().backward()
        gradient = torch.zeros(100)
        gradient[:bad] = torch.nan
        layer.weight.grad = None
        (layer.weight.flatten() * gradient).sum().backward()
    rows = [lens.table().iloc[0], open_run(tmp_path / "run").table().iloc[0]]
    frame = Frame()
    open_run(tmp_path / "run").replay(frame)
    rows.append(frame.frame.iloc[-1])
    for row in rows:
        assert row["nan"] == bad
        if bad == 100:
            for name in ("l1", "l2", "rms", "mean", "sum", "square_sum", "hold_share", "increase_share"):
                assert np.isnan(row[name]), name
        else:
            assert row["l2"] == 0.0
            assert row["hold_share"] == pytest.approx(0.1)
            assert row["increase_share"] == 0.0


# --- names that are taken -------------------------------------------------------------------------------------------


def test_observed_numbers_keep_apart_from_columns(tmp_path):
    """Scalars named `step` and `kind` are in every export, beside the step and the kind."""
    import json

    store, frame, lines = Store(tmp_path / "run"), Frame(), tmp_path / "all.jsonl"
    json_lines = JSONLines(lines)
    one = snapshot(3)
    one = type(one)(**{**vars(one), "scalars": {"step": 41.0, "kind": 7.0, "loss": 0.5}})
    for writer in (store, frame, json_lines, CSV(tmp_path / "all.csv")):
        writer.write(one)
        writer.close()
    for table in (open_run(tmp_path / "run").scalars(), frame.scalars):
        assert table["step"].tolist() == [3]
        assert table["observed.step"].tolist() == [41.0]
        assert table["observed.kind"].tolist() == [7.0]
        assert table["loss"].tolist() == [0.5]
    (scalars,) = [each for line in lines.read_text().splitlines() if (each := json.loads(line))["kind"] == "scalars"]
    assert scalars == {"kind": "scalars", "observed.step": 41.0, "observed.kind": 7.0, "loss": 0.5, "step": 3}


def test_readers_of_a_glob_and_of_the_run_agree_while_it_is_merged(tmp_path):
    """A thread reads all the time; no answer has a row twice, and `open_run` misses none that was there before."""
    run, stop, wrong = tmp_path / "run", threading.Event(), []
    store = Store(run, roll=20)

    def read():
        least = 0
        while not stop.is_set():
            steps = open_run(run).history(columns=["step", "parameter"])
            if steps.duplicated().any() or len(steps) < least:
                wrong.append(len(steps))
            least = len(steps)

    store.write(snapshot(0))
    store.flush()
    reader = threading.Thread(target=read)
    reader.start()
    for step in range(1, 200):
        store.write(snapshot(step))
        store.flush()
    stop.set()
    reader.join()
    store.close()
    assert wrong == []
