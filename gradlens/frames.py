"""Records as DataFrames: the columns of `fields.FRAME`, one row a parameter. Live and offline answers are made here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradlens import fields
from gradlens.records import Finding, Snapshot, directions

if TYPE_CHECKING:
    import pandas as pd


def frame(snapshots: Sequence[Snapshot]) -> pd.DataFrame:
    """Long form: one row a (snapshot, parameter), in the order given."""
    import pandas as pd

    lengths = [len(snapshot) for snapshot in snapshots]

    def over(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(values) if values else np.empty(0)

    def repeated(values: list[object]) -> np.ndarray:
        return np.repeat(np.asarray(values, dtype=object), lengths) if values else np.empty(0, object)

    columns = {
        "step": np.repeat(np.asarray([s.step for s in snapshots], np.int64), lengths),
        "backward": np.repeat(np.asarray([s.backward for s in snapshots], np.int64), lengths),
        "stage": repeated([str(s.stage) for s in snapshots]),
        "parameter": [name for s in snapshots for name in s.names],
        "status": [str(word) for s in snapshots for word in s.status],
        "scale": over([s.scale for s in snapshots]),
        "shape": pd.Series([shape for s in snapshots for shape in s.parameters.shapes], dtype=object),
        "dtype": [dtype for s in snapshots for dtype in s.parameters.dtypes],
    }
    for name in fields.VALUES:
        columns[name] = over([s.column(name) for s in snapshots])
    result = pd.DataFrame(columns, columns=list(fields.FRAME))
    for name in ("stage", "parameter", "status", "dtype"):
        result[name] = result[name].astype("str")
    return result


def table(snapshot: Snapshot) -> pd.DataFrame:
    """One step, what matters first."""
    return frame([snapshot])[list(fields.TABLE)]


#: Names that a frame or a line has anyway.
RESERVED = ("step", "kind")


def scalar_name(name: str) -> str:
    """What an observed number is called beside other columns: `observed.step` where `step` is the step itself."""
    return f"observed.{name}" if name in RESERVED else name


def weights(name: str, shape: tuple[int, ...], index: np.ndarray, value: np.ndarray, partial: np.ndarray) -> pd.DataFrame:
    """One row a weight of one parameter: `parameter, index, value, partial, direction, sensitivity, saliency`.

    `index` is flat. A complex parameter has two weights an entry: `shape` then ends with an axis of 2, real and imaginary.
    """
    return weights_of([(name, shape, index, value, partial)])


def weights_of(
    parameters: Sequence[tuple[str, tuple[int, ...], np.ndarray, np.ndarray, np.ndarray]],
) -> pd.DataFrame:
    """`weights` of several parameters, one after the other. An index that is not known is -1, and None in the frame."""
    import pandas as pd

    names: list[str] = []
    tuples: list[tuple[int, ...] | None] = []
    for name, shape, index, _, _ in parameters:
        names += [name] * len(index)
        index = np.asarray(index, np.int64)
        at = np.unravel_index(np.maximum(index, 0), shape) if shape else ()
        places = zip(*(axis.tolist() for axis in at), strict=True) if shape else [()] * len(index)
        tuples += [place if known else None for place, known in zip(places, (index >= 0).tolist(), strict=True)]
    value, partial = (
        np.concatenate([np.empty(0), *(np.asarray(each[i], np.float64) for each in parameters)]) for i in (3, 4)
    )
    return pd.DataFrame(
        {
            "parameter": pd.Series(names, dtype="str"),
            "index": pd.Series(tuples, dtype=object),
            "value": value,
            "partial": partial,
            "direction": pd.Series(directions(partial), dtype="str"),
            "sensitivity": np.abs(partial),
            "saliency": np.abs(value * partial),
        }
    )


def to_frame(findings: Sequence[Finding]) -> pd.DataFrame:
    """One row a finding."""
    import pandas as pd

    names = ["step", "severity", "rule", "parameter", "stage", "seen", "value", "causes", "remedy"]
    rows = [[getattr(finding, name) for name in names] for finding in findings]
    result = pd.DataFrame(rows, columns=names)
    result["severity"] = result["severity"].astype(str)
    return result
