"""The moments that came together, in their order, as arrays: which block each is in, and where.

    number [m]      of its block, in the order in which blocks begin
    place [m]       in that block
    step, time, backward [m]

The moments of a block are all of it, in order; those of several blocks may alternate. To whoever wants one moment after the
other, these are a sequence of `(block, place)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np

from gradlens.blocks import Block, concatenate, grouped

Moment = tuple[Block, int]  #: a block, and a place in it


class Moments(Sequence[Moment]):
    """Moments of some blocks. A slice is of the same blocks."""

    def __init__(self, blocks: Sequence[Block], number: np.ndarray, place: np.ndarray) -> None:
        self.blocks = list(blocks)
        self.number, self.place = number, place

    def __len__(self) -> int:
        return len(self.number)

    @overload
    def __getitem__(self, at: int) -> Moment: ...

    @overload
    def __getitem__(self, at: slice) -> Moments: ...

    def __getitem__(self, at: int | slice) -> Moment | Moments:
        if isinstance(at, slice):
            whole = at.start in (None, 0) and at.step in (None, 1) and (at.stop is None or at.stop >= len(self))
            return self if whole else Moments(self.blocks, self.number[at], self.place[at])
        return self.blocks[self.number[at]], int(self.place[at])

    def __iter__(self) -> Iterator[Moment]:
        return zip(map(self.blocks.__getitem__, self.number.tolist()), self.place.tolist(), strict=True)

    def by_block(self) -> Iterator[tuple[Block, np.ndarray]]:
        """Each block that has some of them, and which of the moments these are."""
        for number, block in enumerate(self.blocks):
            own = np.flatnonzero(self.number == number)
            if len(own):
                yield block, own

    def gather(self, name: str) -> np.ndarray:
        """`[m]` what each moment's block has of it under this name: `step`, `backward` or `time`."""
        result = np.zeros(len(self), np.float64 if name == "time" else np.int64)
        for block, own in self.by_block():
            result[own] = getattr(block, name)[self.place[own]]
        return result

    @cached_property
    def step(self) -> np.ndarray:
        """`[m]` int64."""
        return self.gather("step")

    @cached_property
    def time(self) -> np.ndarray:
        """`[m]` seconds since the epoch."""
        return self.gather("time")

    @cached_property
    def backward(self) -> np.ndarray:
        """`[m]` int64."""
        return self.gather("backward")


def as_moments(moments: Iterable[Moment]) -> Moments:
    """The same moments as arrays."""
    if isinstance(moments, Moments):
        return moments
    numbers: dict[int, int] = {}
    blocks: list[Block] = []
    number: list[int] = []
    place: list[int] = []
    for block, at in moments:
        known = numbers.setdefault(id(block), len(blocks))
        if known == len(blocks):
            blocks.append(block)
        number.append(known)
        place.append(at)
    return Moments(blocks, np.array(number, np.int64), np.array(place, np.int64))


def together(parts: Sequence[Moments]) -> Moments:
    """What came one after the other as if it had come at once: blocks of the same stage and parameters are one.

    Blocks end where `grouped` says, as if each of these had not ended.
    """
    if len(parts) == 1:
        return parts[0]
    kinds: list[tuple[int, int]] = []  # each block of each part, in the order of its first moment
    for at, part in enumerate(parts):
        kinds += [(at, number) for number in dict.fromkeys(part.number.tolist())]
    found = grouped([(block.stage, block.parameters) for at, number in kinds for block in [parts[at].blocks[number]]])
    members: list[list[Block]] = [[] for _ in range(max(found, default=-1) + 1)]
    place, number = [part.place.copy() for part in parts], [part.number.copy() for part in parts]
    for (at, old), new in zip(kinds, found, strict=True):
        own, block = parts[at].number == old, parts[at].blocks[old]
        place[at][own] += sum(map(len, members[new]))
        number[at][own] = new
        members[new].append(block)
    return Moments([concatenate(blocks) for blocks in members], np.concatenate(number), np.concatenate(place))
