"""What modules made of a batch: one row a module's output, of one forward pass (feature `activations`).

    rms         size: the root of the mean square of its entries
    spread      how much examples differ: the deviation over the batch, beside the rms
    dead        the share of units (entries of one example) that are 0 for every example
    saturated   the share of entries within 1 % of the ends of the module's range

All come from sums, which add up over several calls of one module (`added`): `measured` makes columns of them. Sums of
squares are kept as their roots, which float64 holds wherever it holds the entries. What means nothing is NaN: the spread of
a batch of one or where something is not finite, the saturated share of a module whose range has no ends. A spread does not
see that a batch's second axis may be the examples: the first is taken to be (the second of an LSTM or an attention that is
not `batch_first`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

#: What is added up of each output, after the number of calls; and which of it are roots of sums of squares.
SUMS = ("entries", "nonfinite", "norm", "deviation", "units", "dead", "saturated")
ROOTS = ("norm", "deviation")

#: The columns that say something, with their meaning.
COLUMNS = {
    "calls": "how often the module was called in the forward pass",
    "entries": "entries of its output, over all calls",
    "nonfinite": "entries that are NaN or infinite",
    "rms": "root mean square of the finite entries",
    "spread": "how much examples differ: the standard deviation over the batch of each unit, beside the rms",
    "dead": "share of units (entries of one example) that are 0 for every example",
    "saturated": "share of entries within 1 % of an end of the module's range (sigmoid, tanh, ...); else empty",
}
KEYS = {
    "step": "the optimizer step, from 0",
    "backward": "the backward pass that the forward pass belongs to, within its step",
    "module": "the module's name; of several outputs `lstm[0]`, `lstm[1][0]`",
    "type": "the module's class",
}


@dataclass(frozen=True, eq=False)
class Activations:
    """One forward pass: a row for each output, in the order in which modules were called in it.

    On its way from capture `sums` has a list of rows for each output, one a call, which may be tensors; then it is an array.
    """

    step: int
    backward: int
    time: float  #: seconds since the epoch
    modules: tuple[str, ...]
    types: tuple[str, ...]
    calls: tuple[int, ...]
    sums: Any  #: `[n, len(SUMS)]`

    def columns(self) -> dict[str, np.ndarray]:
        """Its columns, `[n]` each."""
        return measured(np.asarray(self.calls, np.int64), dict(zip(SUMS, self.sums.T, strict=True)))


def added(rows: np.ndarray, place: np.ndarray, n: int) -> np.ndarray:
    """`[n, len(SUMS)]` of rows `[k, len(SUMS)]`: those of one place added up."""
    total = np.zeros((n, len(SUMS)))
    largest = np.zeros((n, len(SUMS)))
    np.maximum.at(largest, place, rows)  # NaN where one is
    roots = np.array([name in ROOTS for name in SUMS])
    unit = np.where(roots & (largest > 0) & np.isfinite(largest), largest, 1.0)
    scaled = rows / unit[place]
    np.add.at(total, place, np.where(roots, scaled**2, rows))
    return np.where(roots, np.sqrt(total) * unit, total)


def measured(calls: np.ndarray, sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`COLUMNS` of sums."""
    with np.errstate(all="ignore"):
        finite = sums["entries"] - sums["nonfinite"]
        spread = sums["deviation"] / sums["norm"]
        return {
            "calls": calls,
            "entries": sums["entries"].astype(np.int64),
            "nonfinite": sums["nonfinite"].astype(np.int64),
            "rms": np.where(finite > 0, sums["norm"] / np.sqrt(finite), np.nan),
            "spread": np.where(sums["norm"] > 0, spread, np.where(np.isnan(sums["deviation"]), np.nan, 0.0)),
            "dead": sums["dead"] / sums["units"],
            "saturated": sums["saturated"] / sums["entries"],
        }


def extremes(each: Activations) -> dict[str, float]:
    """What stands out over all modules of a pass: the least spread, and the largest dead and saturated share."""
    columns = each.columns()
    found = {"least_spread": columns["spread"], "most_dead": columns["dead"], "most_saturated": columns["saturated"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a column without any number
        return {name: float((np.nanmin if name == "least_spread" else np.nanmax)(values)) for name, values in found.items()}


def frame(passes: Sequence[Activations]) -> pd.DataFrame:
    """Long form: one row a (step, backward, module)."""
    counts = [len(each.modules) for each in passes]
    keys = {
        "step": np.repeat([each.step for each in passes], counts).astype(np.int64),
        "backward": np.repeat([each.backward for each in passes], counts).astype(np.int64),
        "module": [name for each in passes for name in each.modules],
        "type": [name for each in passes for name in each.types],
    }
    parts = [each.columns() for each in passes]
    return frame_of(keys, {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS} if parts else {})


def frame_of(keys: dict[str, Any], columns: dict[str, np.ndarray]) -> pd.DataFrame:
    """Keys and columns as a DataFrame, which has them all when it has no rows."""
    import pandas as pd

    result = pd.DataFrame(keys | {name: columns.get(name, np.empty(0)) for name in COLUMNS}, columns=[*KEYS, *COLUMNS])
    for name in ("module", "type"):
        result[name] = result[name].astype("str")
    return result
