"""From what rules say at each snapshot to what a person should hear: what is new.

A rule repeats itself while an illness lasts. A finding is handed on when its rule and parameter were not ill before, or when
its severity rose. An illness is over when the rule has kept silent about it for `HEALED` observed steps on every stage where
it had spoken, and twice as long each time it comes back: a value that sways around a threshold is a few findings and not
many.

When one rule finds more than `FLOOD` parameters at once, they become one finding that says how many, and names the first in
model order. A rule that raises is named once and asked no more.

What is not handed on is not worded: of a model whose 2,000 parameters are ill at every step that would be most of the work.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from gradlens.analysis.history import History
from gradlens.analysis.rules.base import EachRow, Rule
from gradlens.errors import GradlensWarning
from gradlens.records import Finding, Severity, Snapshot

HEALED = 10
FLOOD = 8
NAMED = 4  #: how many parameters a merged finding names

Key = tuple[str, str | None]


class _Said(NamedTuple):
    """What a rule found, before it is worded: `word(of)` is the finding."""

    key: Key
    severity: Severity
    word: Callable[[Any], Finding]
    of: Any


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
    turn: int = 0  #: when the rule last spoke

    def spoken(self, newest: Snapshot, turn: int) -> None:
        """Take note that the rule spoke at this snapshot."""
        self.turn, silence = turn, self.silence.get(newest.stage)
        if silence is None:
            self.silence[newest.stage] = _Silence(newest.step)
        else:
            silence.step, silence.steps = newest.step, 0

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
        self._turn = 0  # how often the rules were asked

    def __call__(self, history: History) -> list[Finding]:
        """The findings that are new with the newest snapshot, worst first."""
        newest = history.latest()
        if newest is None:
            return []
        self._turn += 1
        new: list[Finding] = []
        for asked in list(self._asked):
            try:
                new += _merged(self._new(asked.ill, _said(asked.rule(history)), newest), newest)
            except Exception as error:  # noqa: BLE001 - a user's rule may raise anything; training and the other rules go on
                self._asked.remove(asked)
                new.append(_switched_off(asked.rule, error, newest))
        return sorted(new, key=lambda finding: -finding.severity.rank)

    def _new(self, ill: dict[Key, _Illness], found: Iterable[_Said], newest: Snapshot) -> list[_Said]:
        new, turn = [], self._turn
        for said in found:
            key, severity, _, _ = said
            illness = ill.get(key)
            if illness is None:
                times = self._times[key] = self._times.get(key, 0) + 1
                illness = ill[key] = _Illness(severity, HEALED * 2 ** (times - 1))
                new.append(said)
            elif severity is not illness.severity and severity.rank > illness.severity.rank:
                illness.severity = severity
                new.append(said)
            illness.spoken(newest, turn)
        for key, illness in [(key, illness) for key, illness in ill.items() if illness.turn != turn]:
            there = key[1] is None or key[1] in newest.parameters.position
            if there and illness.over(newest):
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


def _said(found: Iterable[Finding] | None) -> list[_Said]:
    """What a rule gave; a rule that finds nothing may return None."""
    if isinstance(found, EachRow):
        rule, severity, names, word = found.rule, found.severity, found.snapshot.names, found.finding
        return [_Said((rule, names[row]), severity, word, row) for row in found.rows]
    if isinstance(found, Finding):
        raise TypeError("a rule yields findings, or returns a list of them, and not a single one")
    result = []
    for finding in () if found is None else found:
        if not isinstance(finding, Finding):
            raise TypeError(f"a rule yields gradlens.Finding, not {type(finding).__name__}")
        result.append(_Said((finding.rule, finding.parameter), finding.severity, _itself, finding))
    return result


def _itself(finding: Finding) -> Finding:
    return finding


def _merged(new: Sequence[_Said], newest: Snapshot) -> list[Finding]:
    """Worded, with more than `FLOOD` parameters of one rule and severity as one finding."""
    groups: dict[tuple[str, Severity, bool], list[_Said]] = {}
    for said in new:
        rule, parameter = said.key
        groups.setdefault((rule, said.severity, parameter is None), []).append(said)
    result: list[Finding] = []
    for (_, _, whole), group in groups.items():
        one = not whole and len(group) > FLOOD
        result += [_together(group, newest)] if one else [said.word(said.of) for said in group]
    return result


def _together(group: Sequence[_Said], newest: Snapshot) -> Finding:
    position = newest.parameters.position
    group = sorted(group, key=lambda said: position.get(str(said.key[1]), len(position)))
    names, first = [str(said.key[1]) for said in group], group[0].word(group[0].of)
    return replace(
        first,
        parameter=None,
        seen=f"{len(names)} of {len(newest)} parameters: {', '.join(names[:NAMED])} and {len(names) - NAMED} more; of the "
        f"first: {first.seen}",
        value=float(len(names)),
        parameters=tuple(names),
    )
