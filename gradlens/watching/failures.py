"""Failures of gradlens itself: none reaches the training loop, each is named once."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

from gradlens import findings
from gradlens.errors import GradlensWarning
from gradlens.records import Finding

#: Faults in a row after which a part is left out for a while. One may be chance; three are a cause that would repeat.
FAULTS = 3
#: Calls for which it is left out then. Each fault that follows doubles it, up to the second number.
PAUSE, LONGEST = 8, 4096


class Failures:
    """What went wrong on our side: counted, named once, and left out while it fails."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._in_a_row: dict[str, int] = {}
        self._left_out: dict[str, int] = {}  # calls that are still to be left out
        self.findings: list[Finding] = []
        self.step: Callable[[], int] = lambda: 0
        self.any = False  #: whether anything failed and has not worked since, or is left out

    def __call__(self, where: str, error: BaseException) -> None:
        count = self.counts[where] = self.counts.get(where, 0) + 1
        self.any = True
        row = self._in_a_row[where] = self._in_a_row.get(where, 0) + 1
        if row >= FAULTS:
            self._left_out[where] = min(PAUSE << (row - FAULTS), LONGEST)
        if count == 1:
            text = f"{where}: {type(error).__name__}: {error}"
            self.findings.append(findings.fault(self.step(), text))
            with contextlib.suppress(Exception):  # warnings may be turned into errors; not in a training step
                warnings.warn(GradlensWarning(f"gradlens failed in {text}; training goes on"), stacklevel=2)

    def lately(self, parts: frozenset[str]) -> bool:
        """Whether one of these failed, and has not worked since."""
        return not self._in_a_row.keys().isdisjoint(parts)

    def worked(self, where: str) -> None:
        """This part did what it should."""
        self._in_a_row.pop(where, None)
        self.any = bool(self._in_a_row or self._left_out)

    def off(self, where: str) -> bool:
        """Whether this part has failed too often in a row, and is left out of this call."""
        left = self._left_out.get(where, 0)
        if left:
            self._left_out[where] = left - 1
        return left > 0
