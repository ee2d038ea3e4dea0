"""Snapshots made by hand, column by column, for tests that need exact numbers."""

import numpy as np

from gradlens import fields
from gradlens.analysis.history import History
from gradlens.records import Parameters, Snapshot, Stage, Top


def snapshot(
    step=0, names=("a.weight", "a.bias"), stage=Stage.BACKWARD, *, backward=0, status=None, scale=1.0, shapes=None,
    time=None, loss=None, top=False, histogram=False, parameters=None, **columns,
):  # fmt: skip
    """One row a name; columns that are not given are those of gradients of 0.01 on 100 weights of 0.1."""
    n = len(names)
    base = fields.empty(n)
    base.update(
        numel=np.full(n, 100), positive=np.full(n, 50), negative=np.full(n, 50), sum=np.zeros(n), abs_sum=np.full(n, 1.0),
        square_sum=np.full(n, 0.01), min=np.full(n, -0.01), max=np.full(n, 0.01), abs_max=np.full(n, 0.01),
        abs_min_nonzero=np.full(n, 0.01), weight_square_sum=np.full(n, 1.0), weight_abs_max=np.full(n, 0.1), dot=np.zeros(n),
    )  # fmt: skip
    for name, value in columns.items():
        base[name] = np.broadcast_to(np.asarray(value, base[name].dtype), (n,)).copy()
    shapes = shapes or [(10, 10) if name.endswith("weight") else (100,) for name in names]
    return Snapshot(
        step=step,
        backward=backward,
        stage=stage,
        time=float(step) if time is None else time,
        parameters=parameters or Parameters(tuple(names), tuple(shapes), ("float32",) * n),
        status=np.asarray(["ok"] * n if status is None else status, dtype=object),
        scale=np.full(n, scale),
        columns=base,
        histogram=np.ones((n, 2 * fields.BUCKETS), np.int64) if histogram else None,
        top=_top(n) if top else None,
        scalars={} if loss is None else {"loss": loss},
    )


def _top(n):
    partial = 0.1 / (1 + np.arange(fields.TOP)[None, :] + np.arange(n)[:, None])
    return Top(np.tile(np.arange(fields.TOP), (n, 1)), partial, np.full((n, fields.TOP), 0.5))


def asked(rule, *snapshots, **options):
    """What a rule says right after each snapshot: a list of findings for each, of a history that grows."""
    history, said = History(**options), []
    for one in snapshots:
        history.append(one)
        said.append(list(rule(history) or ()))
    return said


def last(rule, *snapshots, **options):
    """What a rule says after the last snapshot."""
    return asked(rule, *snapshots, **options)[-1]


def parameters_of(findings):
    """The parameters that findings name, in order."""
    return [finding.parameter for finding in findings]
