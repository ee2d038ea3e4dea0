"""From what rules say at each snapshot to what a person should hear: what is new.

A rule repeats itself while an illness lasts. A finding is handed on when its rule and parameter were not ill before, or when
its severity rose. An illness is over when the rule has kept silent about it for `HEALED` observed steps on every stage where
it had spoken, and twice as long each time it comes back: a value that sways around a threshold is a few findings and not
many.

When one rule finds more than `FLOOD` parameters at once, they become one finding that says how many, and names the first in
model order. A rule that raises is named once and asked no more.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from gradlens.analysis.history import History
from gradlens.analysis.rules.base import Rule
from gradlens.errors import GradlensWarning
from gradlens.records import Finding, Severity, Snapshot

HEALED = 10
FLOOD = 8
NAMED = 4  #: how many parameters a merged finding names

Key = tuple[str, str | None]


@dataclass(eq=False)
class _Silence:
    """On one stage: the step last looked at, and for how many steps before it the rule has been silent."""

    step: int
    steps: int = 0


@dataclass(eq=False)
class _Illness:
    """A rule and a parameter, while it lasts."""

    severity: Severity
    patience: int
    silence: dict[str, _Silence] = field(default_factory=dict)  #: by stage

    def over(self, newest: Snapshot) -> bool:
        """Take note that the rule kept silent at this snapshot."""
        silence = self.silence.get(newest.stage)
        if silence is not None and silence.step != newest.step:
            silence.step, silence.steps = newest.step, silence.steps + 1
            if silence.steps >= self.patience:
                del self.silence[newest.stage]
        return not self.silence


@dataclass(eq=False)
class _Asked:
    """A rule, and what it has said that is not over."""

    rule: Rule
    ill: dict[Key, _Illness] = field(default_factory=dict)


class Diagnosis:
    """The rules, and what they have found so far; called after each append, from one thread."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._asked = [_Asked(rule) for rule in rules]
        self._times: dict[Key, int] = {}  # how often it was reported

    def __call__(self, history: History) -> list[Finding]:
        """The findings that are new with the newest snapshot, worst first."""
        newest = history.latest()
        if newest is None:
            return []
        new: list[Finding] = []
        for asked in list(self._asked):
            try:
                found = _checked(asked.rule(history))
            except Exception as error:  # noqa: BLE001 - a user's rule may raise anything; training and the other rules go on
                self._asked.remove(asked)
                new.append(_switched_off(asked.rule, error, newest))
            else:
                if found or asked.ill:
                    new += _merged(self._new(asked.ill, found, newest), newest)
        return sorted(new, key=lambda finding: -finding.severity.rank)

    def _new(self, ill: dict[Key, _Illness], found: Sequence[Finding], newest: Snapshot) -> list[Finding]:
        new, spoken = [], set()
        for finding in found:
            key = (finding.rule, finding.parameter)
            spoken.add(key)
            illness = ill.get(key)
            if illness is None:
                times = self._times[key] = self._times.get(key, 0) + 1
                illness = ill[key] = _Illness(finding.severity, HEALED * 2 ** (times - 1))
                new.append(finding)
            elif finding.severity.rank > illness.severity.rank:
                illness.severity = finding.severity
                new.append(finding)
            illness.silence[newest.stage] = _Silence(newest.step)
        for key in [key for key in ill if key not in spoken]:
            there = key[1] is None or key[1] in newest.parameters.position
            if there and ill[key].over(newest):
                del ill[key]
        return new


def _switched_off(rule: Rule, error: Exception, newest: Snapshot) -> Finding:
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({last[0].filename}, line {last[0].lineno})" if last else ""
    with contextlib.suppress(Exception):  # warnings may be turned into errors, and this is not the user's thread
        text = f"the rule {named(rule)} raised {what}{where}; it is switched off, training goes on"
        warnings.warn(GradlensWarning(text), stacklevel=3)
    return Finding(
        rule=named(rule),
        step=newest.step,
        severity=Severity.WARNING,
        stage=newest.stage,
        seen=f"the rule itself raised {what}{where}; it is switched off",
        causes=("a mistake in the rule", "a history that it did not reckon with, such as a model that changed"),
        remedy="mend the rule: it is called with the history and yields gradlens.Finding",
    )


def named(rule: Rule) -> str:
    """A rule's name: of its findings, of its function, or of its class."""
    for name in (getattr(rule, "name", None), getattr(rule, "__name__", None)):
        if isinstance(name, str):
            return name
    return type(rule).__name__


def _checked(found: Iterable[Finding] | None) -> list[Finding]:
    """What a rule gave, as a list; a rule that finds nothing may return None."""
    if isinstance(found, Finding):
        raise TypeError("a rule yields findings, or returns a list of them, and not a single one")
    result = [] if found is None else list(found)
    for finding in result:
        if not isinstance(finding, Finding):
            raise TypeError(f"a rule yields gradlens.Finding, not {type(finding).__name__}")
    return result


def _merged(new: Sequence[Finding], newest: Snapshot) -> list[Finding]:
    """The same, with more than `FLOOD` parameters of one rule and severity as one finding."""
    groups: dict[tuple[str, Severity, bool], list[Finding]] = {}
    for finding in new:
        groups.setdefault((finding.rule, finding.severity, finding.parameter is None), []).append(finding)
    result: list[Finding] = []
    for (_, _, whole), group in groups.items():
        result += group if whole or len(group) <= FLOOD else [_together(group, newest)]
    return result


def _together(group: Sequence[Finding], newest: Snapshot) -> Finding:
    order = _order(newest)
    first, *_ = group = sorted(group, key=order)
    names = ", ".join(str(finding.parameter) for finding in group[:NAMED])
    return replace(
        first,
        parameter=None,
        seen=f"{len(group)} of {len(newest)} parameters: {names} and {len(group) - NAMED} more; of the first: {first.seen}",
        value=float(len(group)),
        parameters=tuple(str(finding.parameter) for finding in group),
    )


def _order(newest: Snapshot) -> Callable[[Finding], int]:
    position = newest.parameters.position
    return lambda finding: position.get(str(finding.parameter), len(position))
