"""The rules, asked about all that has come, and what is new of what they say.

    blocks -> condition -> where it lasts -> findings at those moments -> what is new -> words

A rule repeats itself while an illness lasts. A finding is handed on when its rule and parameter were not ill before, or when
its severity rose. An illness is over when the rule has kept silent about it for `HEALED` observed steps on every stage where
it had spoken, and twice as long each time it comes back: a value that sways around a threshold is a few findings and not
many.

When one rule finds more than `FLOOD` parameters at once, they become one finding that says how many, and names the first in
model order. A rule that raises is named once and asked no more.

Moments count, and not blocks: the findings are the same however many moments are asked about at once. What is not handed on
is not worded: of a model whose 2,000 parameters are ill at every step that would be most of the work.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from gradlens.analysis.history import Columns, History, Moment, blocks_of
from gradlens.analysis.rules.base import ColumnRule, RowFindings, Rule
from gradlens.analysis.rules.occasional import Occasional
from gradlens.analysis.streaks import Streaks
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


class _SaidOfRows(list[_Said]):
    """What a rule says of some rows, each once: of those that it spoke of at the moment before, the same objects."""

    def __init__(self, found: RowFindings, before: Sequence[_Said]) -> None:
        rule, names, word = found.rule, found.snapshot.names, found.finding
        self._kind = rule, found.severity, names
        same = isinstance(before, _SaidOfRows) and before._kind == self._kind
        known: dict[int, _Said] = before._rows if same else {}  # type: ignore[attr-defined]
        severity, new = found.severity, tuple.__new__  # without a call of Python for each of thousands
        super().__init__(known.get(row) or new(_Said, ((rule, names[row]), severity, word, row)) for row in found.rows)
        self._rows = dict(zip(found.rows, self, strict=True))


_NOTHING: list[_Said] = []

#: What was said at each moment, by its number.
Spoken = dict[int, list[_Said]]


class RuleSet:
    """Called after history has grown, from one thread."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._asked = [_asked(rule) for rule in rules]
        self._last = -1  # the number of the last moment that the rules were asked about

    def __call__(self, history: History) -> list[Finding]:
        """The findings that are new with what has come since it was last called: by moment, the worst of each first."""
        return [finding for _, finding in self.ask(history)]

    def ask(self, history: History) -> list[tuple[int, Finding]]:
        """The same, with the number of the moment that each is of."""
        moments = history.since(self._last)
        if not moments:
            return []
        self._last = moments[-1].seq
        blocks = blocks_of(moments)
        return self._new(lambda asked: asked.new(history, blocks, moments), moments[-1])

    def last(self, history: History) -> list[Finding]:
        """What rules about the whole run find at its end."""
        newest = history.newest()
        if newest is None:
            return []
        return [finding for _, finding in self._new(lambda asked: asked.last(history, newest), newest)]

    def _new(
        self, ask: Callable[[_Asked], Iterable[tuple[Moment, list[_Said]]]], newest: Moment
    ) -> list[tuple[int, Finding]]:
        new: list[tuple[int, Finding]] = []
        for asked in list(self._asked):
            try:
                for moment, said in ask(asked):
                    new += [(moment.seq, finding) for finding in _merged(said, moment.snapshot)]
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                    raise
                self._asked.remove(asked)
                moment = asked.at or newest
                new.append((moment.seq, _switched_off(asked.rule, error, moment.snapshot)))
        return sorted(new, key=lambda each: (each[0], -each[1].severity.rank))


def _asked(rule: Rule) -> _Asked:
    if isinstance(rule, ColumnRule):
        return _ColumnRule(rule)
    return _OccasionalRule(rule) if isinstance(rule, Occasional) else _AnyRule(rule)


class _Asked:
    """A rule, and what of its findings is not over."""

    rule: Rule

    def __init__(self) -> None:
        self.at: Moment | None = None  #: the moment that it is asked about
        self._illnesses = _Illnesses()

    def new(
        self, history: History, blocks: Sequence[Columns], moments: Sequence[Moment]
    ) -> Iterator[tuple[Moment, list[_Said]]]:
        """What is new, and at which moment."""
        raise NotImplementedError

    def last(self, history: History, newest: Moment) -> Iterator[tuple[Moment, list[_Said]]]:
        """What is new at the end of the run, all moments of which it was asked about."""
        return iter(())


class _OccasionalRule(_Asked):
    """A rule about the whole run: asked when that has grown, by steps and not by blocks."""

    def __init__(self, rule: Occasional) -> None:
        super().__init__()
        self.rule: Occasional = rule
        self._due = 0

    def new(
        self, history: History, blocks: Sequence[Columns], moments: Sequence[Moment]
    ) -> Iterator[tuple[Moment, list[_Said]]]:
        """What is new, at the moments where it looks: the first ones at which the run has grown enough."""
        first = moments[0].seq
        seen = history.course.seen_at(np.arange(first, moments[-1].seq + 1))
        while (at := int(np.searchsorted(seen, self._due))) < len(moments):
            yield from self._look(history, moments[at], int(seen[at]))

    def last(self, history: History, newest: Moment) -> Iterator[tuple[Moment, list[_Said]]]:
        """The same at the end of the run, unless it has just looked."""
        if self.at is not newest:
            yield from self._look(history, newest, history.course.seen)

    def _look(self, history: History, moment: Moment, seen: int) -> Iterator[tuple[Moment, list[_Said]]]:
        self.at, self._due = moment, self.rule.next_look(seen)
        stands = _said(self.rule(history.until(moment)))
        yield from self._illnesses.new([moment], {moment.seq: stands} if stands else {})


class _AnyRule(_Asked):
    """A rule that is called after each moment."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def new(
        self, history: History, blocks: Sequence[Columns], moments: Sequence[Moment]
    ) -> Iterator[tuple[Moment, list[_Said]]]:
        """What is new, and at which moment."""
        for self.at in moments:
            said = _said(self.rule(history.until(self.at)))
            yield from self._illnesses.new([self.at], {self.at.seq: said} if said else {})


class _ColumnRule(_Asked):
    """A rule that is a condition over columns: asked once a block, and for words only where it lasts."""

    def __init__(self, rule: ColumnRule) -> None:
        super().__init__()
        self.rule: ColumnRule = rule
        self._conditions = [(condition, Streaks(steps)) for condition, steps in rule.conditions()]
        #: By stage and parameters, what it said last and for which rows.
        self._again: dict[tuple[str, tuple[str, ...]], tuple[object, list[_Said]]] = {}

    def new(
        self, history: History, blocks: Sequence[Columns], moments: Sequence[Moment]
    ) -> Iterator[tuple[Moment, list[_Said]]]:
        """What is new, and at which moment."""
        spoken: Spoken = {}
        for columns in blocks:
            if not self.rule.stages or columns.stage in self.rule.stages:
                try:
                    self._ask(history, columns, spoken)
                except BaseException:
                    yield from self._illnesses.new([m for m in moments if self.at is None or m.seq < self.at.seq], spoken)
                    raise
        self.at = moments[-1]
        yield from self._illnesses.new(moments, spoken)

    def _ask(self, history: History, columns: Columns, spoken: Spoken) -> None:
        self.at = columns.moments[0]
        self._forget_others(columns)
        try:
            answers = [condition(columns) for condition, _ in self._conditions]
        except Exception:
            if len(columns) == 1:
                raise
            for each in columns.split():  # at which moment?
                self._ask(history, each, spoken)
            return
        lasts = [each.lasting(columns, answer) for (_, each), answer in zip(self._conditions, answers, strict=True)]
        somewhere = np.logical_or.reduce([last.any(axis=1) for last in lasts])
        for at in np.flatnonzero(somewhere).tolist():
            self.at = columns.moments[at]
            said = self._findings(history, columns, at, [last[at] for last in lasts], fresh=at == 0 or not somewhere[at - 1])
            if said:
                spoken[self.at.seq] = said
        if not somewhere[-1]:
            self._again.pop((columns.stage, columns.names), None)

    def _forget_others(self, columns: Columns) -> None:
        """What was said of some of these parameters among others: an illness may heal here, and is worded again then."""
        if len(self._again) > (1 if (columns.stage, columns.names) in self._again else 0):
            own = set(columns.names)
            for stage, names in list(self._again):
                if stage == columns.stage and names != columns.names and not own.isdisjoint(names):
                    del self._again[stage, names]

    def _findings(
        self, history: History, columns: Columns, at: int, lasts: Sequence[np.ndarray], fresh: bool
    ) -> list[_Said]:
        of, key = (columns.stage, columns.names), tuple(last.tobytes() for last in lasts)
        if self.rule.settled and not (fresh and at) and self._again.get(of, (None,))[0] == key:
            return self._again[of][1]
        rows = [np.flatnonzero(last).tolist() for last in lasts]
        before = _NOTHING if fresh and at else self._again.get(of, (None, _NOTHING))[1]
        said = _said(self.rule.findings(history.until(columns.moments[at]), *rows), before)
        self._again[of] = key, said
        return said


# --- what is new ----------------------------------------------------------------------------------------------------


#: On one stage: the step last looked at, and for how many steps up to it the rule has been silent.
_Silence = tuple[int, int]


@dataclass(eq=False)
class _Illness:
    """A rule and a parameter, while it lasts."""

    severity: Severity
    patience: int
    silence: dict[str, _Silence] = field(default_factory=dict)  #: by stage

    def over(self, stage: str, step: int) -> bool:
        """Take note that the rule kept silent at this moment."""
        silence = self.silence.get(stage)
        if silence is not None and silence[0] != step:
            steps = silence[1] + 1
            self.silence[stage] = step, steps
            if steps >= self.patience:
                del self.silence[stage]
        return not self.silence


class _Illnesses:
    """What one rule has said that is not over."""

    def __init__(self) -> None:
        self._ill: dict[Key, _Illness] = {}
        self._times: dict[Key, int] = {}  # how often it was reported
        #: By stage what was said last, and the step: that its illnesses spoke then is noted when they stop. And whether the
        #: same again has nothing to tell: nothing else that spoke there could be silent.
        self._last: dict[str, tuple[list[_Said], int, bool]] = {}

    def new(self, moments: Sequence[Moment], spoken: Mapping[int, list[_Said]]) -> Iterator[tuple[Moment, list[_Said]]]:
        """What is new at each moment that has something new."""
        if not (self._ill or spoken):
            return
        for moment in moments:
            said = spoken.get(moment.seq, _NOTHING)
            if not (said or self._ill):
                continue
            stage, step = moment.block.stage, moment.step
            before, since, steady = self._last.get(stage, (_NOTHING, step, False))
            if steady and before is said:
                self._last[stage] = said, step, True
                continue
            if before:
                going_on = set(map(id, said))
                for each in before:
                    if id(each) not in going_on:
                        self._ill[each.key].silence[stage] = since, 0
            new = self._new(said, moment, set(map(id, before)))
            if new:
                yield moment, new

    def _new(self, said: list[_Said], moment: Moment, going_on: set[int]) -> list[_Said]:
        stage, step, new = moment.block.stage, moment.step, []
        now = step, 0
        for each in said:
            if id(each) in going_on:  # it is ill, as badly
                continue
            illness = self._ill.get(each.key)
            if illness is None:
                times = self._times[each.key] = self._times.get(each.key, 0) + 1
                illness = self._ill[each.key] = _Illness(each.severity, HEALED * 2 ** (times - 1))
                new.append(each)
            elif each.severity is not illness.severity and each.severity.rank > illness.severity.rank:
                illness.severity = each.severity
                new.append(each)
            illness.silence[stage] = now
        quiet = self._quiet(said, stage)
        for key, illness in quiet:
            there = key[1] is None or key[1] in moment.block.parameters.position
            if there and illness.over(stage, step):
                del self._ill[key]
        self._last[stage] = said, step, not quiet
        return new

    def _quiet(self, said: list[_Said], stage: str) -> list[tuple[Key, _Illness]]:
        """Those that spoke on this stage, and are none of what is said."""
        if isinstance(said, _SaidOfRows) and len(said) == len(self._ill):  # each of these is ill
            return []
        keys = {each.key for each in said}
        return [(key, illness) for key, illness in self._ill.items() if key not in keys and stage in illness.silence]


# --- words ----------------------------------------------------------------------------------------------------------


def _switched_off(rule: Rule, error: BaseException, newest: Snapshot) -> Finding:
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


def _said(found: Iterable[Finding] | None, before: Sequence[_Said] = _NOTHING) -> list[_Said]:
    """What a rule gave, after what it said at the moment before; a rule that finds nothing may return None."""
    if isinstance(found, RowFindings):
        return _SaidOfRows(found, before)
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
