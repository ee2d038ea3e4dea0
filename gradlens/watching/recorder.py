"""From tables to records, on a thread of its own.

    training thread:  tables -> inbox, a list
    recorder thread:  inbox -> blocks -> durable writers -> history -> rules -> the other writers
    a short one:      inbox -> blocks -> durable writers, when the recorder rests or is kept waiting

One direction: nothing here calls back into the training loop. What the user asked to be raised waits for `interrupt`.

The recorder takes everything that has come at once, and then rests `REST` times as long as it worked: its share of a core
is bounded by construction, whatever the step rate. What came meanwhile is on disk all the same, no older than `RECORDED`
seconds. A question wakes it; so does an inbox that is half full.

A rule, a writer or a callback that never returns keeps its thread, and nothing else: records go on, questions are answered
from memory after `PATIENCE` seconds, and `close()` says who it was.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradlens import findings
from gradlens.analysis.diagnosis import Diagnosis, diagnose
from gradlens.analysis.history import History
from gradlens.analysis.ruleset import RuleSet
from gradlens.analysis.trend import trend
from gradlens.errors import GradlensWarning
from gradlens.facts import Fact
from gradlens.records import Finding
from gradlens.statistics.table import Table
from gradlens.watching.batches import TableBatch, Unpacked, findings_alone, joined, portions, unpacked
from gradlens.watching.delivery import Delivery
from gradlens.watching.failures import Failures
from gradlens.watching.stopwatch import ThreadClock, Worked
from gradlens.workers import Worker
from gradlens.writers.base import Writer
from gradlens.writers.inbox import Inbox

ROWS = 100_000  #: that are unpacked and handed on together: some 40 MB
TOGETHER = 20_000  #: rows below which what was recorded is handed on with what comes next
REST = 50  #: times as long as it worked, that the recorder rests
SHORTEST, LONGEST = 0.05, 5.0  #: seconds that it rests at least and at most
RECORDED = 0.4  #: seconds after which what came is with the durable writers; those take up to half a second more
PATIENCE = 15.0  #: seconds without any progress, after which a rule, a writer or a callback is not waited for


def rest_after(worked: float) -> float:
    """Seconds that the recorder rests after so many processor seconds of work."""
    return min(max(REST * worked, SHORTEST), LONGEST)


class Recorder:
    """Takes tables on the training thread; history, rules and writers get them on another."""

    def __init__(
        self,
        rules: Sequence[Any],
        writers: Sequence[Writer],
        on_finding: str | Callable[[Finding], None],
        failures: Failures,
    ) -> None:
        self.history = History()
        self._failures = failures
        self._delivery = Delivery(self.history, RuleSet(rules), writers, on_finding, failures, self._enter)
        self.interrupt = self._delivery.interrupt  #: raises what is to be raised, on the training thread
        self._wake = threading.Event()
        self.inbox = Inbox(self._wake.set)
        self._recording = threading.Lock()  # one thread takes from the inbox at a time
        self._recorded: deque[Unpacked] = deque()  # that were not delivered
        self._facts: list[Fact] = []
        self._requests: deque[threading.Event] = deque()
        self._within, self._progress = "", 0  # whose function is running, and how many have
        self._stuck = -1  # how many had when one was waited for in vain
        self._closed = False
        self._spent = self._recording_spent = 0.0  # processor seconds, of each thread
        self._pid = os.getpid()
        self._ended = threading.Event()
        self._threads = [
            Worker(work, name) for work, name in ((self._work, "gradlens"), (self._keep_recording, "gradlens-records"))
        ]
        self._clock = ThreadClock()
        for thread in self._threads:
            thread.start()
        self._clock.add([*self._threads, *(thread for writer in writers for thread in getattr(writer, "threads", ()))])

    # --- the training thread ----------------------------------------------------------------------------------------

    def note(self, fact: Fact) -> None:
        """Something is known beside gradients; it is handed on with the next tables."""
        self._facts.append(fact)

    def send(
        self, tables: list[Table], scalars: Mapping[str, Any], losses: Sequence[float | Tensor | None] | None = None
    ) -> None:
        """Hand tables on, with what the user observed at their step, and the findings that wait. Never waits."""
        findings = self._failures.findings
        if self._closed or not (tables or findings):
            return
        step = tables[-1].step if tables else self._failures.step()
        size = 8 * sum(piece.numbers.numel() for table in tables for piece in table.pieces)
        facts, self._facts = self._facts, []
        batch = TableBatch(step, size, tables, losses or [None] * len(tables), dict(scalars), findings[:], facts)
        del findings[: len(batch.findings)]
        batch.begin_transfer()
        self.inbox.append(batch)

    def diagnosis(self) -> Diagnosis:
        """What was found so far, in order."""
        return diagnose(list(self.found), trend(self.history.course, self.history.facts))

    # --- questions --------------------------------------------------------------------------------------------------

    @property
    def found(self) -> list[Finding]:
        """What was found, in order."""
        return self._delivery.found

    def background(self) -> Worked:
        """Processor seconds so far of all threads that work on what was seen, the store's among them."""
        worked = self._clock()
        return Worked(self.seconds, 0.0) if worked.lock == 0.0 else worked

    @property
    def seconds(self) -> float:
        """Processor seconds that the recorder's two threads took."""
        return self._spent + self._recording_spent

    def is_current_thread(self) -> bool:
        """Whether a rule, a writer or a callback asks."""
        return threading.current_thread() is self._threads[0]

    def flush(self) -> None:
        """Everything that was sent is in history and with the writers; asked by one of these, it returns at once."""
        if os.getpid() != self._pid or self.is_current_thread():
            return
        if self._closed:
            self._wait(self._ended)
            return
        done = threading.Event()
        self._requests.append(done)
        self._wake.set()
        if not self._wait(done):
            self._say_stuck("a question was answered without what came last")

    def close(self) -> None:
        """Drain, and close the writers; bounded in time. What was lost is said. May be called again."""
        if self._closed or os.getpid() != self._pid:
            return
        self.inbox.close()
        self._closed = True
        self._wake.set()
        if self.is_current_thread():
            return
        if not self._wait(self._ended):
            self._close_without_recorder()

    def _wait(self, done: threading.Event) -> bool:
        """Whether it was done; not after `PATIENCE` seconds in which nothing went on, which are waited for once."""
        seen, since = self._progress, time.monotonic()
        while not done.wait(0.1):
            if not self._threads[0].is_alive() or self._progress == self._stuck:
                return done.is_set()
            if self._progress != seen:
                seen, since = self._progress, time.monotonic()
            elif self._within and time.monotonic() - since > PATIENCE:
                self._stuck = seen
                return False
        return True

    def _say_stuck(self, what: str) -> Finding:
        finding = findings.recorder_stuck(self._failures.step(), self._within or "the recorder", PATIENCE, what)
        if not any(finding.rule == each.rule and finding.seen == each.seen for each in self.found):
            self.found.append(finding)
            warnings.warn(GradlensWarning(finding.seen), stacklevel=3)
        return finding

    def _close_without_recorder(self) -> None:
        """Somebody's function keeps the recorder's thread: the records are closed from here."""
        if not self._recording.acquire(timeout=1.0):
            self._say_stuck(f"the lens was closed without it, and {len(self.inbox):,} steps were not recorded")
            return
        self._recording.release()
        self._record(wait=True)
        waiting = sum(len(each.moments) + len(each.findings) for each in self._recorded)
        finding = self._say_stuck(
            f"the lens was closed without it, and {waiting:,} records reached neither the rules nor the writers that "
            "are not durable"
        )
        with self._recording:
            self._delivery.durable.write(finding)
            self._delivery.durable.close()

    # --- recording: the inbox to the durable writers ----------------------------------------------------------------

    def _keep_recording(self) -> None:
        _, thread = self._threads
        while not thread.rest(self._ended, RECORDED) and not self._closed:
            began = time.thread_time()
            self._guarded("records", self._record)
            self._recording_spent += time.thread_time() - began

    def _record(self, wait: bool = False) -> None:
        """Take what has come; numbers that a device still has are waited for where asked."""
        self._enter("the durable writers")
        with self._recording:
            taken = self.inbox.take(lambda item: wait or isinstance(item, Finding) or item.arrived())
            batches = [findings_alone([each], each.step) if isinstance(each, Finding) else each for each in taken]
            for portion in portions(batches, ROWS):
                for each in self._unpacked(portion):
                    self._delivery.record(each)
                    self._recorded.append(each)

    def _unpacked(self, batches: Sequence[TableBatch]) -> list[Unpacked]:
        """What batches hold, together; one by one where something is wrong with one of them."""
        try:
            return [unpacked(batches, self._failures)]
        except Exception as error:  # noqa: BLE001 - a fault of ours costs the step that it touched
            if len(batches) == 1:
                self._failures("unpacking", error)
                return [unpacked([findings_alone(batches[0].findings, batches[0].step)], self._failures)]
        return [each for batch in batches for each in self._unpacked([batch])]

    # --- the recorder's thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        rest, (thread, _) = SHORTEST, self._threads
        while True:
            thread.rest(self._wake, rest)
            self._wake.clear()
            closing, requests = self._closed, [self._requests.popleft() for _ in range(len(self._requests))]
            began = time.thread_time()
            self._guarded("records", self._record, bool(requests) or closing)
            self._guarded("recorder", self._deliver)
            if requests or closing:
                self._guarded("writers", self._delivery.flush)
            spent = time.thread_time() - began
            self._spent += spent
            for done in requests:
                done.set()
            if closing:
                break
            rest = rest_after(spent)
        self._guarded("recorder", self._delivery.end)
        self._guarded("writers", self._delivery.others.close)
        self._guarded("findings", self._say_the_last)
        self._guarded("durable writers", self._close_durable)
        self._enter("")
        self._ended.set()

    def _say_the_last(self) -> None:
        """What came up while the lens was closed, and how much rules found that was not kept."""
        for finding in [*self._failures.findings, *self._delivery.left_out()]:
            self._delivery.tell(finding)
        self._delivery.tell_failures()

    def _deliver(self) -> None:
        while self._recorded:
            self._delivery.deliver(self._with_the_next(self._recorded.popleft()))
        self._delivery.tell_failures()
        self._enter("")

    def _with_the_next(self, first: Unpacked) -> Unpacked:
        """What was recorded one after the other as if it had come at once: rules and writers cost the most a block."""
        parts = [first]
        while self._recorded and sum(part.rows for part in parts) < TOGETHER:
            parts.append(self._recorded.popleft())
        return joined(parts)

    def _close_durable(self) -> None:
        with self._recording:
            self._delivery.durable.close()
        self._delivery.tell_failures()

    def _enter(self, whose: str) -> None:
        """Whose function runs now, on the recorder's thread."""
        if not self.is_current_thread():
            return
        self._within, self._progress = whose, self._progress + 1

    def _guarded(self, where: str, call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
        except BaseException as error:  # noqa: BLE001 - the thread must live, and say what it lost
            self._failures(where, error)
