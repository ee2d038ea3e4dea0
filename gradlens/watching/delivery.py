"""What the recorder does with blocks: history, rules, writers and the user's own functions, in that order.

    moments -> history -> rules -> of each moment: the writers, then what was found of it

A rule, a writer or a callback may raise whatever it likes, SystemExit too: it is named once, in a finding, and left out; the
others go on. It may ask the lens anything: it is answered from what is in memory.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from operator import itemgetter

from gradlens import findings
from gradlens.activations import Activations
from gradlens.analysis.history import History
from gradlens.analysis.ruleset import RuleSet
from gradlens.errors import FindingError, GradlensWarning
from gradlens.facts import Fact
from gradlens.records import Finding, Severity
from gradlens.watching.batches import Unpacked
from gradlens.watching.failures import Failures
from gradlens.writers.base import Writer
from gradlens.writers.fanout import Fanout

FINDINGS = 2000  #: that one rule may make; what it finds after that is counted, and said at the end

Facts = Sequence[tuple[int, Fact]]


class Delivery:
    """Hands on what was recorded; called from the recorder's thread."""

    def __init__(
        self,
        history: History,
        rules: RuleSet,
        writers: Sequence[Writer],
        on_finding: str | Callable[[Finding], None],
        failures: Failures,
        entering: Callable[[str], None],
    ) -> None:
        self.found: list[Finding] = []
        self.to_raise: list[Finding] = []
        self._history, self._rules, self._failures = history, rules, failures
        self._on_finding = on_finding
        self._entering = entering
        self._times: Counter[str] = Counter()
        told = self._writer_failed, entering, self._activations_failed
        self.durable = Fanout([writer for writer in writers if _durable(writer)], *told)
        self.others = Fanout([writer for writer in writers if not _durable(writer)], *told)
        self._broken: list[Finding] = []  # writers that failed, of which nobody has heard yet
        self._step = 0

    # --- records ----------------------------------------------------------------------------------------------------

    def record(self, came: Unpacked) -> None:
        """To the durable writers, at once."""
        for _, finding in came.findings:
            self.durable.write(finding)
        if len(came.moments):
            block, at = came.moments[-1]
            self._step = int(block.step[at])
            self.durable.write_moments(came.moments)
        self.durable.write_activations(_activations(came.facts))

    # --- everything else --------------------------------------------------------------------------------------------

    def deliver(self, came: Unpacked) -> None:
        """To the history, the rules, the other writers: all moments of some blocks, in the order in which they came."""
        self.others.write_activations(_activations(came.facts))
        moments = came.moments
        found: list[tuple[int, Finding, bool]] = []  # how many moments come before it; whether it is recorded
        if len(moments):
            first = self._history.extend(moments, came.facts)[0].moments[0].seq
            self._entering("a rule")
            found += [(max(seq - first + 1, 0), finding, False) for seq, finding in self._rules.ask(self._history)]
        else:
            for _, fact in came.facts:
                self._history.note(fact)
        found += [(place, finding, True) for place, finding in came.findings]
        at = 0
        for place, finding, recorded in sorted(found, key=itemgetter(0)):
            stop = min(place, len(moments))
            self.others.write_moments(moments[at:stop])
            at = stop
            self.tell(finding, recorded=recorded)
        self.others.write_moments(moments[at:])
        self._history.trim()
        self.tell_failures()

    def end(self) -> None:
        """What is found at the end of the run."""
        self._entering("a rule")
        for finding in self._rules.last(self._history):
            self.tell(finding)

    def tell(self, finding: Finding, *, recorded: bool = False) -> None:
        """Hand a finding on to everybody."""
        times = self._times[finding.rule] = self._times[finding.rule] + 1
        if times > FINDINGS:
            return
        self._tell(finding, recorded=recorded)
        if times == FINDINGS:
            self._tell(findings.too_many(finding, FINDINGS))

    def _tell(self, finding: Finding, *, recorded: bool = False) -> None:
        self.found.append(finding)
        if not recorded:
            self.durable.write(finding)
        self.others.write(finding)
        self._call(finding)

    def _call(self, finding: Finding) -> None:
        if callable(self._on_finding):
            self._entering("on_finding")
            try:
                self._on_finding(finding)
            except BaseException as error:  # noqa: BLE001 - the user's callback must not stop the records
                if not isinstance(error, Exception):  # it asked for an end, which this thread is not the one to make
                    self._on_finding = "record"
                self._failures("on_finding", error)
        elif self._on_finding == "warn":
            with contextlib.suppress(GradlensWarning):
                warnings.warn(GradlensWarning(str(finding)), stacklevel=2)
        elif self._on_finding == "raise" and finding.severity != Severity.INFO:
            self.to_raise.append(finding)

    # --- writers that fail ------------------------------------------------------------------------------------------

    def _writer_failed(self, writer: Writer, error: BaseException) -> None:
        self._broken.append(findings.writer_failed(self._step, type(writer).__name__, error, durable=_durable(writer)))

    def _activations_failed(self, writer: Writer, error: BaseException) -> None:
        text = f"the activations of the writer {type(writer).__name__}, which gets no more: {type(error).__name__}: {error}"
        self._broken.append(findings.fault(self._step, text))

    def tell_failures(self) -> None:
        """Say which writers have failed since it was last said: in memory, in those that work, and in the report."""
        while self._broken:
            self.tell(self._broken.pop(0))

    def flush(self) -> None:
        """Every writer; and what that gave."""
        self.durable.flush()
        self.others.flush()
        self.tell_failures()

    def interrupt(self) -> None:
        """Raise what the user asked to be raised."""
        if self.to_raise:
            raise FindingError(self.to_raise.pop(0))

    def left_out(self) -> list[Finding]:
        """What each rule found beyond what was handed on."""
        return [
            findings.left_out(self._step, rule, times, FINDINGS) for rule, times in self._times.items() if times > FINDINGS
        ]


def _activations(facts: Facts) -> list[Activations]:
    return [fact for _, fact in facts if isinstance(fact, Activations)]


def _durable(writer: Writer) -> bool:
    return bool(getattr(writer, "durable", False))
