"""What gradlens raises. Each message says what was given, what was expected, and what to do.

Nothing of this is raised inside a training step, but by the rule that the user asked for with `on_finding="raise"`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GradlensError(Exception):
    """The base of every error of gradlens."""


class ArgumentError(GradlensError, ValueError):
    """An argument has the right type and a wrong value."""


class ArgumentTypeError(GradlensError, TypeError):
    """An argument has a wrong type."""


class NothingCapturedError(GradlensError, RuntimeError):
    """A question about gradients before any backward was seen, or after they are gone."""


class ClosedError(GradlensError, RuntimeError):
    """A call that cannot work after `close()`."""


class StepError(GradlensError, RuntimeError):
    """`lens.step()` beside an optimizer, which already says where a step ends."""


class RunDirectoryError(GradlensError, OSError):
    """A run directory that cannot be used: not writable, in use, or not a run."""


class CorruptRunError(RunDirectoryError):
    """A run directory whose files do not read as what they should be."""


class ProbeError(GradlensError, RuntimeError):
    """A probe that cannot give a meaningful answer on this model and loss."""


class FindingError(GradlensError, RuntimeError):
    """Raised in the training thread when `on_finding="raise"` and a rule found something; `finding` is what."""

    def __init__(self, finding: object) -> None:
        super().__init__(str(finding))
        self.finding = finding


class GradlensWarning(UserWarning):
    """Something that the user should know, and that does not stop anything."""


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """`; did you mean 'a', 'b'?`, or the first known words when none is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=n, cutoff=0.4)
    if near:
        return f"; did you mean {', '.join(map(repr, near))}?"
    shown = ", ".join(map(repr, known[: 2 * n]))
    more = ", ..." if len(known) > 2 * n else ""
    return f"; there are: {shown}{more}" if known else ""


def choice(what: str, given: str, allowed: Iterable[str]) -> ArgumentError:
    """The error for a word that is not one of a few."""
    allowed = [str(word) for word in allowed]  # an enum's own `repr` is not what one would type
    return ArgumentError(f"{what} {given!r} is not one of {', '.join(map(repr, allowed))}{nearest(given, allowed)}")
