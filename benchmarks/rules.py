"""What a step costs on the background thread, without writers: snapshots from numbers, and what each rule asks of them.

    python benchmarks/rules.py [--out rules.csv]

A step is two snapshots, `backward` and `used`, and every default rule is asked after each. Measured on a healthy run, and on
one in which a fifth of the parameters are dead and a few vanish at every step: a rule that sees something looks back. The
figure is the median over steps, after the history has filled up, of the thread's own time, so that other work on the machine
counts for little. A rule alone pays for what the others share with it: the status of the rows as bits. `snapshots` is what
comes before the rules: tables unpacked, where the `used` one rests on the numbers of `backward`.

`rules.csv` has a row for each part, size and state: `part, parameters, state, milliseconds, machine`.

Measured on two shared cores (AMD EPYC Milan), one thread; in brackets before quantiles were taken over occupied buckets
alone and shared by both snapshots, before statuses were numbers, what is looked back at was remembered, and only what is
handed on was worded:

    milliseconds a step    150 healthy       150 ill    10,000 healthy    10,000 ill
    snapshots              0.83 (3.4)                       44 (198)
    all rules              0.90 (1.3)     1.6 (7.2)         3.2 (13)      8.8 (168)
    Vanishing alone        0.23 (0.41)   0.53 (4.0)         1.8 (4.9)     2.2 (57)
    Dead alone             0.09 (0.13)   0.44 (2.1)         1.2 (1.4)     5.9 (89)

All rules are 18 now, and were 13.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gradlens import fields, kernels, rules
from gradlens.analysis.history import History
from gradlens.analysis.ruleset import RuleSet
from gradlens.records import Parameters, Snapshot, Stage
from gradlens.statistics.table import Piece, Table, UpdatePiece
from gradlens.statistics.transfer import Transfer

SIZES, STATES = (150, 10_000), ("healthy", "ill")
FILL, STEPS = 120, 20


def parameters(n: int) -> Parameters:
    """Layers of a weight and a bias."""
    names = tuple(f"blocks.{i // 2}.linear.{('weight', 'bias')[i % 2]}" for i in range(n))
    return Parameters(names, tuple(((100, 100), (100,))[i % 2] for i in range(n)), ("float32",) * n)


def snapshot(model: Parameters, step: int, stage: Stage, *, ill: bool) -> Snapshot:
    """Gradients of noise, of another size in each parameter."""
    n, rng = len(model), np.random.default_rng(step)
    numel = np.asarray([10_000 if len(shape) == 2 else 100 for shape in model.shapes])
    size = 1e-3 * rng.lognormal(size=n)
    columns = fields.empty(n) | {
        "numel": numel,
        "positive": numel // 2,
        "negative": numel - numel // 2,
        "sum": size,
        "abs_sum": numel * size,
        "square_sum": numel * size**2,
        "min": -size,
        "max": size,
        "abs_max": size,
        "abs_min_nonzero": size,
        "weight_square_sum": numel * 0.01,
        "weight_abs_max": np.full(n, 0.3),
        "dot": size,
    }
    if stage == Stage.USED:
        moved = {"update_numel": numel, "update_square_sum": numel * 1e-8, "update_before_square_sum": numel * 0.01}
        columns |= moved | {"update_used_square_sum": numel * size**2, "update_moving": numel}
    status = np.full(n, "ok", dtype=object)
    if ill:
        dead, weak = slice(0, n // 5), slice(n // 2, n // 2 + 20)
        status[dead] = "zero"
        columns["zero"][dead], columns["positive"][dead], columns["negative"][dead] = numel[dead], 0, 0
        columns["square_sum"][dead] = 0
        columns["square_sum"][weak] *= 1e-16
    return Snapshot(step, 0, stage, float(step), model, status, np.ones(n), columns, scalars={"loss": 1.0})


def run(asked: Sequence[rules.Rule], made: Sequence[Sequence[Snapshot]]) -> float:
    """Milliseconds a step of these rules, what is new of them included."""
    history, ruleset, spent = History(), RuleSet(asked), []
    for step in range(FILL + STEPS):
        took = 0.0
        for one in made[step % len(made)]:
            history.append(replace(one, step=step))
            start = time.thread_time()
            ruleset(history)
            took += time.thread_time() - start
        spent.append(took)
    return 1e3 * statistics.median(spent[FILL:])


def unpacked(n: int) -> float:
    """Milliseconds a step of making both snapshots: rows of noise, of another size in each parameter."""
    model, generator = parameters(n), torch.Generator().manual_seed(0)
    g = [1e-3 * 2.0 ** (i % 20) * torch.randn(64, generator=generator) for i in range(n)]
    rows, spent = list(range(n)), []
    numbers, sample = kernels.summarize(g, g), kernels.sample(g)
    moved = kernels.compare(g, g, [w + 0.01 * w for w in g], None)
    for step in range(STEPS):
        tables = [Table(step, 0, stage, model, 0.0, notes=[None] * n) for stage in (Stage.BACKWARD, Stage.USED)]
        piece = Piece(rows, numbers)
        for table in tables:
            table.pieces = [piece]
        update = UpdatePiece(Piece(rows, moved), [True] * n, False, False, Piece(rows, sample), Piece(rows, sample), True)
        tables[1].updates = [update]
        arrays = [Transfer(table.pack()).wait() for table in tables]
        start = time.thread_time()
        before = None
        for table, array in zip(tables, arrays, strict=True):
            before = (table, table.unpack(array, {}, before))
        spent.append(time.thread_time() - start)
    return 1e3 * statistics.median(spent)


def machine() -> str:
    """The processor, as far as it says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description="What rules and snapshots cost on the background thread.")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    cases = [(n, state) for n in SIZES for state in STATES]
    print(" " * 14 + "".join(f"{f'{n:,} {state}':>16}" for n, state in cases))
    made = [
        [[snapshot(model, k, stage, ill=state == "ill") for stage in (Stage.BACKWARD, Stage.USED)] for k in range(10)]
        for model in map(parameters, SIZES)
        for state in STATES
    ]
    rows = []
    parts = [("all", rules.DEFAULT), *((type(rule).__name__, [rule]) for rule in rules.DEFAULT)]
    for name, asked in [("snapshots", None), *parts]:
        if asked is None:
            taken = np.repeat([unpacked(n) for n in SIZES], len(STATES)).tolist()
        else:
            taken = [run(asked, snapshots) for snapshots in made]
        print(f"{name:14}" + "".join(f"{ms:16.2f}" for ms in taken), flush=True)
        rows += [(name, n, state, f"{ms:.3f}", machine()) for (n, state), ms in zip(cases, taken, strict=True)]
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("part", "parameters", "state", "milliseconds", "machine"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
