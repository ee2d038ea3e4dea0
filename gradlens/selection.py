"""Which parameters: glob patterns on names, or a callable `(name, tensor) -> bool`.

A name is chosen when a pattern matches it (or there are only `!` patterns) and no `!` pattern does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from gradlens.errors import ArgumentError, ArgumentTypeError, nearest

Select = str | Sequence[str] | Callable[[str, Any], bool] | None
Predicate = Callable[[str, Any], bool]


def predicate(select: Select) -> Predicate:
    """The test that a selection stands for."""
    if select is None:
        return lambda name, tensor: True
    if callable(select):
        return select
    patterns = _patterns(select)
    wanted = [p for p in patterns if not p.startswith("!")]
    refused = [p[1:] for p in patterns if p.startswith("!")]

    def chosen(name: str, tensor: Any) -> bool:
        return (not wanted or any(fnmatchcase(name, p) for p in wanted)) and not any(fnmatchcase(name, p) for p in refused)

    return chosen


def check(select: Select, named: Mapping[str, Any]) -> None:
    """Raise when a pattern matches none of the names, or all patterns together leave none."""
    if not callable(select) and select is not None:
        for pattern in _patterns(select):
            if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in named):
                raise ArgumentError(f"select pattern {pattern!r} matches no parameter{nearest(pattern.strip('!*'), named)}")
    test = predicate(select)
    if not any(test(name, tensor) for name, tensor in named.items()):
        raise ArgumentError(f"select={select!r} leaves none of the {len(named)} parameters; loosen it")


def _patterns(select: str | Sequence[str]) -> list[str]:
    patterns = [select] if isinstance(select, str) else list(select) if isinstance(select, Sequence) else []
    if not patterns or not all(isinstance(p, str) for p in patterns):
        raise ArgumentTypeError(
            f"select is a glob pattern, a list of them, or a callable (name, tensor) -> bool, not {select!r}"
        )
    return patterns
