"""Numbers for each weight of several parameters: flat arrays, one entry a weight, and the tables made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.records import Parameters
from gradlens.weight_names import find_name, label, parse_weight

if TYPE_CHECKING:
    import pandas as pd

ROWS = 1_000_000  #: that a frame has at most


@dataclass(frozen=True, eq=False)
class PerWeight(ABC):
    """Entries for the weights of `parameters`, one parameter after another; all of them, or those of `index`."""

    parameters: Parameters
    index: tuple[np.ndarray | None, ...]  #: flat indices of the weights of each parameter; None: all of them
    value: np.ndarray  #: of the weights, float64

    def __len__(self) -> int:
        return len(self.value)

    @abstractmethod
    def columns(self, chosen: np.ndarray) -> dict[str, object]:
        """What the frame says of the given entries, besides `parameter, index, value`."""

    @abstractmethod
    def strength(self, chosen: np.ndarray) -> np.ndarray:
        """By what `top` chooses: the largest first; NaN is last."""

    @cached_property
    def frame(self) -> pd.DataFrame:
        """`weights()` of all."""
        return self.weights()

    def weights(self, name: str | None = None, *, top: int | None = None) -> pd.DataFrame:
        """One row a weight: `parameter, index, value`, and what is known of it.

        `name` restricts it to one parameter or one weight (`"fc1.weight[3, 7]"`), `top` to the strongest weights, in falling
        order. More than a million rows are an error that names both.
        """
        chosen = np.arange(len(self)) if name is None else self._chosen(name)
        if top is not None:
            strength = np.nan_to_num(self.strength(chosen), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
            chosen = chosen[np.argsort(-strength, kind="stable")[:top]]
        if len(chosen) > ROWS:
            raise ArgumentError(
                f"{len(chosen):,} rows are too many for one frame: ask for .weights(name) or .weights(top=1000), or read "
                f"the arrays of the result"
            )
        return self._rows(chosen)

    def span(self, name: str) -> np.ndarray:
        """The entries that belong to one parameter."""
        return np.arange(*self.bounds[self.parameters.position[find_name(name, self.parameters.names)]])

    def _chosen(self, name: str) -> np.ndarray:
        """The entries that are named: of a parameter, or of one weight, `fc1.weight[3, 7]`."""
        known, index = parse_weight(name, self.parameters.names)
        entries = self.span(known)
        if index is None:
            return entries
        shape = self.parameters.shapes[self.parameters.position[known]]
        if len(index) != len(shape) or not all(0 <= i < n for i, n in zip(index, shape, strict=True)):
            raise ArgumentError(f"{label(known, index)} is outside of {known!r}, whose shape is {shape}")
        return entries[self.places(entries)[1] == (np.ravel_multi_index(index, shape) if shape else 0)]

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """Where the entries of each parameter begin and end."""
        return list(pairwise(self._starts.tolist()))

    @cached_property
    def _starts(self) -> np.ndarray:
        numel = [int(np.prod(shape, dtype=np.int64)) for shape in self.parameters.shapes]
        counts = [n if at is None else len(at) for n, at in zip(numel, self.index, strict=True)]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def places(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The parameter of each of the given entries, and its flat index in that."""
        of = np.searchsorted(self._starts, chosen, side="right") - 1
        flat = chosen - self._starts[of]
        for i in np.unique(of):
            at = self.index[i]
            if at is not None:
                flat[of == i] = at[flat[of == i]]
        return of, flat

    def _rows(self, chosen: np.ndarray) -> pd.DataFrame:
        import pandas as pd

        of, flat = self.places(chosen)
        index = np.empty(len(chosen), object)
        for i in np.unique(of):
            mine = np.nonzero(of == i)[0]
            index[mine] = as_objects(unravelled(flat[mine], self.parameters.shapes[i]))
        return pd.DataFrame(
            {
                "parameter": pd.Series(np.array(self.parameters.names, object)[of], dtype="str"),
                "index": pd.Series(index, dtype=object),
                "value": self.value[chosen],
                **self.columns(chosen),
            }
        )


def unravelled(flat: np.ndarray, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Flat indices as tuples; `()` for a scalar."""
    if not shape:
        return [()] * len(flat)
    return list(zip(*(axis.tolist() for axis in np.unravel_index(flat, shape)), strict=True))


def as_objects(items: list[tuple[int, ...]]) -> np.ndarray:
    """An array whose entries are the tuples, not their numbers."""
    result = np.empty(len(items), object)
    result[:] = items
    return result


def sampled(numel: Sequence[int], sample: int | float | None) -> list[np.ndarray | None]:
    """Sorted flat indices for each parameter, one drawn from each of equal strata, by a fixed seed; None for all."""
    total = sum(numel)
    if sample is None or sample == total:
        return [None] * len(numel)
    if isinstance(sample, bool) or not isinstance(sample, int | float | np.integer | np.floating):
        raise ArgumentTypeError(f"sample is a number of weights (int) or a share of them (float), not {sample!r}")
    share = float(sample) if isinstance(sample, float | np.floating) else sample / max(total, 1)
    if share <= 0 or (share > 1 and isinstance(sample, float | np.floating)):
        raise ArgumentError(f"sample is a number of weights from 1 up, or a share in (0, 1], not {sample!r}")
    random = np.random.default_rng(0)
    return [None if share >= 1 else _strata(n, min(n, max(1, round(share * n))), random) for n in numel]


def _strata(numel: int, n: int, random: np.random.Generator) -> np.ndarray:
    edges = np.arange(n + 1, dtype=np.int64) * numel // max(n, 1)
    return edges[:-1] + (random.random(n) * np.diff(edges)).astype(np.int64)
