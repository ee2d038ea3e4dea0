"""The numbers that TensorBoard's dashboards show, of many steps at once: `[m]` a tag, NaN where there is nothing to say.

a model's   sums over its parameters, then the formula of `gradlens.fields`
a weight's  its own column, as a power of ten
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gradlens import fields
from gradlens.analysis.rules.base import judged, layout
from gradlens.blocks import Block
from gradlens.records import Status
from gradlens.writers import tags

Numbers = dict[str, np.ndarray]

_OF_MODEL = ("numel", "positive", "negative", "zero", "nan", "inf", "square_sum", "flip_count", "flip_moving")
_OF_UPDATE = ("update_dot", "update_used_square_sum", "update_square_sum")


def of_model(gradient: Block) -> Numbers:
    """What the whole model's gradient says."""
    whole = _pooled(gradient, _OF_MODEL)
    result = {
        f"{tags.HEALTH}/gradient_norm": fields.derive("l2", whole),
        f"{tags.HEALTH}/layer_spread": _spread(gradient),
        f"{tags.HEALTH}/partials_nonfinite": whole["nan"] + whole["inf"],
        f"{tags.HEALTH}/parameters_absent": gradient.has(Status.ABSENT).sum(axis=1).astype(np.float64),
    }
    for column in ("increase_share", "decrease_share", "hold_share", "flip_share"):
        result[f"{tags.DIRECTION}/{column}"] = fields.derive(column, whole)
    return result


def of_update(used: Block) -> Numbers:
    """What the optimizer did with it."""
    moved = judged(used) & (used.columns["update_numel"] > 0)
    change = np.where(moved, used.column("loss_change"), 0.0).sum(axis=1)
    ratio = used.column("update_ratio")
    return {
        f"{tags.UPDATE}/update_ratio": _median(ratio, weights(used) & np.isfinite(ratio)),
        f"{tags.UPDATE}/alignment": fields.derive("alignment", _pooled(used, _OF_UPDATE)),
        f"{tags.UPDATE}/loss_change": np.where(moved.any(axis=1), change, np.nan),
    }


def of_chosen(block: Block, group: str, column: str, chosen: Mapping[str, str]) -> Numbers:
    """A column of some weights, by what they are called in tags."""
    rows = {tag: row for name, tag in chosen.items() if (row := block.parameters.position.get(name)) is not None}
    at = list(rows.values())
    values = _log10(fields.derive(column, _Some(block.columns, lambda stored: stored[:, at])))
    return {f"{group}/{tag}": values[:, i] for i, tag in enumerate(rows)}


def choose(gradient: Block, most: int) -> dict[str, str]:
    """Weights evenly along the model of one moment, and what they are called in tags."""
    rows = np.flatnonzero(weights(gradient)[0])
    picked = rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int))]
    return {gradient.names[row]: tags.numbered(row, gradient.names[row]) for row in picked}


def weights(rows: Block) -> np.ndarray:
    """`[m, n]` the parameters that are not biases or scales, if there are any, and have a gradient of their own."""
    own = judged(rows)
    chosen = own & layout(rows.parameters).matrix
    return np.asarray(np.where(chosen.any(axis=1, keepdims=True), chosen, own))


class _Some(Mapping[str, np.ndarray]):
    """Columns, of which a part is taken when it is asked for."""

    def __init__(self, columns: Mapping[str, np.ndarray], part: Callable[[np.ndarray], np.ndarray]) -> None:
        self._columns, self._part = columns, part

    def __getitem__(self, name: str) -> np.ndarray:
        return self._part(self._columns[name])

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __contains__(self, name: object) -> bool:
        return name in self._columns


def taken(block: Block, at: Sequence[int]) -> Block:
    """Some moments of a block; columns are taken when they are asked for."""
    if len(at) == len(block):
        return block
    moments = np.asarray(at, np.int64)
    return Block(
        block.stage,
        block.parameters,
        block.step[moments],
        block.backward[moments],
        block.time[moments],
        block.status[moments],
        block.scale[moments],
        _Some(block.columns, lambda values: values[moments]),
        [None] * len(moments),
        [block.scalars[i] for i in at],
    )


def _pooled(block: Block, names: Sequence[str]) -> Numbers:
    """Sums over the parameters that have a gradient of their own; `[m]` a column."""
    own = judged(block)
    return {name: np.nansum(np.where(own, block.columns[name], 0.0), axis=1) for name in names}


def _spread(gradient: Block) -> np.ndarray:
    """Powers of ten between the strongest and the weakest weight, over the partials that are not 0."""
    columns = gradient.columns
    moving = columns["positive"] + columns["negative"]
    sizes = _log10(np.sqrt(columns["square_sum"] / np.maximum(moving, 1)))
    known = weights(gradient) & (moving > 0) & np.isfinite(sizes)
    low = np.where(known, sizes, np.inf).min(axis=1, initial=np.inf)
    high = np.where(known, sizes, -np.inf).max(axis=1, initial=-np.inf)
    return np.subtract(high, low, out=np.full(len(low), np.nan), where=known.any(axis=1))


def _median(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """`[m]` over the values that are known."""
    ordered, count = np.sort(np.where(known, values, np.inf), axis=1), known.sum(axis=1)
    if not ordered.shape[1]:
        return np.full(len(values), np.nan)
    place, last = np.arange(len(values)), np.maximum(count - 1, 0)
    middle = ordered[place, last // 2] / 2 + ordered[place, np.minimum(count // 2, last)] / 2
    return np.where(count > 0, middle, np.nan)


def _log10(values: np.ndarray) -> np.ndarray:
    return np.log10(values, out=np.full(np.shape(values), np.nan), where=np.asarray(values) > 0)
