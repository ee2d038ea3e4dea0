"""What the rules cost a step, on the background thread: milliseconds by rule, for models of 150 and 10,000 parameters.

    python benchmarks/rules.py

A step is two snapshots, `backward` and `used`, and every default rule is asked after each. Measured on a healthy run, and on
one in which a fifth of the parameters are dead and a few vanish at every step: a rule that sees something looks back. The
figure is the median over steps, after the history has filled up, of the thread's own time, so that other work on the machine
counts for little. A rule alone pays for what the others share with it: the status of the rows as numbers.

Measured on two shared cores (AMD EPYC Milan), one thread; in brackets before statuses were numbers, what is looked back at
was remembered, and only what is handed on was worded:

    milliseconds a step    150 healthy       150 ill    10,000 healthy    10,000 ill
    all                    0.75 (1.3)     1.4 (7.2)         3.1 (13)      7.3 (168)
    Vanishing alone        0.19 (0.41)   0.43 (4.0)         1.7 (4.9)     2.1 (57)
    Dead alone             0.09 (0.13)   0.36 (2.1)         1.2 (1.4)     4.7 (89)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradlens import fields, rules
from gradlens.analysis.diagnosis import Diagnosis
from gradlens.analysis.history import History
from gradlens.records import Parameters, Snapshot, Stage

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
    """Milliseconds a step of these rules, the diagnosis included."""
    history, diagnosis, spent = History(), Diagnosis(asked), []
    for step in range(FILL + STEPS):
        took = 0.0
        for one in made[step % len(made)]:
            history.append(replace(one, step=step))
            start = time.thread_time()
            diagnosis(history)
            took += time.thread_time() - start
        spent.append(took)
    return 1e3 * statistics.median(spent[FILL:])


def main() -> None:
    print(" " * 14 + "".join(f"{f'{n:,} {state}':>16}" for n in SIZES for state in STATES))
    models = [parameters(n) for n in SIZES]
    made = [
        [[snapshot(model, k, stage, ill=state == "ill") for stage in (Stage.BACKWARD, Stage.USED)] for k in range(10)]
        for model in models
        for state in STATES
    ]
    for name, asked in [("all", rules.DEFAULT), *((type(rule).__name__, [rule]) for rule in rules.DEFAULT)]:
        print(f"{name:14}" + "".join(f"{run(asked, snapshots):16.2f}" for snapshots in made), flush=True)


if __name__ == "__main__":
    main()
