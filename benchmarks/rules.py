"""What the rules cost a step, on the background thread: milliseconds by rule, for models of 150 and 10,000 parameters.

    python benchmarks/rules.py

A step is two snapshots, `backward` and `used`, and every default rule is asked after each. Measured on a healthy run, and on
one in which a fifth of the parameters are dead and a few vanish at every step: a rule that sees something looks back. The
figure is the median over steps, after the history has filled up.

Measured once, on two shared cores (AMD EPYC Milan) while other work ran, one thread:

    milliseconds a step    150 healthy    150 ill    10,000 healthy    10,000 ill
    all                            1.8        7.6              14.6           188
    of these Vanishing             0.6        4.1               5.6            61
    and Dead                       0.2        2.2               1.9            94
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np

from gradlens import fields, rules
from gradlens.analysis.diagnosis import Diagnosis
from gradlens.analysis.history import History
from gradlens.records import Parameters, Snapshot, Stage

SIZES = (150, 10_000)
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


def run(n: int, *, ill: bool) -> dict[str, float]:
    """Milliseconds a step, by rule and of all."""
    model, history, all_of_them = parameters(n), History(), Diagnosis(rules.DEFAULT)
    made = [[snapshot(model, k, stage, ill=ill) for stage in (Stage.BACKWARD, Stage.USED)] for k in range(10)]
    spent: dict[str, list[float]] = {}
    for step in range(FILL + STEPS):
        took: dict[str, float] = {}
        for one in made[step % len(made)]:
            history.append(replace(one, step=step))
            start = time.perf_counter()
            all_of_them(history)
            took["all"] = took.get("all", 0) + time.perf_counter() - start
            if step >= FILL:
                for rule in rules.DEFAULT:
                    start = time.perf_counter()
                    list(rule(history) or ())
                    name = type(rule).__name__
                    took[name] = took.get(name, 0) + time.perf_counter() - start
        if step >= FILL:
            for name, seconds in took.items():
                spent.setdefault(name, []).append(seconds)
    return {name: 1e3 * statistics.median(values) for name, values in spent.items()}


def main() -> None:
    columns = [(f"{n:,} {state}", run(n, ill=state == "ill")) for n in SIZES for state in ("healthy", "ill")]
    print(" " * 14 + "".join(f"{title:>16}" for title, _ in columns))
    for name in columns[0][1]:
        print(f"{name:14}" + "".join(f"{times[name]:16.3f}" for _, times in columns))


if __name__ == "__main__":
    main()
