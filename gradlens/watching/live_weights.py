"""The weights of a live model, and their partials as they are in `.grad` now: one row a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradlens import frames
from gradlens.capture.attachment import Slot
from gradlens.capture.sharding import summand
from gradlens.errors import ArgumentError, choice
from gradlens.kernels.tensors import local_part
from gradlens.records import Parameters, Snapshot
from gradlens.statistics.streaming import Followed, Q

if TYPE_CHECKING:
    import pandas as pd

ORDERS = ("sensitivity", "saliency", "value", "partial")
ROWS = 1_000_000  #: no more rows than this without `top` or `name`: a DataFrame of them takes about 0.3 GB

#: Of a parameter, what is known of its weights over several backwards.
Follow = Callable[[str], Followed | None]


class Held:
    """What this rank holds of one parameter, flat and real: a complex entry is two weights."""

    def __init__(self, slot: Slot, tensor: Tensor) -> None:
        self.slot, self.name, self._tensor = slot, slot.name, tensor

    @property
    def gradient(self) -> Tensor | None:
        """`.grad`; None where there is none, or where one that is left over means nothing."""
        return self.slot.gradient()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        shape, _ = self.slot.extent(self._tensor)
        return (*shape, 2) if self._tensor.is_complex() else shape

    @property
    def summand(self) -> bool:
        """Whether the partials here are one of several parts that the ranks have yet to add."""
        return summand(self.gradient)

    def numel(self, *, here: bool = False) -> int:
        """The parameter's weights: all of them, or those that this rank holds."""
        if isinstance(self._tensor, torch.nn.parameter.UninitializedParameter):
            return 0
        return local_part(self._tensor).numel() * (2 if self._tensor.is_complex() else 1) if here else math.prod(self.shape)

    def values(self) -> Tensor:
        """The weights, `[n]`."""
        return _reals(local_part(self._tensor.detach()))

    def partials(self, scale: float | Tensor) -> Tensor:
        """What is in `.grad` divided by the scale, `[n]`; zeros where there is nothing."""
        gradient = self.gradient
        if gradient is None:
            return torch.zeros_like(self.values())
        flat = _reals(local_part(gradient))
        return flat.clone() if isinstance(scale, float) and scale == 1.0 else flat / scale

    def place(self) -> Parameters:
        """Which entries of the whole these are."""
        dtype = str(self._tensor.dtype).removeprefix("torch.")
        shape, piece = self.slot.extent(self._tensor)
        return Parameters((self.name,), (shape,), (dtype,), (piece,))

    def at(self, index: tuple[int, ...]) -> tuple[int, int]:
        """Where a weight is: its flat index in the whole, and in what is here.

        Raises:
            ArgumentError: there is no such weight, or its partial is not this rank's to tell.
        """
        shape, name = self.shape, self.name
        if len(index) != len(shape) or not all(-size <= i < size for i, size in zip(index, shape, strict=True)):
            raise ArgumentError(f"{name} has shape {shape}; {index} is not the index of one of its weights")
        index = tuple(int(i) % size for i, size in zip(index, shape, strict=True))
        whole = int(np.ravel_multi_index(index, shape)) if shape else 0
        place = self.place()
        here = int(place.local_index(0, np.asarray([whole]))[0])
        if here < 0:
            raise ArgumentError(
                f"{name}{list(index)} is on another rank; this one holds {place.piece(0)} of {name}. Ask there, or "
                "gradlens.open_run(...).weights(), which has all ranks' most sensitive weights"
            )
        if self.summand:
            raise ArgumentError(
                f"the partial of {name}{list(index)} is the sum of what the ranks have (placement Partial), and this one "
                "has a part; reduce it first: p.grad.full_tensor()"
            )
        return whole, here

    def frame(self, scale: float | Tensor, top: int | None, by: str) -> pd.DataFrame:
        """One row a weight; the `top` ones by falling `by`, where given."""
        partials, values = self.partials(scale).double(), self.values().double()
        index = torch.arange(partials.numel(), device=partials.device)
        if top is not None and top < partials.numel():
            index = torch.topk(_key(partials, values, by), top).indices
        whole = self.place().whole_index(0, index.cpu().numpy())
        return frames.weights(self.name, self.shape, whole, values[index].cpu().numpy(), partials[index].cpu().numpy())


def check_order(top: int | None, by: str) -> None:
    """Raise unless these say how many weights are wanted, and in which order."""
    if by not in ORDERS:
        raise choice("by", by, ORDERS)
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise ArgumentError(f"top is a whole number of weights of at least 1, not {top!r}")


def check_rows(held: Sequence[Held]) -> None:
    """Raise where a row for each weight would be too many."""
    count = sum(each.numel(here=True) for each in held)
    if count > ROWS:
        raise ArgumentError(
            f"weights() would give {count:,} rows; ask for the most important with top=100, or for one parameter with "
            f"name={held[0].name!r}"
        )


def check_whole(held: Sequence[Held]) -> None:
    """Raise where this rank has not got all partials."""
    parts = [each.name for each in held if each.place().piece(0) or each.summand]
    if parts:
        few = ", ".join(parts[:3]) + (", ..." if len(parts) > 3 else "")
        raise ArgumentError(
            f"gradient() is all partials in one tensor, and this rank holds a part of {len(parts)} parameters ({few}). "
            "weights() has what is here, by the index in the whole. On all ranks, p.grad.full_tensor() gathers one, and "
            "under FSDP1 summon_full_params(model, with_grads=True) all"
        )


def joined(parts: Sequence[pd.DataFrame], top: int | None, by: str) -> pd.DataFrame:
    """The frames of several parameters in one; the `top` rows by falling `by`, where given."""
    import pandas as pd

    if not parts:
        return frames.weights("", (), np.empty(0), np.empty(0), np.empty(0))
    frame = pd.concat(parts, ignore_index=True)
    if top is None:
        return frame
    order = frame[by].abs().sort_values(ascending=False, kind="stable", na_position="last").index[:top]
    return frame.loc[order].reset_index(drop=True)


def kept(snapshot: Snapshot, held: Sequence[Held], top: int | None, by: str) -> pd.DataFrame:
    """The most sensitive weights that a snapshot has: what is left to tell of when the gradients are gone."""
    parts = []
    for each in held:
        row = snapshot.parameters.position.get(each.name)
        if row is not None and snapshot.top is not None:
            index, value, partial = (of[row] for of in (snapshot.top.index, snapshot.top.value, snapshot.top.partial))
            there = index >= 0
            parts.append(frames.weights(each.name, each.shape, index[there], value[there], partial[there]))
    return joined(parts, top, by)


def add_evidence(frame: pd.DataFrame, held: Sequence[Held], follow: Follow) -> None:
    """The columns of the feature `evidence`; empty for weights that are not followed, or not yet."""
    for column in Followed.COLUMNS:
        frame[column] = np.full(len(frame), None, object) if column == "verdict" else np.nan
    for each in held:
        mine = np.flatnonzero(frame["parameter"] == each.name)
        followed = follow(each.name) if len(mine) else None
        if followed is not None:
            at = each.place().local_index(0, _flat_index(frame["index"].iloc[mine], each.shape))
            for column, values in followed.columns(at).items():
                frame.iloc[mine, frame.columns.get_loc(column)] = values  # type: ignore[index]
            frame.attrs.update(backwards=followed.backwards, false_discovery_rate=Q, over_steps=list(Followed.OVER_STEPS))


def _reals(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.reshape(-1)


def _flat_index(index: pd.Series, shape: tuple[int, ...]) -> np.ndarray:
    if not shape:
        return np.zeros(len(index), np.int64)
    known = [(0,) * len(shape) if at is None else at for at in index]  # None: and then no place is asked for
    return np.ravel_multi_index(tuple(np.asarray(known, np.int64).T), shape).astype(np.int64)


def _key(partials: Tensor, values: Tensor, by: str) -> Tensor:
    keys = {"sensitivity": partials, "saliency": partials * values, "value": values, "partial": partials}
    return keys[by].abs().nan_to_num(nan=-1.0)
