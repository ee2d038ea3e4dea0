"""What each page asks of a run: the questions of `open_run`, as words and numbers. Names stay text; nothing is computed here
that a run does not answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradlens import fields
from gradlens.analysis.agreement import MEANING, Agreement
from gradlens.dashboard.downsampling import kept, largest_of_squares
from gradlens.dashboard.maps import Quantity
from gradlens.errors import ArgumentError, NothingCapturedError
from gradlens.records import Finding, Severity, Stage
from gradlens.store import lock
from gradlens.store.run import Run

if TYPE_CHECKING:
    import pandas as pd

Answer = tuple[dict[str, Any], dict[str, np.ndarray]]

MAX_FINDINGS = 1000
MAX_SIDE = 700  #: rows and columns of a heat map
WINDOW = 64  #: steps around the one asked for in which the nearest that was observed is looked for first

#: Columns of the parameter table, beside `parameter`, `status`, `shape` and `dtype`.
TABLE = (
    "numel", "rms", "abs_max", "increase_share", "decrease_share", "hold_share", "cosine", "flip_share", "update_ratio",
    "against_share", "loss_change", "weight_l2", "nan", "inf",
)  # fmt: skip

#: The charts of a parameter: what each shows together.
CHARTS = {
    "size": ("rms", "abs_max"),
    "shares": ("increase_share", "decrease_share", "hold_share"),
    "cosine": ("cosine", "alignment"),
    "flips": ("flip_share", "against_share"),
    "update_ratio": ("update_ratio",),
    "loss_change": ("loss_change",),
    "nonfinite": ("nan", "inf"),
}


def summary(run: Run) -> dict[str, Any]:
    """A line of the list of runs."""
    extent = run.extent()
    counts = dict.fromkeys((str(severity) for severity in Severity), 0)
    for finding in run.findings():
        counts[str(finding.severity)] += 1
    return {
        "created": run.created,
        "steps": None if extent is None else extent[1:],
        "parameters": len(run.names()),
        "findings": counts,
        "live": is_live(run),
    }


def is_live(run: Run) -> bool:
    """Whether a lens is writing to it."""
    return any(lock.held(run.path, rank) for rank in run.ranks())


def overview(run: Run) -> dict[str, Any]:
    """What is known of a run as a whole."""
    names, extent = run.names(), run.extent()
    content = {**summary(run), "names": names, "stages": [], "shapes": {}, "dtypes": {}, "notes": run.notes}
    content["settings"] = run.settings
    content["kept"] = run.kept()
    content["ranks"] = run.ranks()
    content["meanings"] = {name: fields.meaning(name) for name in (*TABLE, *(c for cs in CHARTS.values() for c in cs))}
    content |= diagnosis(run)
    if extent is not None and names:
        table = run.table(columns=["parameter", "shape", "dtype"])
        content["shapes"] = {name: list(shape) for name, shape in zip(table["parameter"], table["shape"], strict=True)}
        content["dtypes"] = dict(zip(table["parameter"], table["dtype"], strict=True))
        content["stages"] = stages(run, extent[2])
    return content


def stages(run: Run, last: int) -> list[str]:
    """Those that the last steps have, in the order in which they arise; the one to show first is the last."""
    near = run.history(columns=["stage"], steps=slice(max(last - WINDOW, 0), None), parameters=run.names()[:1])
    if near.empty:
        near = run.table(columns=["stage"])
    there = set(near["stage"])
    return [str(stage) for stage in Stage if str(stage) in there]


def diagnosis(run: Run) -> dict[str, Any]:
    """The run's diagnosis, and its findings: the origin first, then by severity and step."""
    found = run.findings()
    ranked = sorted(found, key=lambda finding: (-finding.severity.rank, finding.step))
    asked = getattr(run, "diagnosis", None)
    if asked is None:
        return {"diagnosis": {"verdict": _verdict(ranked)}, **_listed(ranked)}
    answer = asked()
    first = ([] if answer.origin is None else [answer.origin]) + list(answer.follows)
    rest = [finding for finding in ranked if finding not in first]
    told = {"verdict": answer.verdict, "confidence": answer.confidence, "origin": answer.origin is not None}
    told |= {"follows": len(answer.follows), "ill": answer.ill}
    return {"diagnosis": told, **_listed(first + rest)}


def _verdict(ranked: Sequence[Finding]) -> str:
    ill = [finding for finding in ranked if finding.severity.rank]
    if not ill:
        return "No rule found an illness."
    worst = ill[0]
    where = f" at {worst.parameter}" if worst.parameter else ""
    more = "" if len(ill) < 2 else f"; {len(ill) - 1} more below"
    return f"{worst.rule}{where} from step {worst.step}: {worst.seen}{more}"


def _listed(findings: Sequence[Finding]) -> dict[str, Any]:
    listed = [
        {
            "rule": finding.rule,
            "step": finding.step,
            "severity": str(finding.severity),
            "parameter": finding.parameter,
            "parameters": list(finding.parameters[:200]),
            "seen": finding.seen,
            "causes": list(finding.causes),
            "remedy": finding.remedy,
            "stage": finding.stage,
        }
        for finding in findings[:MAX_FINDINGS]
    ]
    return {"listed": listed, "unlisted": max(len(findings) - MAX_FINDINGS, 0)}


def table(run: Run, step: int | None, stage: str | None) -> Answer:
    """One row a parameter, of the step or the nearest that was observed."""
    at = None if step is None else nearest(run, step)
    frame = run.table(at, stage=stage, columns=["step", "stage", "parameter", "status", *TABLE])
    places = {name: row for row, name in enumerate(run.names())}
    rows = frame["parameter"].map(places).to_numpy(np.int32)
    words = sorted(set(frame["status"]))
    header = {
        "step": int(frame["step"].iloc[0]),
        "stage": str(frame["stage"].iloc[0]),
        "statuses": words,
        "columns": list(TABLE),
    }
    status = frame["status"].map({word: code for code, word in enumerate(words)}).to_numpy(np.int32)
    numbers = {name: frame[name].to_numpy(np.float64) for name in TABLE}
    return header, {"row": rows, "status": status, **numbers}


def nearest(run: Run, step: int) -> int:
    """The observed step nearest to that one.

    Raises:
        NothingCapturedError: None was observed.
    """
    extent = run.extent()
    if extent is None:
        raise NothingCapturedError("no step was recorded yet")
    _, first, last = extent
    step, window = min(max(step, first), last), WINDOW
    while True:
        around = range(max(step - window, first), min(step + window, last) + 1)
        for names in (run.names()[:1], None):  # of one parameter first: it has most steps and is read fast
            there = run.history(columns=["step"], parameters=names, steps=around)["step"].to_numpy()
            if len(there):
                return int(there[np.argmin(np.abs(there - step))])
        if around.start <= first and around.stop > last:
            raise NothingCapturedError("no step was recorded yet")
        window *= 8


def extreme(run: Run, asked: Quantity, stage: str, parameter: str, first: int, stop: int) -> dict[str, Any]:
    """Which step of a cell of the map it is that the cell shows: the one farthest from the middle of the steps around it."""
    span = max(stop - first, 1)
    frame = _of(run, parameter, ["step", "status", *asked.columns], stage, range(max(first - span, 0), stop + span))
    if frame.empty:
        return {"step": nearest(run, first)}
    value, step = asked.value(frame), frame["step"].to_numpy()
    if asked.log:
        with np.errstate(divide="ignore"):
            value = np.log10(value)
    inside = np.flatnonzero((step >= first) & (step < stop))
    if not len(inside):
        return {"step": nearest(run, first)}
    finite = value[np.isfinite(value)]
    far = np.abs(value[inside] - (np.median(finite) if len(finite) else 0.0))
    far[(frame["status"].to_numpy()[inside] == "nonfinite") | np.isnan(far)] = np.inf
    return {"step": int(step[inside[np.argmax(far)]])}


def timelines(run: Run, parameter: str, charts: Sequence[str], stage: str, steps: slice, points: int) -> Answer:
    """The lines of some charts of a parameter over steps; of many steps the extremes of each stretch."""
    unknown = [chart for chart in charts if chart not in CHARTS]
    if unknown or not charts:
        raise ArgumentError(f"there is no chart {unknown[:3]}; there are {', '.join(CHARTS)}")
    columns = [name for chart in charts for name in CHARTS[chart]]
    frame = _of(run, parameter, ["step", "status", *columns], stage, steps)
    values = {name: frame[name].to_numpy(np.float64) for name in columns}
    step = frame["step"].to_numpy(np.float64)
    arrays: dict[str, np.ndarray] = {}
    for chart in charts:
        at = kept(step, [values[name] for name in CHARTS[chart]], points)
        arrays[f"{chart}.step"] = step[at]
        arrays |= {f"{chart}.{name}": values[name][at] for name in CHARTS[chart]}
    header = {
        "parameter": parameter,
        "stage": stage,
        "steps": len(step),
        "charts": {chart: list(CHARTS[chart]) for chart in charts},
        "meanings": {name: fields.meaning(name) for name in columns},
    }
    return header, arrays


def scalars(run: Run, steps: slice, points: int) -> Answer:
    """What was observed beside the gradients, the loss first."""
    frame = run.scalars(steps=steps)
    names = sorted((name for name in frame.columns if name != "step"), key=lambda name: (name != "loss", name))[:32]
    step = frame["step"].to_numpy(np.float64) if len(frame) else np.empty(0)
    arrays: dict[str, np.ndarray] = {}
    for place, name in enumerate(names):
        values = frame[name].to_numpy(np.float64)
        there = np.flatnonzero(~np.isnan(values)) if name != "loss" else np.arange(len(values))
        at = there[kept(step[there], [values[there]], points)] if len(there) else there
        arrays[f"{place}.step"], arrays[f"{place}.value"] = step[at], values[at]
    return {"names": names, "steps": len(step)}, arrays


def histogram(run: Run, parameter: str, stage: str) -> Answer:
    """Counts by bucket over the steps whose histograms were kept; zeros apart."""
    frame = run.histograms(parameters=parameter, stage=stage)
    frame = frame[frame["parameter"] == parameter]
    steps, row = np.unique(frame["step"].to_numpy(np.int64), return_inverse=True)
    counts = np.zeros((len(steps), 2 * fields.BUCKETS), np.float64)
    np.add.at(counts, (row, frame["bucket"].to_numpy(np.int64)), frame["count"].to_numpy(np.float64))
    zero = np.zeros(len(steps))
    if len(steps):
        zeros = _of(run, parameter, ["step", "zero"], stage, steps.tolist()).drop_duplicates("step", keep="last")
        zero = zeros.set_index("step")["zero"].reindex(steps, fill_value=0).to_numpy(np.float64)
    header = {"parameter": parameter, "stage": stage, "exponent_min": fields.EXPONENT_MIN, "buckets": fields.BUCKETS}
    return header, {"steps": steps.astype(np.float64), "counts": counts, "zero": zero}


def weights(run: Run, parameter: str, step: int | None) -> dict[str, Any]:
    """The most sensitive weights of a parameter, of the last step that has them at or before that one, and how often the
    partial of each had that sign at all steps that kept it."""
    at = None if step is None else _kept_step(run, parameter, step)
    frame = run.weights(parameter, step=at)
    frame = frame[frame["parameter"] == parameter]
    columns = [name for name in frame.columns if name not in ("parameter", "index")]
    stage, shape = frame.attrs.get("stage"), run.shapes().get(parameter, ())
    signs = {} if stage is None else run.signs(parameter, stage=stage)
    rows = []
    for index, values in zip(frame["index"], frame[columns].itertuples(index=False, name=None), strict=True):
        row = {"index": None if index is None else list(index), **dict(zip(columns, values, strict=True))}
        known = signs.get((parameter, _flat(index, shape)), (0, 0)) if index is not None else (0, 0)
        agreement = Agreement.of(known, row["partial"])
        rows.append({**row, "verdict": agreement.verdict(row["direction"]), "agreement": str(agreement)})
    told = {"step": frame.attrs.get("step"), "stage": stage, "meaning": MEANING}
    return {**told, "columns": [*columns, "verdict", "agreement"], "weights": rows}


def _flat(index: Sequence[int], shape: tuple[int, ...]) -> int:
    """The place of a weight; a complex entry has two, on an axis of its own."""
    whole = (*shape, 2) if len(index) > len(shape) else shape
    return int(np.ravel_multi_index(tuple(index), whole)) if whole else 0


def matrix(run: Run, parameter: str, step: int | None) -> Answer:
    """All partials and weights of a parameter as a matrix: of many, the largest partial of each square of neighbours."""
    kept_partials = run.partials(parameter, step)
    shape = kept_partials.partial.shape
    rows = shape[0] if len(shape) > 1 else 1
    partial, value = (array.reshape(rows, -1) for array in (kept_partials.partial, kept_partials.value))
    index, reduced = largest_of_squares(partial, MAX_SIDE)
    header = {
        "parameter": parameter,
        "step": kept_partials.step,
        "stage": kept_partials.stage,
        "shape": list(shape),
        "rows": index.shape[0],
        "columns": index.shape[1],
        "reduced": reduced,
    }
    return header, {"index": index, "partial": partial.ravel()[index], "value": value.ravel()[index]}


def _kept_step(run: Run, parameter: str, step: int) -> int | None:
    """Histograms and weights are kept together; None: not by that step, so the last is taken."""
    frame = run.histograms(parameters=parameter)
    steps = np.unique(frame["step"].to_numpy(np.int64))
    before = steps[steps <= step]
    return int(before[-1]) if len(before) else (int(steps[0]) if len(steps) else None)


def _of(run: Run, parameter: str, columns: Sequence[str], stage: str | None, steps: Any) -> pd.DataFrame:
    """Rows of one parameter alone: its name may look like a pattern that others fit."""
    frame = run.history(columns=[*columns, "parameter"], parameters=parameter, stage=stage, steps=steps)
    alone = frame["parameter"].nunique() < 2
    frame = frame if alone else frame[frame["parameter"] == parameter]
    return frame.drop(columns="parameter")
