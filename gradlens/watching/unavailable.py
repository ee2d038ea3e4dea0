"""What was asked for and cannot be had here: findings at the start of a run, where columns would stay empty without a word.

Only what follows from the arguments is said here. What shows in training (a backward that averaged nothing, a closure that
moves the weights) is a finding where it shows.
"""

from __future__ import annotations

from collections.abc import Collection

from gradlens import findings
from gradlens.records import Finding, Stage
from gradlens.statistics.memory import Plan


def unavailable(stages: Collection[str], features: Collection[str], plan: Plan, ranks: int, step: int) -> list[Finding]:
    """The findings; none where everything can be had. The plan is that of the features' buffers."""

    read = ", ".join(stage for stage in Stage if stage in stages)
    found = []
    if "evidence" in features and Stage.BACKWARD not in stages:
        found.append(findings.evidence_unavailable(step, read))
    if "updates" in features and Stage.USED not in stages:
        found.append(findings.updates_unavailable(step, read))
    if plan.needed and not plan.taken:
        found.append(findings.no_memory(step, plan.what, plan.needed))
    if Stage.REDUCED in stages and ranks == 1:
        found.append(findings.reduced_unavailable(step))
    return found
