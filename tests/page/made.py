"""Runs to show: one with as many parameters as asked for, with sound numbers in every column."""

import numpy as np

from gradlens import fields
from gradlens.records import Snapshot, Top
from tests.store import made


def trained(run, *, parameters=10, steps=20, names=None, findings=(), stages=("backward", "used"), scale=1.0):
    """Partials that shrink over time and towards the first layer."""
    names = names or [f"blocks.{i // 2}.{'weight' if i % 2 == 0 else 'bias'}" for i in range(parameters)]
    of = made.parameters(names, [(4, 4)] * len(names))
    records = [snapshot(of, step, stage, scale) for step in range(steps) for stage in stages]
    return made.write(run, [*records, *findings])


def snapshot(of, step, stage, scale=1.0):
    """One table: 16 weights a parameter, 10 of which should increase."""
    n = len(of)
    size = scale * 10.0 ** (-3 * np.arange(n)[::-1] / max(n, 1)) / (1 + step / 10)
    columns = fields.empty(n)
    columns |= {
        "numel": np.full(n, 16), "negative": np.full(n, 10), "positive": np.full(n, 5), "zero": np.full(n, 1),
        "square_sum": 16 * size**2, "abs_sum": 15 * size, "sum": -5 * size, "abs_max": 2 * size, "min": -2 * size,
        "max": 2 * size, "weight_square_sum": np.full(n, 16.0), "weight_abs_max": np.full(n, 1.0),
        "flip_compared": np.full(n, 16), "flip_moving": np.full(n, 15), "flip_count": np.full(n, 3),
        "flip_dot": 8 * size**2, "flip_square_sum": 16 * size**2, "flip_previous_square_sum": 16 * size**2,
    }  # fmt: skip
    if stage == "used":
        columns |= {
            "update_numel": np.full(n, 16),
            "update_square_sum": np.full(n, 1.6e-5),
            "update_before_square_sum": np.full(n, 16.0),
            "update_used_square_sum": 16 * size**2,
            "update_dot": -1e-3 * size,
            "update_moving": np.full(n, 15),
            "update_against": np.full(n, 4),
            "update_loss_dot": -1e-3 * size,
            "update_loss_exact": np.full(n, 1),
        }
    k = fields.TOP
    top = Top(
        np.tile(np.arange(k), (n, 1)) % 16,
        np.tile(-np.linspace(2, 0.1, k), (n, 1)) * size[:, None],
        np.full((n, k), 0.5),
    )
    return Snapshot(
        step=step, backward=0, stage=stage, time=1.7e9 + step, parameters=of,
        status=np.full(n, "ok", object), scale=np.ones(n),
        columns={name: np.asarray(values, np.dtype(fields.BY_NAME[name].dtype)) for name, values in columns.items()},
        top=top, scalars={"loss": scale * 2.0 / (1 + step)},
    )  # fmt: skip
