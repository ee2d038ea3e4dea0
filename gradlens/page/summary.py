"""What every view of a run begins with: its size, its losses, its findings, and its newest steps as rules see them.

Read without pandas and without torch, so that a command answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gradlens.analysis.history import History
from gradlens.records import Finding, Severity, Snapshot
from gradlens.store import rows
from gradlens.store.run import Run

STEPS = 64  #: of the newest that a summary has in full
ROWS = 100_000  #: of history that it holds at most
KEPT = 24  #: steps of those that kept their most sensitive weights


@dataclass(frozen=True, eq=False)
class Summary:
    """A run at the moment it was read."""

    run: Run
    steps: Sequence[int]
    losses: Mapping[int, float]  #: by step, of the whole run
    findings: Sequence[Finding]

    @classmethod
    def of(cls, run: Run) -> Summary:
        """Read it."""
        steps, values = run.scalar("loss")
        known = np.isfinite(values) | np.isinf(values)
        losses = dict(zip(steps[known].tolist(), values[known].tolist(), strict=True))
        return cls(run, run.steps(), losses, run.findings())

    @cached_property
    def history(self) -> History:
        """The newest steps; empty while nothing was recorded."""
        found = History()
        count = max(2, min(STEPS, ROWS // max(4 * len(self.run.names()), 1)))
        for snapshot in self.run.snapshots(steps=self.steps[-count:]) if self.steps else ():
            found.append(snapshot)
        return found

    @cached_property
    def diagnosis(self) -> Any:
        """What came first, and what follows from it."""
        return self.run.diagnosis()

    def weights(self) -> list[Snapshot]:
        """The newest snapshots whose most sensitive weights were kept, oldest first."""
        steps = rows.steps(self.run.path, "weights", None)
        count = max(1, min(KEPT, ROWS // max(32 * len(self.run.names()), 1)))
        return self.run.snapshots(steps=steps[-count:]) if steps else []

    @property
    def overhead(self) -> str:
        """What watching cost, in words; empty where it was not recorded."""
        said = self.run.settings.get("overhead", "")
        return said if isinstance(said, str) else ""

    def worst(self) -> Severity | None:
        """The severity of the worst finding."""
        return max((finding.severity for finding in self.findings), key=lambda severity: severity.rank, default=None)

    def text(self) -> str:
        """The page of plain text."""
        from gradlens.writers import report

        title = f"gradlens: {self.run.path}"
        return report.text(
            self.history,
            self.findings,
            overhead=self.overhead,
            title=title,
            steps=self.steps,
            losses=self.losses,
            diagnosis=self.diagnosis,
        )

    def brief(self, more: str) -> str:
        """Its first lines, and `more` as the last one."""
        from gradlens.writers import report

        told = {"steps": self.steps, "losses": self.losses, "diagnosis": self.diagnosis}
        return report.brief(self.history, self.findings, more=more, **told)


def as_json(finding: Finding) -> dict[str, Any]:
    """A finding as JSON writes it."""
    names = ("rule", "step", "severity", "parameter", "seen", "causes", "remedy", "stage", "value", "parameters")
    return {name: list(value) if isinstance(value := getattr(finding, name), tuple) else value for name in names}
