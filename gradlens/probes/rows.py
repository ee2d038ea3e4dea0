"""Tables that a batch looks up in a few rows: their gradients, moves and products are kept for those rows alone.

    loss(table) = loss(table[rows])        so the gradient is 0 in all other rows, and the Hessian too

An embedding with `sparse=True` gives a sparse gradient, and nothing as large as the table need be made of it. `Rows` says
which entries of a parameter a batch reaches: those of some rows, or all. What holds one value for each of them is *compact*:
a tensor `[rows, ...]`, or one of the parameter's own shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of a parameter a batch reaches, in ascending order; None: all of it."""

    index: Tensor | None
    shape: torch.Size  #: of the whole parameter

    @classmethod
    def of(cls, gradient: Tensor | None, weight: Tensor) -> Rows:
        """Those that a gradient has entries in."""
        if gradient is None or not gradient.is_sparse or gradient.sparse_dim() != 1:
            return cls(None, weight.shape)
        return cls(gradient.coalesce().indices()[0].clone(), weight.shape)

    def compact(self, whole: Tensor) -> Tensor:
        """The part of a tensor of the parameter's shape; the tensor itself where that is all of it."""
        return whole if self.index is None else whole[self.index]

    def gradient(self, gradient: Tensor | None, weight: Tensor) -> Tensor:
        """A gradient, compact; zeros for None."""
        if gradient is None:
            return torch.zeros_like(self.compact(weight.detach()))
        gradient = gradient.detach()
        if self.index is None:
            return gradient.to_dense() if gradient.is_sparse else gradient
        if not gradient.is_sparse:
            return gradient[self.index]
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        if torch.equal(rows, self.index):
            return values
        found = values.new_zeros((len(self.index), *self.shape[1:]))
        at = torch.searchsorted(self.index, rows).clamp(max=len(self.index) - 1)
        known = self.index[at] == rows
        found[at[known]] = values[known]
        return found

    @torch.no_grad()
    def write(self, weight: Tensor, compact: Tensor) -> None:
        """Put compact values into the parameter."""
        if self.index is None:
            weight.copy_(compact)
        else:
            weight[self.index] = compact

    def whole(self, compact: Tensor) -> Tensor:
        """A tensor of the parameter's shape, with zeros in the other rows."""
        if self.index is None:
            return compact
        made = compact.new_zeros(self.shape)
        made[self.index] = compact
        return made

    def flat(self) -> np.ndarray | None:
        """The flat index in the parameter of each compact entry; None for all."""
        if self.index is None:
            return None
        width = self.shape[1:].numel()
        return (self.index.cpu().numpy()[:, None] * width + np.arange(width)).reshape(-1)

    def entry(self, compact: Tensor, flat: int) -> float:
        """The value at a flat index of the parameter; 0 in the other rows."""
        if self.index is None:
            return compact.reshape(-1)[flat].item()
        row, column = divmod(flat, self.shape[1:].numel())
        at = int(torch.searchsorted(self.index, row))
        there = at < len(self.index) and int(self.index[at]) == row
        return compact[at].reshape(-1)[column].item() if there else 0.0

    def without(self, declared: range) -> Tensor | slice:
        """Where compact values lie in a range of flat indices: what is 0 by declaration, as a padding row."""
        if self.index is None:
            return slice(declared.start, declared.stop)
        width = self.shape[1:].numel()
        return (self.index.repeat_interleave(width) == declared.start // max(width, 1)) & (len(declared) > 0)


def flat_indices(rows: Sequence[Rows]) -> tuple[np.ndarray | None, ...]:
    """Of several parameters."""
    return tuple(one.flat() for one in rows)
