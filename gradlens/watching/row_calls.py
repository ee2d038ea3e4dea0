"""What gradients that are read inside hooks are read with: a call for each parameter, prepared once.

A reading of one parameter costs mostly what it takes to ask tensors where they are. A call knows the copy of the last
gradient, and asks of the weight only whether it is where it was. It keeps no parameter alive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradlens import kernels
from gradlens.kernels.tensors import PLAIN
from gradlens.records import Parameters
from gradlens.statistics.buffers import Buffer
from gradlens.statistics.table import Piece


class RowCalls:
    """The calls of one model's parameters, by row."""

    def __init__(self) -> None:
        self._parameters: Parameters | None = None
        self._calls: dict[tuple[int, int], tuple[Tensor | None, kernels.RowCall]] = {}
        self._rooms = kernels.RowRooms()

    def read(
        self, parameters: Parameters, row: int, gradient: Tensor, weight: Tensor, last: Buffer | None, detail: bool
    ) -> Tensor | None:
        """The gradient's row, compared with what `last` has of it; None, and nothing done, where another way serves."""
        if parameters is not self._parameters:
            self._parameters, self._calls = parameters, {}
        previous = None if last is None else last.get(row)
        if type(weight) not in PLAIN or (last is not None and (previous is None or not last.whole(row))):
            return None
        known = self._calls.get((id(last), row))
        if known is None or known[0] is not previous:
            call = kernels.prepare_row(weight, previous, self._rooms)
            if call is None:
                return None
            known = self._calls[id(last), row] = previous, call
        return known[1].read(gradient, weight, detail)


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """One piece in place of many of one row each, in the model's order: whoever unpacks it has one thing to look at."""
    single = sorted((p for p in pieces if _is_single(p)), key=lambda piece: piece.rows[0])
    if len(single) < 2 or len({piece.numbers.shape[1] for piece in single}) > 1:
        return list(pieces)
    with torch.inference_mode(False), torch.no_grad():
        whole = Piece([piece.rows[0] for piece in single], torch.cat([piece.numbers for piece in single]))
    return [whole, *(piece for piece in pieces if not _is_single(piece))]


def _is_single(piece: Piece) -> bool:
    return len(piece.rows) == 1 and piece.numbers.is_cpu and piece.skipped is False and piece.divisor is None
