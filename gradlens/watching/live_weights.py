"""The weights of a live model, and their partials as they are in `.grad` now: one row a weight.

A model's own questions must not take as much memory as the model: tensors are read in chunks of `CHUNK` entries, in logical
order, and only what is asked for is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradlens import frames
from gradlens._torch import local_part
from gradlens.capture.attachment import Slot
from gradlens.capture.sharding import summand
from gradlens.errors import ArgumentError, choice
from gradlens.kernels import reference
from gradlens.records import Parameters, Snapshot
from gradlens.statistics.streaming import ParameterEvidence, Q
from gradlens.watching.largest import Largest

if TYPE_CHECKING:
    import pandas as pd

ORDERS = ("sensitivity", "saliency", "value", "partial")
ROWS = 1_000_000  #: no more rows than this without `top` or `name`: a DataFrame of them takes about 0.3 GB

#: Entries that are read in one go: 1 MiB of float64, which stays in the cache.
CHUNK = 2**17

#: Of a parameter, what is known of its weights over several backwards.
Follow = Callable[[str], ParameterEvidence | None]


class Workspace:
    """A chunk's intermediate results, allocated once: malloc was measured to keep hundreds of MiB of freed ones."""

    def __init__(self) -> None:
        self._rooms: dict[tuple, Tensor] = {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Room of this name for as many entries, of a type, on the same device."""
        dtype = dtype or like.dtype
        key = name, dtype, like.device
        room = self._rooms.get(key)
        if room is None or len(room) < len(like):
            room = self._rooms[key] = torch.empty(max(len(like), CHUNK), dtype=dtype, device=like.device)
        return room[: len(like)]

    def countable(self, name: str, flat: Tensor) -> Tensor:
        """Of a type that torch compares quickly and without rounding a bar: half types as float32."""
        return flat if flat.dtype.itemsize >= 4 else self(name, flat, torch.float32).copy_(flat)


class LiveParameter:
    """What this rank holds of one parameter, flat and real: a complex entry is two weights."""

    def __init__(self, slot: Slot, tensor: Tensor) -> None:
        self.slot, self.name, self._tensor = slot, slot.name, tensor

    @property
    def gradient(self) -> Tensor | None:
        """`.grad`; None where there is none, or where it is left over from an earlier step."""
        return self.slot.gradient()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole parameter."""
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

    def chunks(self, scale: float | Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Where a chunk begins, what is in `.grad` divided by the scale (0 where nothing is), and the weights: flat.

        They are good until the next chunk.
        """
        if not self.numel(here=True):
            return
        weight, gradient, start, room = local_part(self._tensor.detach()), self.gradient, 0, Workspace()
        whole = None if gradient is None else reference.like("a gradient", local_part(gradient), weight)
        for values, partials in reference.pieces([weight, whole], CHUNK):
            value = room.countable("value", reference.flat(values))
            if partials is None:
                partial = room("partial", value).zero_()
            else:
                partial = room.countable("partial", reference.flat(partials))
                if not (isinstance(scale, float) and scale == 1.0):
                    partial = torch.div(partial, scale, out=room("unscaled", partial))
            yield start, partial, value
            start += len(value)

    def partial(self, here: int, scale: float | Tensor) -> tuple[float, int]:
        """The partial of the weight at a flat index, and how many have a larger one: all of them where it is not finite."""
        chunks = self.chunks(scale)
        partial = next(float(part[here - start]) for start, part, _ in chunks if here < start + len(part))
        if not math.isfinite(partial):
            return partial, self.numel(here=True)
        larger, room = 0, Workspace()
        for _, part, _ in self.chunks(scale):
            size = torch.abs(part, out=room("size", part))
            larger += int(torch.gt(size, abs(partial), out=room("larger", part, torch.bool)).sum())
        return partial, larger

    def value(self, here: int) -> float:
        """The weight at a flat index."""
        return next(float(value[here - start]) for start, _, value in self.chunks(1.0) if here < start + len(value))

    def kind(self) -> tuple[torch.device, torch.dtype]:
        """Device and type of the partials, which are real."""
        tensor = local_part(self._tensor if self.gradient is None else self.gradient)
        return tensor.device, tensor.dtype.to_real()

    def write_partials(self, out: Tensor, scale: float | Tensor) -> None:
        """Write the partials into `out`, `[n]`, of whatever type and device."""
        for start, part, _ in self.chunks(scale):
            out[start : start + len(part)].copy_(part)

    def partials(self, scale: float | Tensor) -> Tensor:
        """A copy of all partials, `[n]`."""
        device, dtype = self.kind()
        out = torch.empty(self.numel(here=True), dtype=dtype, device=device)
        self.write_partials(out, scale)
        return out

    def values(self) -> Tensor:
        """A copy of all weights, `[n]`."""
        weight = local_part(self._tensor.detach())
        out = torch.empty(self.numel(here=True), dtype=weight.dtype.to_real(), device=weight.device)
        for start, _, value in self.chunks(1.0):
            out[start : start + len(value)].copy_(value)
        return out

    def place(self) -> Parameters:
        """Which entries of the whole parameter this rank holds."""
        dtype = str(self._tensor.dtype).removeprefix("torch.")
        shape, piece = self.slot.extent(self._tensor)
        return Parameters((self.name,), (shape,), (dtype,), (piece,))

    def at(self, index: tuple[int, ...]) -> tuple[int, int]:
        """Where a weight is: its flat index in the whole parameter, and in this rank's part.

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

    def frame(self, scale: float | Tensor) -> pd.DataFrame:
        """One row a weight, in order."""
        empty = torch.empty(0, dtype=torch.float64)
        columns = [[empty, part.double().cpu(), value.double().cpu()] for _, part, value in self.chunks(scale)]
        _, partials, values = (torch.cat(parts).numpy() for parts in zip([empty] * 3, *columns, strict=True))
        whole = self.place().whole_index(0, np.arange(len(values)))
        return frames.weights(self.name, self.shape, whole, values, partials)


def check_order(top: int | None, by: str) -> None:
    """Raise unless `top` is a number of weights and `by` an order."""
    if by not in ORDERS:
        raise choice("by", by, ORDERS)
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise ArgumentError(f"top is a whole number of weights of at least 1, not {top!r}")


def check_rows(held: Sequence[LiveParameter]) -> None:
    """Raise if one row a weight would be too many."""
    count = sum(each.numel(here=True) for each in held)
    if count > ROWS:
        raise ArgumentError(
            f"weights() would give {count:,} rows; ask for the most important with top=100, or for one parameter with "
            f"name={held[0].name!r}"
        )


def check_whole(held: Sequence[LiveParameter]) -> None:
    """Raise if this rank does not hold all partials."""
    parts = [each.name for each in held if each.place().piece(0) or each.summand]
    if parts:
        few = ", ".join(parts[:3]) + (", ..." if len(parts) > 3 else "")
        raise ArgumentError(
            f"gradient() is all partials in one tensor, and this rank holds a part of {len(parts)} parameters ({few}). "
            "weights() has what is here, by the index in the whole. On all ranks, p.grad.full_tensor() gathers one, and "
            "under FSDP1 summon_full_params(model, with_grads=True) all"
        )


def flat_gradient(live: Sequence[LiveParameter], scales: Sequence[float | Tensor]) -> Tensor:
    """All partials in one tensor: on the parameters' common device, else the CPU; of their common type, else float32."""
    kinds = [each.kind() for each in live]
    devices, dtypes = {device for device, _ in kinds}, {dtype for _, dtype in kinds}
    sizes = [each.numel(here=True) for each in live]
    out = torch.empty(
        sum(sizes),
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        device=devices.pop() if len(devices) == 1 else "cpu",
    )
    for each, scale, part in zip(live, scales, out.split(sizes), strict=True):
        each.write_partials(part, scale)
    return out


def largest(live: Sequence[LiveParameter], scales: Sequence[float | Tensor], top: int, by: str) -> pd.DataFrame:
    """The `top` weights of all parameters by falling `by`, equal ones in model order."""
    best, room = Largest(top), Workspace()
    for source, (each, scale) in enumerate(zip(live, scales, strict=True)):
        for start, partials, values in each.chunks(scale):
            best.add(source, start, _key(room, partials, values, by), values, partials)
    found = best.result()
    if found is None:
        return joined([], top, by)
    parts, places = [], []
    for source in found.source.unique().tolist():
        at = (found.source == source).nonzero()[:, 0]
        mine, each = found.take(at), live[source]
        whole = each.place().whole_index(0, mine.index.numpy())
        parts.append((each.name, each.shape, whole, mine.value.numpy(), mine.partial.numpy()))
        places.append(at)
    return frames.weights_of(parts).iloc[torch.cat(places).argsort().numpy()].reset_index(drop=True)


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


def kept(snapshot: Snapshot, held: Sequence[LiveParameter], top: int | None, by: str) -> pd.DataFrame:
    """The most sensitive weights in a snapshot: what can be shown once the gradients are gone."""
    parts = []
    for each in held:
        row = snapshot.parameters.position.get(each.name)
        if row is not None and snapshot.top is not None:
            index, value, partial = (of[row] for of in (snapshot.top.index, snapshot.top.value, snapshot.top.partial))
            there = index >= 0
            parts.append(frames.weights(each.name, each.shape, index[there], value[there], partial[there]))
    return joined(parts, top, by)


def add_evidence(frame: pd.DataFrame, held: Sequence[LiveParameter], follow: Follow) -> None:
    """The columns of the feature `evidence`; empty for weights that are not followed, or not yet."""
    for column in ParameterEvidence.COLUMNS:
        frame[column] = np.full(len(frame), None, object) if column == "verdict" else np.nan
    for each in held:
        mine = np.flatnonzero(frame["parameter"] == each.name)
        followed = follow(each.name) if len(mine) else None
        if followed is not None:
            at = each.place().local_index(0, _flat_index(frame["index"].iloc[mine], each.shape))
            for column, values in followed.columns(at).items():
                frame.iloc[mine, frame.columns.get_loc(column)] = values  # type: ignore[index]
            frame.attrs.update(
                backwards=followed.backwards, false_discovery_rate=Q, over_steps=list(ParameterEvidence.OVER_STEPS)
            )


def _flat_index(index: pd.Series, shape: tuple[int, ...]) -> np.ndarray:
    if not shape:
        return np.zeros(len(index), np.int64)
    known = [(0,) * len(shape) if at is None else at for at in index]  # None: and then no place is asked for
    return np.ravel_multi_index(tuple(np.asarray(known, np.int64).T), shape).astype(np.int64)


def _key(room: Workspace, partials: Tensor, values: Tensor, by: str) -> Tensor:
    """What is sorted by. Products in float64, as they are shown."""
    if by == "saliency":
        wide = room("key", partials, torch.float64).copy_(partials)
        return wide.mul_(room("other", values, torch.float64).copy_(values)).abs_()
    one = values if by == "value" else partials
    return torch.abs(one, out=room("key", one))
