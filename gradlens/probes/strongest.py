"""The k weights of the largest |partial| among all of a model, in memory for a few times k."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradlens.errors import ArgumentError
from gradlens.statistics.evidence import chunks, reals


def check_top(top: object, sample: object) -> None:
    """Raise for what is no number of weights, and for two ways to choose them."""
    if top is None:
        return
    if sample is not None:
        raise ArgumentError("give sample= or top=, not both: one spreads evenly, the other takes the largest partials")
    if isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 1:
        raise ArgumentError(f"top is how many of the most sensitive weights to survey, from 1 up, not {top!r}")


def strongest(gradient: Sequence[Tensor | None], like: Sequence[Tensor], k: int) -> list[np.ndarray]:
    """Sorted flat indices of those weights, an array a parameter. None in `gradient` stands for zeros; NaN counts as 0."""
    kept = _Kept(k)
    for i, (g, w) in enumerate(zip(gradient, like, strict=True)):
        if g is not None and g.is_sparse and g.sparse_dim() == 1:
            kept.take_rows(i, g.coalesce())
            continue
        flat = reals(w.new_zeros(()).expand_as(w) if g is None else g)
        for part in chunks(flat):
            kept.take(i, part.start, flat[part].detach().abs().nan_to_num(nan=0.0, posinf=torch.inf))
    return kept.of(len(like))


class _Kept:
    """The candidates so far. What is not above the k-th of them is no candidate."""

    def __init__(self, k: int) -> None:
        self._k, self._floor = k, -1.0
        self._size: np.ndarray = np.empty(0)
        self._parameter: np.ndarray = np.empty(0, np.int32)
        self._index: np.ndarray = np.empty(0, np.int64)

    def take_rows(self, parameter: int, gradient: Tensor) -> None:
        """Of a table: the rows that it has entries in; those in others are 0, and no candidates."""
        rows, values = gradient.indices()[0], reals(gradient.values()).view(gradient.indices().shape[1], -1)
        width = values.shape[1]
        flat = rows.unsqueeze(1) * width + torch.arange(width, device=rows.device)
        size = values.detach().abs().nan_to_num(nan=0.0, posinf=torch.inf)
        self.take(parameter, flat.reshape(-1), size.reshape(-1))

    def take(self, parameter: int, places: int | Tensor, size: Tensor) -> None:
        """Entries that follow each other from a place on, or that have a place each."""
        at = (size > self._floor).nonzero().squeeze(1)
        index = places[at] if isinstance(places, Tensor) else places + at
        self._size = np.concatenate([self._size, size[at].double().cpu().numpy()])
        self._index = np.concatenate([self._index, index.cpu().numpy()])
        self._parameter = np.concatenate([self._parameter, np.full(len(at), parameter, np.int32)])
        if len(self._size) > 2 * self._k:
            self._cut()

    def _cut(self) -> None:
        if len(self._size) > self._k:
            chosen = np.argpartition(-self._size, self._k - 1)[: self._k]
            self._size, self._parameter, self._index = self._size[chosen], self._parameter[chosen], self._index[chosen]
            self._floor = float(self._size.min())

    def of(self, parameters: int) -> list[np.ndarray]:
        self._cut()
        return [np.sort(self._index[self._parameter == i]) for i in range(parameters)]
