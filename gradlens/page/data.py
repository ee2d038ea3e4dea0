"""The numbers of a page, small enough for one file: rows of the newest step, and the whole run thinned to a screen.

A matrix [parameters, steps] is one text: base64 of one code a cell. `logs` spends 16 bits on a size, from 1e-46 to 1e40, and
is right to 0.16 %; `shares` spends 8 on a number between -1 and 1. Code 0 is a cell without a number, code 1 of `logs` zero.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradlens import fields
from gradlens.analysis.agreement import MEANING, Agreement
from gradlens.progress import tracked
from gradlens.records import Finding, Parameters, Severity, Snapshot, Stage, Status, directions, total
from gradlens.writers.report import named

if TYPE_CHECKING:
    from gradlens.page.summary import Summary

#: What a row of a parameter says, in this order.
COLUMNS = ("increase_share", "decrease_share", "hold_share", "rms", "abs_max", "cosine", "flip_share")
UPDATES = ("update_ratio", "alignment", "against_share", "loss_change")

CELLS = 130_000  #: of a matrix: 1,000 parameters at 130 steps
MOST, LEAST = 400, 16  #: steps of a matrix
ROWS = 4000  #: parameters of a matrix; a model of more shows these many, evenly taken
POINTS = 1500  #: of the loss
WEIGHTS = 20  #: of the most sensitive
LOW, HIGH = -46.0, 40.0  #: decades of `logs`
GROUPS = 40  #: of findings
NO_SETTINGS = ("overhead", "aliases", "diagnosis")  #: of what a segment keeps beside them


def finite(value: float) -> float | None:
    """A number, or None where JSON has none."""
    return float(value) if math.isfinite(value) else None


# --- the newest step ------------------------------------------------------------------------------------------------


def rows(summary: Summary) -> list[dict[str, Any]]:
    """One entry a parameter, of the last step: what its gradient was like and what the optimizer did."""
    history = summary.history
    if not len(history):
        return []
    now, latest = history.at(), history.latest(Stage.USED)
    used = None if latest is None else history.at(latest.step, Stage.USED)
    columns = {name: now.column(name) for name in COLUMNS}
    moved = {name: used.column(name) for name in UPDATES} if used is not None else {}
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
        at = None if used is None else used.parameters.position.get(name)
        entry |= {column: finite(float(values[row])) for column, values in columns.items()}
        entry |= {column: None if at is None else finite(float(values[at])) for column, values in moved.items()}
        found.append(entry)
    return found


# --- the page -------------------------------------------------------------------------------------------------------


def collect(summary: Summary) -> dict[str, Any]:
    """All that the page shows."""
    run = summary.run
    content: dict[str, Any] = {
        "name": run.path.resolve().name,
        "path": str(run.path),
        "created": run.created if isinstance(run.created, int | float) else None,
        "count": len(summary.steps),
        "first": summary.steps[0] if summary.steps else None,
        "last": summary.steps[-1] if summary.steps else None,
        "health": _health(summary),
        "diagnosis": {
            "verdict": summary.diagnosis.verdict,
            "confidence": finite(float(summary.diagnosis.confidence)),
            "ill": bool(summary.diagnosis.ill),
        },
        "findings": _findings(summary),
        "loss": thinned(summary.losses),
        "overhead": summary.overhead,
        "settings": {name: str(value) for name, value in run.settings.items() if name not in NO_SETTINGS},
        "table": rows(summary),
        "weights": _weights(summary),
        "verdicts": MEANING,
    }
    return content | _over_time(summary)


def _health(summary: Summary) -> dict[str, Any]:
    worst = summary.worst()
    counts = {str(severity): sum(each.severity == severity for each in summary.findings) for severity in Severity}
    return {"worst": None if worst is None else worst.value, "counts": {k: v for k, v in counts.items() if v}}


def _findings(summary: Summary) -> list[dict[str, Any]]:
    """What one rule says with the same advice, together: the origin, what follows from it, then the worst and earliest."""
    diagnosis = summary.diagnosis
    first = [*([] if diagnosis.origin is None else [diagnosis.origin]), *diagnosis.follows]
    rest = sorted(
        (each for each in summary.findings if each not in first), key=lambda each: (-each.severity.rank, each.step)
    )
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for each in (*first, *rest):
        groups.setdefault((each.severity, each.rule, each.causes, each.remedy), []).append(each)
    return [
        {
            "rule": group[0].rule,
            "severity": group[0].severity.value,
            "step": min(each.step for each in group),
            "last": max(each.step for each in group),
            "where": list(dict.fromkeys(name for each in group for name in (each.parameters or (each.parameter,)) if name)),
            "seen": group[0].seen,
            "causes": list(group[0].causes),
            "remedy": group[0].remedy,
            "origin": group[0] == diagnosis.origin,
            "follows": group[0] != diagnosis.origin and group[0] in first,
        }
        for group in list(groups.values())[:GROUPS]
    ]


def thinned(losses: Mapping[int, float]) -> dict[str, list[Any]]:
    """A loss of at most some `POINTS`, and no peak is lost: of each stretch its lowest and its highest."""
    steps = np.array(sorted(losses), np.int64)
    values = np.array([losses[step] for step in steps.tolist()], np.float64)
    if len(steps) > POINTS:
        kept: set[int] = {0, len(steps) - 1}
        for part in np.array_split(np.arange(len(steps)), POINTS // 2):
            inside = np.where(np.isfinite(values[part]), values[part], np.nan)
            if not np.isnan(inside).all():
                kept |= {int(part[np.nanargmin(inside)]), int(part[np.nanargmax(inside)])}
        at = sorted(kept)
        steps, values = steps[at], values[at]
    return {"steps": steps.tolist(), "values": [finite(value) for value in values.tolist()]}


def _weights(summary: Summary) -> list[dict[str, Any]]:
    """The most sensitive weights of the last step that kept them, and how often their sign was the same before."""
    kept = [snapshot for snapshot in summary.weights() if snapshot.top is not None]
    if not kept:
        return []
    newest = [snapshot for snapshot in kept if snapshot.step == kept[-1].step]
    stage = newest[-1].stage
    candidates = []
    for snapshot in (each for each in newest if each.stage == stage):
        size = np.where(snapshot.top.index >= 0, np.abs(snapshot.top.partial), -1)  # type: ignore[union-attr]
        for flat in np.argsort(-size, axis=None, kind="stable")[:WEIGHTS].tolist():
            row, column = divmod(flat, size.shape[1])
            if size[row, column] > 0:
                candidates.append((float(size[row, column]), snapshot, row, column))
    candidates.sort(key=lambda each: -each[0])
    chosen = candidates[:WEIGHTS]
    signs = summary.run.signs({snapshot.names[row] for _, snapshot, row, _ in chosen}, stage=str(stage)) if chosen else {}
    return [_weight(snapshot, row, column, signs) for _, snapshot, row, column in chosen]


def _weight(snapshot: Snapshot, row: int, column: int, signs: Mapping[tuple[str, int], tuple[int, int]]) -> dict[str, Any]:
    top, name = snapshot.top, snapshot.names[row]
    assert top is not None
    index, partial = int(top.index[row, column]), float(top.partial[row, column])
    agreement = Agreement.of(signs.get((name, index), (0, 0)), partial)
    direction = str(directions(np.asarray(partial)))
    return {
        "weight": named(name, _place(snapshot.parameters, row, index)),
        "parameter": name,
        "value": finite(float(top.value[row, column])),
        "partial": finite(partial),
        "direction": direction,
        "agree": agreement.same,
        "kept": agreement.kept,
        "agreement": str(agreement),
        "verdict": agreement.verdict(direction),
        "step": snapshot.step,
        "stage": str(snapshot.stage),
    }


def _place(parameters: Parameters, row: int, flat: int) -> tuple[int, ...]:
    shape = parameters.shapes[row] + ((2,) if parameters.dtypes[row].startswith("complex") else ())
    return tuple(int(i) for i in np.unravel_index(flat, shape)) if shape else ()


# --- over time ------------------------------------------------------------------------------------------------------


def _over_time(summary: Summary) -> dict[str, Any]:
    names = summary.run.names()
    stage = next((each.value for each in reversed(Stage) if summary.run.steps(each.value)), None)
    if stage is None:
        return {"steps": [], "names": [], "matrices": {}, "whole": {}, "stage": None, "left_out": 0}
    shown = [names[i] for i in evenly(len(names), ROWS)]
    there = summary.run.steps(stage)
    count = max(LEAST, min(MOST, CELLS // max(len(shown), 1)))
    steps = [there[i] for i in evenly(len(there), count)]
    column = {step: at for at, step in enumerate(steps)}
    whole = {name: np.full(len(steps), np.nan) for name in (*_WHOLE, "low", "middle", "high")}

    def also(snapshots: Sequence[Snapshot]) -> None:
        for step in {snapshot.step for snapshot in snapshots}:
            _fill_whole([each for each in snapshots if each.step == step], column[step], whole)

    matrices = cells(summary, shown, steps, stage, tuple(_MATRICES), also)
    return {
        "stage": stage,
        "steps": steps,
        "names": shown,
        "left_out": len(names) - len(shown),
        "matrices": {name: _MATRICES[name](values) for name, values in matrices.items()},
        "whole": {name: [finite(value) for value in values.tolist()] for name, values in whole.items()},
    }


_WHOLE = ("rms", "alignment", "against_share", "loss_change", "flip_share")


def cells(
    summary: Summary,
    names: Sequence[str],
    steps: Sequence[int],
    stage: str,
    columns: Sequence[str],
    also: Callable[[Sequence[Snapshot]], None] = lambda snapshots: None,
) -> dict[str, np.ndarray]:
    """Columns of a run as matrices, [parameters, steps]; `balance` is the share to increase less the share to decrease.

    `also` is called with the snapshots, those of a step together.
    """
    place = {name: row for row, name in enumerate(names)}
    column = {step: at for at, step in enumerate(steps)}
    result = {name: np.full((len(names), len(steps)), np.nan) for name in columns}
    for snapshots in _in_parts(summary, steps, stage, len(summary.run.names())):
        for snapshot in snapshots:
            _fill(snapshot, column[snapshot.step], place, result)
        also(snapshots)
    return result


def evenly(count: int, most: int) -> list[int]:
    """Up to `most` places among `count`, the first and the last with them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []


def _in_parts(summary: Summary, steps: Sequence[int], stage: str, parameters: int) -> Iterable[list[Snapshot]]:
    """Some steps at a time: 50,000 rows are in memory."""
    size = max(1, 50_000 // max(parameters, 1))
    starts = range(0, len(steps), size)
    for start in tracked(starts, "reading", len(starts), None if len(starts) > 1 else False):
        yield summary.run.snapshots(steps=steps[start : start + size], stage=stage)


def _fill(snapshot: Snapshot, column: int, place: Mapping[str, int], into: Mapping[str, np.ndarray]) -> None:
    pairs = [(place[name], row) for row, name in enumerate(snapshot.names) if name in place]
    if not pairs:
        return
    to, of = (np.array(each) for each in zip(*pairs, strict=True))
    for name, values in into.items():
        if name == "balance":
            read = snapshot.column("increase_share") - snapshot.column("decrease_share")
        else:
            read = snapshot.column(name)
        values[to, column] = read[of]


def _fill_whole(snapshots: Sequence[Snapshot], column: int, whole: Mapping[str, np.ndarray]) -> None:
    """Of the whole model: pooled numbers, and how the update ratios of its matrices are spread."""
    if len(snapshots) == 1:
        pooled = total(snapshots[0])
        for name in _WHOLE:
            whole[name][column] = float(fields.derive(name, pooled)[0])
    ratios = [
        ratio
        for snapshot in snapshots
        for ratio, status, shape in zip(
            snapshot.column("update_ratio").tolist(), snapshot.status.tolist(), snapshot.parameters.shapes, strict=True
        )
        if math.isfinite(ratio) and ratio > 0 and status == Status.OK and len(shape) > 1
    ]
    if ratios:
        low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
        whole["low"][column], whole["middle"][column], whole["high"][column] = low, middle, high


def logs(values: np.ndarray) -> str:
    """Sizes, as 16 bits of their logarithm each."""
    with np.errstate(divide="ignore", invalid="ignore"):
        place = (np.log10(values) - LOW) / (HIGH - LOW) * 65533
        codes = np.where(values > 0, 2 + np.clip(np.nan_to_num(place), 0, 65533).round(), np.where(values == 0, 1, 0))
    codes[~np.isfinite(values)] = 0
    return base64.b64encode(codes.astype("<u2").tobytes()).decode()


def shares(values: np.ndarray) -> str:
    """Numbers between -1 and 1, as 8 bits each."""
    with np.errstate(invalid="ignore"):
        codes = np.where(np.isfinite(values), 1 + np.clip((values + 1) / 2 * 254, 0, 254).round(), 0)
    return base64.b64encode(np.nan_to_num(codes).astype(np.uint8).tobytes()).decode()


_MATRICES = {"rms": logs, "update_ratio": logs, "balance": shares, "cosine": shares, "flip_share": shares}
