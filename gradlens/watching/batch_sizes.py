"""How many examples each backward of a step had, as the user tells it, and what stands in the record for all of them."""

from __future__ import annotations

from typing import Any

from gradlens.noise import effective_size


class BatchSizes:
    """The sizes that were told for the backwards of one step."""

    def __init__(self) -> None:
        self._step = -1
        self._sizes: list[float] = []

    def add(self, step: int, size: Any) -> Any:
        """One more of this step: the size that stands for all of them, the harmonic mean where they are unequal.

        What is no number is given back as it is, for the caller to refuse.
        """
        if not isinstance(size, int | float):
            return size
        if step != self._step:
            self._step, self._sizes = step, []
        self._sizes.append(size)
        unequal = len(set(self._sizes)) > 1 and all(each > 0 for each in self._sizes)
        return effective_size(self._sizes) if unequal else size
