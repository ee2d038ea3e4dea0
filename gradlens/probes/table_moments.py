"""Moments of gradients of which some are sparse: a table's rows are brought up to date when a batch looks them up.

In a batch of weight W - W0 that does not look up a row, its partials are 0, and Welford's update has a closed form:

    mean' = mean W0 / W,    squares' = squares + mean^2 W0 (W - W0) / W

So a batch costs as much as the rows that it looks up, however large the table; `settle` brings all rows up to date at the
end. The moments are those of `statistics.evidence.Moments`, in whose tensors they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradlens.statistics.evidence import Moments, chunks


class TableMoments:
    """`moments`, given gradients that may be sparse."""

    def __init__(self, moments: Moments, weights: Sequence[Tensor]) -> None:
        self.moments = moments
        self._weights = weights
        self._lazy: dict[int, _LazyRows] = {}

    def update(self, gradients: Sequence[Tensor | None], weight: float) -> None:
        """Add one gradient; a parameter that was sparse once counts as a table from then on."""
        before = self.moments.weight
        self.moments.begin(weight)
        dense: dict[int, Tensor | None] = {}
        for n, gradient in enumerate(gradients):
            table = self._table(n, gradient, before)
            if table is None:
                dense[n] = gradient
            elif gradient is not None:
                table.add(gradient, before, self.moments.weight)
        self.moments.add(dense)

    def _table(self, n: int, gradient: Tensor | None, before: float) -> _LazyRows | None:
        if n not in self._lazy and is_table(gradient):
            self._lazy[n] = _LazyRows(self.moments, n, self._weights[n], before)
        return self._lazy.get(n)

    def settle(self) -> Moments:
        """The moments, all of them up to date."""
        for table in self._lazy.values():
            table.settle(self.moments.weight)
        return self.moments


def is_table(gradient: Tensor | None) -> bool:
    """Whether a gradient has entries in some rows alone."""
    return gradient is not None and gradient.is_sparse and gradient.sparse_dim() == 1 and not gradient.is_complex()


class _LazyRows:
    """The moments of one table as rows; of a sample of its weights, each of them is a row of one entry."""

    def __init__(self, moments: Moments, n: int, weight: Tensor, before: float) -> None:
        block, at = moments.place(n)
        self._index = moments.indices[n]
        self._width = weight[0].numel() if len(weight) else 1
        shape = (-1, self._width) if self._index is None else (-1, 1)
        parts = (moments.mean, moments.squares, moments.positive, moments.negative)
        self.mean, self.squares, self.positive, self.negative = (part[block][at].view(shape) for part in parts)
        self._upto = torch.full((len(self.mean), 1), before, dtype=torch.float64, device=weight.device)

    def add(self, gradient: Tensor, before: float, now: float) -> None:
        """One more gradient, whose batch takes the weight from `before` to `now`."""
        rows, g = self._entries(gradient)
        mean, squares = self._brought(rows, before)
        step = g - mean
        mean = mean + step * ((now - before) / now)
        self.mean[rows], self.squares[rows] = mean, squares + (now - before) * step * (g - mean)
        self.positive[rows] += (g > 0).int()
        self.negative[rows] += (g < 0).int()
        self._upto[rows] = now

    def _entries(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that a gradient has entries in, and these in float64."""
        if not gradient.is_sparse:  # another batch's was
            whole = gradient.reshape(-1) if self._index is None else gradient.reshape(-1)[self._index]
            return torch.arange(len(self.mean), device=gradient.device), whole.view(self.mean.shape).double()
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values().reshape(-1, self._width).double()
        if self._index is None or not len(rows):
            return (rows, values) if self._index is None else (rows, values.new_zeros(0, 1))
        wanted = self._index // self._width
        found = torch.searchsorted(rows, wanted).clamp(max=len(rows) - 1)
        (here,) = torch.nonzero(rows[found] == wanted, as_tuple=True)
        return here, values[found[here], (self._index % self._width)[here]].unsqueeze(1)

    def _brought(self, rows: Tensor | slice, now: float) -> tuple[Tensor, Tensor]:
        """Mean and squares of some rows with the batches since they were last met, whose partials there were 0."""
        mean, upto = self.mean[rows], self._upto[rows]
        kept = upto / now if now else upto
        return mean * kept, self.squares[rows] + mean.square() * (kept * (now - upto))

    def settle(self, now: float) -> None:
        """All rows."""
        for rows in chunks(self._upto):
            self.mean[rows], self.squares[rows] = self._brought(rows, now)
            self._upto[rows] = now
