"""The numbers of a page, small enough for one file: rows of the newest step, and the whole run thinned to a screen."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gradlens.records import Stage

if TYPE_CHECKING:
    from gradlens.page.summary import Summary

#: What a row of a parameter says, in this order.
COLUMNS = ("increase_share", "decrease_share", "hold_share", "rms", "abs_max", "cosine", "flip_share")
UPDATES = ("update_ratio", "alignment", "against_share", "loss_change")


def finite(value: float) -> float | None:
    """A number, or None where JSON has none."""
    return float(value) if math.isfinite(value) else None


def rows(summary: Summary) -> list[dict[str, Any]]:
    """One entry a parameter, of the last step: what its gradient was like and what the optimizer did."""
    history = summary.history
    if not len(history):
        return []
    now, latest = history.at(), history.latest(Stage.USED)
    used = None if latest is None else history.at(latest.step, Stage.USED)
    names = [(now, name, now.column(name)) for name in COLUMNS]
    if used is not None:
        names += [(used, name, used.column(name)) for name in UPDATES]
    found = []
    for row, name in enumerate(now.names):
        entry: dict[str, Any] = {
            "parameter": name,
            "shape": list(now.parameters.shapes[row]),
            "dtype": now.parameters.dtypes[row],
            "weights": int(now.columns["numel"][row]),
            "status": str(now.status[row]),
            "step": now.step,
        }
        for of, column, values in names:
            at = row if of is now else of.parameters.position.get(name)
            entry[column] = None if at is None else finite(float(values[at]))
        found.append(entry)
    return found
