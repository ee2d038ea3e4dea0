"""What the run directory costs and how fast it answers, for two shapes of run.

    python benchmarks/store.py write 150x100000 DIR      # 150 parameters, 100,000 steps: some minutes
    python benchmarks/store.py write 10000x1000 DIR
    python benchmarks/store.py read DIR                  # with a cold start of Python, and warm
    python benchmarks/store.py caller                    # what the training thread pays, in a real training
    ... --csv FILE                                       # add the lines to a table, as in store.csv

A step has two snapshots, `backward` and `used`, as in a plain training, so that 150 x 100,000 are 30 million rows. They are
made of real ones: a network of as many parameters trains for some steps, and these are repeated with noise, which keeps what
decides how well they compress: every moment has new digits at each step, as many as the real one has, and counts add up.

Records are given to the store as fast as it takes them: `write` measures what the background thread and the keeper do
together. `caller` measures what is left on the training thread: to queue a step's tables.

Measured with pyarrow 26.0.1 on two cores (AMD EPYC), a benchmark of kernels beside the writing of 10,000 parameters, nothing
beside the rest. store.csv has all.

                                                     150 x 100,000    10,000 x 1,000
    rows                                             30 million       20 million
    bytes a row, all tables                          134              134
    files at most                                    42               51
    processor time of the background thread a step   0.75 ms          33 ms
    training thread a step                           0.06 ms
    last table, opening included                     0.02 s           0.10 s
    all rows of one parameter                        0.44 s           0.16 s
    four columns of them                             0.19 s           0.11 s
    the last table, from the start of Python         0.52 s           0.81 s
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import gradlens
from gradlens import fields
from gradlens.records import Snapshot
from gradlens.store import tables

REAL = 10_000  #: rows of real training


# --- records --------------------------------------------------------------------------------------------------------


def network(parameters: int) -> Any:
    """A stack of blocks of six parameters: normalised, linear, linear."""
    from torch import nn

    def block() -> Any:
        return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(block() for _ in range(-(-parameters // 6)))

        def forward(self, x: Any) -> Any:
            for each in self.blocks:
                x = x + each(x)
            return x

    return Residual()


def training(parameters: int) -> Iterator[tuple[Any, Any, Any]]:
    """A model, its optimizer, and a function that does a step."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = network(parameters)
    named = dict(list(model.named_parameters())[:parameters])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in named)
    optimizer = torch.optim.AdamW(named.values(), lr=1e-3)
    x, y = torch.randn(4096, 16), torch.randn(4096, 16)

    def step() -> float:
        rows = torch.randint(0, 4096, (32,))
        optimizer.zero_grad()
        loss = (model(x[rows]) - y[rows]).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return model, optimizer, step


def real(parameters: int) -> list[Snapshot]:
    """The snapshots of a real training: some steps of it."""
    kept = gradlens.testing.RecordingWriter()
    model, optimizer, step = training(parameters)
    with gradlens.watch(model, optimizer, writers=[kept], rules=()) as lens:
        for _ in range(max(4, REAL // parameters)):
            lens.observe(loss=step())
            lens.flush()
    return kept.snapshots


#: Numbers that are entries of a float32 tensor: they have fewer digits than sums have.
_ENTRIES = ("min", "max", "abs_max", "abs_min_nonzero", "weight_abs_max")


def repeated(snapshots: list[Snapshot], steps: int) -> Iterator[Snapshot]:
    """So many steps, with noise; histograms and weights only where the store keeps them."""
    draw = np.random.default_rng(0)
    by_step = [snapshots[i : i + 2] for i in range(0, len(snapshots), 2)]
    floats = [f.name for f in fields.SCALARS if f.dtype == "float64" and f.name != "update_loss_exact"]
    names = [*floats, *fields.QUANTILES]
    for step in range(steps):
        for snapshot in by_step[step % len(by_step)]:
            noise = 1 + 0.05 * draw.standard_normal((len(names), len(snapshot)))
            columns = dict(snapshot.columns)
            for row, name in enumerate(names):
                columns[name] = columns[name] * noise[row]
            for name in _ENTRIES:
                columns[name] = columns[name].astype(np.float32).astype(np.float64)
            turned = draw.integers(-4, 5, len(snapshot))
            turned = np.clip(turned, -columns["positive"], columns["negative"])
            columns["positive"] = columns["positive"] + turned
            columns["negative"] = columns["negative"] - turned
            for name in ("flip_count", "update_against"):
                columns[name] = np.maximum(columns[name] + turned, 0)
            loss = snapshot.scalars["loss"] * noise[0, 0] if snapshot.scalars else 0.0
            yield replace(snapshot, step=step, time=1.7e9 + 0.05 * step, columns=columns, scalars={"loss": loss})


# --- writing --------------------------------------------------------------------------------------------------------


def count(run: Path) -> int:
    return sum(len(tables.files(run / name)) for name in ("segments", "findings", *tables.TABLES)) + 1


def size(run: Path, table: str) -> int:
    return sum(path.stat().st_size for path in tables.files(run / table))


def write(parameters: int, steps: int, run: Path) -> dict[str, Any]:
    """Write a run at full speed."""
    from gradlens.store.store import Store

    snapshots = real(parameters)
    most, rows, own = 0, 0, 0.0
    start = time.perf_counter()
    store = Store(run, {"first_step": 0})
    for number, snapshot in enumerate(repeated(snapshots, steps)):
        before = time.thread_time()
        store.write(snapshot)
        own += time.thread_time() - before
        rows += len(snapshot)
        if number % 200 == 0:
            most = max(most, count(run))
            print(f"\r{number // 2:,} steps, {count(run)} files", end="", file=sys.stderr, flush=True)
    store.close()
    whole = time.perf_counter() - start
    everything = sum(size(run, table) for table in tables.TABLES)
    return {
        "rows": rows,
        "bytes_a_row_history": round(size(run, "history") / rows, 1),
        "bytes_a_row_all_tables": round(everything / rows, 1),
        "megabytes": round(everything / 1e6),
        "files_at_most": max(most, count(run)),
        "files": count(run),
        "write_ms_a_step": round(1e3 * own / steps, 3),
        "seconds": round(whole),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


# --- reading --------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "table": "run.table()",
    "history_of_one": "run.history(parameters=name)",
    "three_columns_of_one": "run.history(parameters=name, columns=['step', 'stage', 'l2', 'update_ratio'])",
    "a_hundred_steps": "run.history(steps=range(last - 99, last + 1), columns=['step', 'parameter', 'l2'])",
    "weights": "run.weights(top=20)",
    "scalars": "run.scalars()",
}

_COLD = """
import time; start = time.perf_counter()
import gradlens
run = gradlens.open_run({run!r})
run.table()
print(time.perf_counter() - start)
"""


def read(run: Path, rounds: int = 15) -> dict[str, Any]:
    """Seconds of each question: the median over rounds. The first table also from a cold start of Python."""
    result: dict[str, Any] = {}
    cold = [float(subprocess.check_output([sys.executable, "-c", _COLD.format(run=str(run))])) for _ in range(3)]
    result["table_with_imports_s"] = round(statistics.median(cold), 3)
    opened = gradlens.open_run(run)
    names, last = opened.names(), opened.table()["step"].max()
    for label, question in QUESTIONS.items():
        times, own = [], []
        for _ in range(rounds):
            start, start_own = time.perf_counter(), time.process_time()
            again = gradlens.open_run(run)
            eval(question, {"run": again, "name": names[len(names) // 2], "last": int(last)})
            times.append(time.perf_counter() - start)
            own.append(time.process_time() - start_own)
        result[f"{label}_s"] = round(statistics.median(times), 3)
        result[f"{label}_cpu_s"] = round(statistics.median(own), 3)  # of all threads: others at work add nothing to it
    return result


# --- the training thread --------------------------------------------------------------------------------------------


def caller(parameters: int, run: Path, steps: int = 300) -> dict[str, Any]:
    """Milliseconds a step that the training thread spends on handing tables on; and those of the step itself."""
    from gradlens.writers.background import Background

    spent: list[float] = []
    real_write = Background.write

    def timed(self: Background, item: Any) -> None:
        start = time.thread_time_ns()
        real_write(self, item)
        spent.append((time.thread_time_ns() - start) / 1e6)

    model, optimizer, step = training(parameters)
    Background.write = timed  # type: ignore[method-assign]
    try:
        with gradlens.watch(model, optimizer, run=run) as lens:
            for _ in range(20):
                step()
            lens.flush()
            spent.clear()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            whole = time.perf_counter() - start
    finally:
        Background.write = real_write  # type: ignore[method-assign]
    return {
        "caller_ms_a_step": round(sum(spent) / steps, 4),
        "caller_ms_at_most": round(max(spent), 3),
        "training_step_ms": round(1e3 * whole / steps, 2),
    }


def machine() -> str:
    found = {"model name": platform.processor()}
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            found |= dict(map(str.strip, line.split(":", 1)) for line in file if ":" in line)
    return f"{os.cpu_count()} cores, {found['model name']}, load average {os.getloadavg()[0]:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="the table to add lines to")
    parts = parser.add_subparsers(dest="part", required=True)
    writing = parts.add_parser("write")
    writing.add_argument("shape", help="PARAMETERSxSTEPS")
    writing.add_argument("run", type=Path)
    reading = parts.add_parser("read")
    reading.add_argument("run", type=Path)
    calling = parts.add_parser("caller")
    calling.add_argument("run", type=Path)
    calling.add_argument("--parameters", type=int, default=150)
    given = parser.parse_args()
    if given.part == "write":
        shape = given.shape
        result = write(*map(int, given.shape.split("x")), given.run)
        (given.run / "shape.txt").write_text(shape)
    elif given.part == "read":
        shape = (given.run / "shape.txt").read_text()
        result = read(given.run)
    else:
        shape = f"{given.parameters} parameters"
        result = caller(given.parameters, given.run)
    print(json.dumps({"shape": shape, **result}, indent=2))
    if given.csv:
        new = not given.csv.exists()
        with open(given.csv, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["shape", "measure", "value", "machine"])
            writer.writerows([shape, name, value, machine()] for name, value in result.items())


if __name__ == "__main__":
    main()
