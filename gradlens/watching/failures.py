"""Failures of gradlens itself: none reaches the training loop, each is named once."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

from gradlens.errors import GradlensWarning
from gradlens.records import Finding, Severity

#: Faults of ours after which the part at fault is left out. One may be chance; three in a row are a bug that would repeat.
FAULTS = 3


class Failures:
    """What went wrong on our side: counted, named once, and after some times switched off."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.findings: list[Finding] = []
        self.step: Callable[[], int] = lambda: 0

    def __call__(self, where: str, error: BaseException) -> None:
        count = self.counts[where] = self.counts.get(where, 0) + 1
        if count == 1:
            text = f"{where}: {type(error).__name__}: {error}"
            self.findings.append(
                Finding(
                    rule="gradlens-fault",
                    step=self.step(),
                    severity=Severity.WARNING,
                    seen=f"gradlens failed in {text}; training is not affected",
                    remedy="please report this with the traceback of gradlens' warning",
                )
            )
            with contextlib.suppress(Exception):  # warnings may be turned into errors; not in a training step
                warnings.warn(GradlensWarning(f"gradlens failed in {text}; training goes on"), stacklevel=2)

    def off(self, where: str) -> bool:
        """Whether this part has failed too often to be tried again."""
        return self.counts.get(where, 0) >= FAULTS
