"""Snapshots of made-up numbers, every column of them, without torch; and a store that writes no file in the background."""

import contextlib

import numpy as np

from gradlens import fields
from gradlens.activations import SUMS, Activations
from gradlens.records import Finding, Parameters, Severity, Snapshot, Status, Top
from gradlens.store.store import Store

NAMES = ("body.0.weight", "body.0.bias", "head.weight", "head.bias", "scale")
SHAPES = ((10, 10), (10,), (4, 10), (4,), ())
HOSTILE = [0.0, -0.0, np.nan, np.inf, -np.inf, 5e-324, 1e300, -1e-300]


def parameters(names=NAMES, shapes=SHAPES, dtypes=None, pieces=()):
    return Parameters(tuple(names), tuple(shapes), tuple(dtypes or ["float32"] * len(names)), tuple(pieces))


PARAMETERS = parameters()


def snapshot(step, stage="backward", backward=0, *, of=PARAMETERS, seed=0, rank=0, detail=True, scalars=None, time=None):
    """Random numbers in every column, some of them hostile."""
    draw = np.random.default_rng([seed, step, backward, len(stage), rank])
    n = len(of)
    columns = {}
    for field in fields.SCALARS:
        columns[field.name] = draw.integers(0, 1 << 40, n) if field.dtype == "int64" else draw.standard_normal(n)
        if field.dtype == "float64":
            columns[field.name][draw.integers(n)] = draw.choice(HOSTILE)
    histogram = draw.integers(0, 5, (n, 2 * fields.BUCKETS)) * (draw.random((n, 2 * fields.BUCKETS)) < 0.05)
    columns |= fields.quantiles(histogram, columns)
    return Snapshot(
        step=step,
        backward=backward,
        stage=stage,
        time=1.7e9 + step if time is None else time,
        parameters=of,
        status=draw.choice([str(word) for word in Status], n).astype(object),
        scale=draw.choice([1.0, 1024.0, np.nan], n),
        columns=columns,
        histogram=histogram if detail else None,
        top=_top(draw, of) if detail else None,
        scalars={"loss": float(draw.standard_normal())} if scalars is None else scalars,
        rank=rank,
    )


def _top(draw, of):
    """Of each parameter as many as it has, falling by size."""
    n = len(of)
    index = np.full((n, fields.TOP), -1, np.int64)
    partial, value = np.full((n, fields.TOP), np.nan), np.full((n, fields.TOP), np.nan)
    for row, shape in enumerate(of.shapes):
        size = int(np.prod(shape)) * (2 if of.dtypes[row].startswith("complex") else 1)
        k = min(size, fields.TOP)
        index[row, :k] = draw.permutation(size)[:k]
        partial[row, :k] = sorted(draw.standard_normal(k), key=abs, reverse=True)
        value[row, :k] = draw.standard_normal(k)
    return Top(index, partial, value)


def training(steps, first=0, **options):
    """Two snapshots a step, as of a plain training."""
    return [snapshot(step, stage, **options) for step in range(first, first + steps) for stage in ("backward", "used")]


def activations(step, modules=("0", "1")):
    """What modules made of a batch."""
    n = len(modules)
    return Activations(step, 0, float(step), tuple(modules), ("Linear",) * n, (1,) * n, np.full((n, len(SUMS)), 2.0))


def finding(step, rule="made", **more):
    return Finding(rule=rule, step=step, severity=Severity.WARNING, seen=f"something at {step}", **more)


@contextlib.contextmanager
def store(run, *, rank=0, interval=3600.0, **options):
    """A store that writes when told to, and not by the clock."""
    settings = {"rank": rank, **options.pop("settings", {})}
    made = Store(run, settings, interval=interval, **options)
    try:
        yield made
    finally:
        made.close()


def write(run, records, **options):
    """A run of these records, closed."""
    with store(run, **options) as to:
        for record in records:
            to.write_activations([record]) if isinstance(record, Activations) else to.write(record)
    return run
