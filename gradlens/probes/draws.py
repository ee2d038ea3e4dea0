"""The random numbers that a loss draws, so that two evaluations draw the same.

    rewind()                   the next evaluation draws what the first one drew
    states = state()           ... put_back(states): it draws what one drew after `state()`
    settle(states)             after an evaluation since `state()`: generators that it left alone count no more

To read and to set all generators of a process takes longer than many a loss does; most losses draw nothing. Until `settle`
each generator counts. A generator of the user's own, which cannot be compared, always counts, and torch's with it.
"""

from __future__ import annotations

from typing import Any

from gradlens.probes.untouched import (
    ProcessState,
    drawn_since,
    randomness,
    set_randomness,
    set_torch_randomness,
    torch_drawn_since,
    torch_randomness,
)

States = tuple[Any, ...]  #: of all generators, of torch's alone, or of none


class Draws:
    """Which generators a loss draws from, as far as was seen."""

    def __init__(self) -> None:
        self._others = True  # numpy's or Python's generator
        self._torch = True

    def begin(self, start: ProcessState, own: bool) -> None:
        """`rewind` goes back to this state. `own`: the loss reaches generators of its own."""
        self._start, self._own = start, own

    def rewind(self) -> None:
        """Set the random states back to those of the start: the next evaluation draws the same numbers."""
        if self._torch or self._others:
            self._start.rewind(self._others)

    def state(self) -> States:
        """The random states now, of the generators that the loss draws from."""
        if self._others:
            return randomness()
        return (torch_randomness(),) if self._torch else ()

    def put_back(self, states: States) -> None:
        """Set them back: the next evaluation draws the same numbers."""
        if states:
            set_randomness(states) if len(states) > 1 else set_torch_randomness(*states)

    def settle(self, states: States | None = None) -> None:
        """After one evaluation from `state()`, or from the start: see which generators it drew from."""
        states = self._start.random if states is None else states
        self._others = drawn_since(states)
        self._torch = self._own or torch_drawn_since(states)
