"""What was asked for and cannot be had here: findings at the start of a run, where columns would stay empty without a word.

Only what follows from the arguments is said here. What shows in training (a backward that averaged nothing, a closure that
moves the weights) is a finding where it shows.
"""

from __future__ import annotations

from collections.abc import Collection

from gradlens.records import Finding, Severity, Stage
from gradlens.statistics.memory import Plan


def unavailable(stages: Collection[str], features: Collection[str], plan: Plan, ranks: int, step: int) -> list[Finding]:
    """The findings; none where everything can be had. The plan is that of the features' buffers."""

    def finding(rule: str, severity: Severity, seen: str, cause: str, remedy: str, stage: str | None = None) -> Finding:
        return Finding(rule=rule, step=step, severity=severity, seen=seen, causes=(cause,), remedy=remedy, stage=stage)

    read = ", ".join(stage for stage in Stage if stage in stages)
    found = []
    if "evidence" in features and Stage.BACKWARD not in stages:
        found.append(
            finding(
                rule="evidence-unavailable",
                severity=Severity.WARNING,
                seen=f"`evidence` rests on each backward's own partials; the stages read are {read}",
                cause="stage= leaves them out, or there are several ranks, where `backward` is on request",
                remedy='add "backward" to stage=, or ask gradlens.survey()',
            )
        )
    if "updates" in features and Stage.USED not in stages:
        found.append(
            finding(
                rule="updates-unavailable",
                severity=Severity.INFO,
                seen=f"`updates` stand on the rows of stage `used`; the stages read are {read}, so those columns are empty",
                cause="stage= leaves it out",
                remedy='add "used" to stage=',
            )
        )
    if plan.needed and not plan.taken:
        found.append(
            finding(
                rule="memory",
                severity=Severity.WARNING,
                seen=f"memory= has no room for even one weight of each parameter: the columns of {plan.what} are empty",
                cause="memory= is 0, or very small",
                remedy=f"give memory= more, up to the {plan.needed:,} bytes of every weight; or features=() to do without",
            )
        )
    if Stage.REDUCED in stages and ranks == 1:
        found.append(
            finding(
                rule="reduced-unavailable",
                severity=Severity.INFO,
                seen="there is one process, and nothing to average over: `reduced` rows are this process's own `.grad`",
                cause="torch.distributed is not initialised, or was not when watch() was called",
                remedy="read `accumulated`, which is the same here, or call watch() after init_process_group()",
                stage=Stage.REDUCED.value,
            )
        )
    return found
