"""`allow=`: what is meant to differ from the derivative of the loss, and is no error.

- `"detach"`: what the loss cuts off (`detach()`, `.data`, `no_grad()`) is held at its value while weights are moved. A
  straight-through estimator, a stopped gradient, a bootstrapped target are then judged by what their author means.
- a pattern of names (`"encoder.*"`): the partials of these parameters need not be those of the loss, as below an
  `autograd.Function` whose backward is an estimate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from gradlens.errors import ArgumentError, ArgumentTypeError, nearest
from gradlens.selection import Select, predicate

DETACH = ("detach", "straight-through")  #: both words hold what is cut off


@dataclass(frozen=True)
class Allowed:
    """What was given as `allow`."""

    given: tuple[str, ...] = ()

    @property
    def cuts(self) -> bool:
        """Whether cut off values are held."""
        return any(word in DETACH for word in self.given)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Of names."""
        return tuple(word for word in self.given if word not in DETACH)

    def covers(self, name: str) -> bool:
        """Whether a parameter is among those that are allowed."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def left_out(self, select: Select) -> Select:
        """The selection without them."""
        if not self.patterns:
            return select
        chosen = predicate(select)

        def others(name: str, tensor: Any) -> bool:
            return chosen(name, tensor) and not self.covers(name)

        return others

    def check(self, names: Iterable[str]) -> None:
        """Raise for a pattern that matches nothing."""
        names = list(names)
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ArgumentError(
                    f"allow={pattern!r} matches no parameter{nearest(pattern.strip('*'), names)} (or give 'detach')"
                )


def parse_allowed(allow: str | Sequence[str] | None) -> Allowed:
    """The words and patterns of `allow`."""
    if allow is None:
        return Allowed()
    words = (allow,) if isinstance(allow, str) else tuple(allow) if isinstance(allow, Sequence) else (allow,)
    if not all(isinstance(word, str) for word in words):
        raise ArgumentTypeError(
            f"allow is 'detach', a pattern of names such as 'encoder.*', or a list of them, not {allow!r}"
        )
    return Allowed(words)
