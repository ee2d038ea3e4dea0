"""The recorder's thread: bounded work, answers to whoever asks, and nothing that stops it."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import pytest

import gradlens
from gradlens import Finding, open_run
from gradlens import lens as lens_module
from gradlens.errors import GradlensWarning
from gradlens.testing import RecordingWriter, healthy
from gradlens.watching import delivery, outputs_read, recorder
from gradlens.writers import inbox

QUIET = pytest.mark.filterwarnings("ignore::gradlens.errors.GradlensWarning")


def once(step=2, name="once"):
    """A rule that finds one thing, at a step."""

    def rule(history):
        newest = history.latest()
        if newest.step == step and newest.stage == "used":
            yield Finding(name, newest.step, "warning", "seen")

    return rule


def bounded(call, seconds=20.0):
    """What a call gives, on a thread of its own, which must end."""
    result = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it never returned"
    return result[0]


# --- whoever is called may ask --------------------------------------------------------------------------------------

QUESTIONS = {
    "report": lambda lens: lens.report(),
    "print": str,
    "table": lambda lens: lens.table(),
    "history": lambda lens: lens.history(),
    "findings": lambda lens: lens.findings(),
    "flush": lambda lens: lens.flush(),
    "weights": lambda lens: lens.weights(top=3),
    "overhead": lambda lens: str(lens.overhead()),
    "close": lambda lens: lens.close(),
}


@QUIET
@pytest.mark.parametrize("asked", QUESTIONS)
@pytest.mark.parametrize("who", ["on_finding", "rule", "writer"])
def test_whoever_is_called_may_ask_the_lens(asked, who, tmp_path):
    """From a callback, a rule or a writer every question has an answer, and the records go on."""
    answers, case = [], healthy()

    def ask(*_):
        if len(answers) < 3:
            answers.append(QUESTIONS[asked](lens))

    writer = RecordingWriter()
    if who == "writer":
        writer.write = ask
    rules = [once(), lambda history: ask()] if who == "rule" else [once()]
    options = {"on_finding": ask} if who == "on_finding" else {}
    lens = gradlens.watch(case.model, case.optimizer, run=tmp_path, rules=rules, writers=[writer], **options)
    case.train(6)
    bounded(lens.close)
    assert answers
    steps = open_run(tmp_path).steps()
    assert steps == list(range(len(steps)))
    assert len(steps) == 6 or (asked == "close" and steps)


# --- whoever is called may fail, or never return --------------------------------------------------------------------

ERRORS = [RuntimeError("no"), SystemExit(3), KeyboardInterrupt(), MemoryError()]


@QUIET
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("who", ["on_finding", "rule", "write", "flush", "close"])
def test_whatever_is_raised_is_named_once_and_the_rest_goes_on(error, who, tmp_path):
    """SystemExit and KeyboardInterrupt too: every step is recorded, other writers and findings are there."""

    def fail(*_):
        raise error

    bad, good, case = RecordingWriter(), RecordingWriter(), healthy()
    if who in ("write", "flush", "close"):
        setattr(bad, who, fail)
    rules = [once(), fail] if who == "rule" else [once()]
    options = {"on_finding": fail} if who == "on_finding" else {}
    lens = gradlens.watch(case.model, case.optimizer, run=tmp_path, rules=rules, writers=[bad, good], **options)
    case.train(10)
    bounded(lens.flush)
    case.train(10, first=10)
    bounded(lens.close)
    assert open_run(tmp_path).steps() == list(range(20))
    found = lens.findings()
    assert sum(finding.rule == "once" for finding in found) == 1
    named = [finding for finding in found if type(error).__name__ in finding.seen]
    assert len(named) == 1
    assert {record.step for record in good.records if not isinstance(record, Finding)} == set(range(20))


BAD_ROWS = {
    "too short": lambda row: [*row[:-1]],
    "no number": lambda row: ["none", *row[1:]],
    "several": lambda row: [row, row],
}


@QUIET
@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_of_activations_costs_no_gradient(bad, tmp_path, monkeypatch):
    """Every step has its gradients, on disk too, the other steps have their activations, and it is said once."""
    case, calls = healthy(), []

    def read(made, axis, low, high):
        calls.append(made)
        row = outputs_read.read_output(made, axis, low, high)
        return BAD_ROWS[bad](row) if len(calls) == 7 else row

    monkeypatch.setattr(lens_module, "read_output", read)
    lens = gradlens.watch(case.model, case.optimizer, run=tmp_path, features="activations")
    case.train(6)
    lens.close()
    modules = sum(not list(module.children()) for module in case.model.modules())
    assert len(calls) == 6 * modules
    run = open_run(tmp_path)
    assert set(run.history()["step"]) == set(range(6))
    assert len(run.history()) == 6 * 2 * len(list(case.model.parameters()))
    assert sorted(set(run.activations()["step"])) == [0, 2, 3, 4, 5]
    found = [finding.seen for finding in lens.findings() if finding.rule == "gradlens-fault"]
    assert len(found) == 1
    assert "activations" in found[0]


@QUIET
def test_a_fault_of_the_store_in_activations_costs_no_gradient(tmp_path, monkeypatch):
    """What cannot be encoded is lost alone: the run has every gradient of every step, and the finding."""
    case = healthy()
    lens = gradlens.watch(case.model, case.optimizer, run=tmp_path, features="activations")
    monkeypatch.setattr(lens._store._rows, "take_activations", lambda passes: 1 / 0)
    case.train(6)
    lens.close()
    run = open_run(tmp_path)
    assert len(run.history()) == 6 * 2 * len(list(case.model.parameters()))
    assert not len(run.activations())
    assert ["division by zero" in f.seen for f in run.findings() if f.rule == "gradlens-fault"] == [True]


@QUIET
@pytest.mark.parametrize("who", ["on_finding", "rule", "writer"])
def test_who_never_returns_is_named_and_the_lens_closes(who, tmp_path, monkeypatch):
    """close() is bounded, and so is each question before and after; it says who it was, and every step is on disk."""
    monkeypatch.setattr(recorder, "PATIENCE", 1.0)
    never, case = threading.Event(), healthy()

    def block(*_):
        never.wait()

    writer = RecordingWriter()
    if who == "writer":
        writer.write = block
    rules = [once(), lambda history: block()] if who == "rule" else [once()]
    options = {"on_finding": block} if who == "on_finding" else {}
    lens = gradlens.watch(case.model, case.optimizer, run=tmp_path, rules=rules, writers=[writer], **options)
    case.train(10)
    bounded(lens.flush)
    monkeypatch.setattr(recorder, "PATIENCE", 1000.0)  # it is waited for once, and not by each question
    case.train(10, first=10)
    bounded(lens.close)
    bounded(lens.report)
    stuck = [finding for finding in lens.findings() if finding.rule == "recorder-stuck"]
    assert stuck
    assert {"on_finding": "on_finding", "rule": "a rule", "writer": "RecordingWriter"}[who] in stuck[-1].seen
    run = open_run(tmp_path)
    assert run.steps() == list(range(20))
    assert "recorder-stuck" in {finding.rule for finding in run.findings()}
    never.set()


def test_a_process_ends_though_a_writer_never_returns(tmp_path):
    """The interpreter's exit is bounded too, and what was recorded is there."""
    script = f"""
    import threading, warnings
    import gradlens
    from gradlens.testing import RecordingWriter, healthy
    from gradlens.watching import recorder
    warnings.simplefilter("ignore")
    recorder.PATIENCE = 0.5
    case, writer = healthy(), RecordingWriter()
    writer.write = lambda record: threading.Event().wait()
    gradlens.watch(case.model, case.optimizer, run={str(tmp_path)!r}, writers=[writer])
    case.train(5)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60, stderr=subprocess.DEVNULL)
    assert open_run(tmp_path).steps() == list(range(5))


def test_sigterm_loses_a_second_at_most(tmp_path):
    """As kill -9 does: Python ends without a word, and the steps before the last second are on disk."""
    script = f"""
    import time
    import gradlens
    from gradlens.testing import healthy
    case = healthy()
    lens = gradlens.watch(case.model, case.optimizer, run={str(tmp_path)!r})
    case.train(20)
    time.sleep(1.5)
    print("ready", flush=True)
    time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    assert open_run(tmp_path).steps() == list(range(20))


# --- a dead store ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["", "history", "segments"])
def test_a_store_that_died_is_a_finding_everywhere(gone, tmp_path):
    """In memory, in the other writers, in the report; soon after it happened, and training goes on."""
    import shutil

    case, other = healthy(), RecordingWriter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens = gradlens.watch(case.model, case.optimizer, run=tmp_path / "run", writers=[other])
        case.train(5)
        lens.flush()
        shutil.rmtree(tmp_path / "run" / gone)
        case.train(5, first=5)
        lens.flush()
        found = [finding for finding in lens.findings() if finding.rule == "writer-failed"]
        report = lens.report()
        lens.close()
    store = [finding for finding in found if finding.seen.startswith("Store")]
    assert len(store) == 1
    assert store[0].severity == "error"
    assert "from about step" in store[0].seen
    assert "removed" in store[0].seen
    assert store[0] in other.records
    assert "writer-failed" in report
    assert "nothing looks ill" not in report


# --- floods ---------------------------------------------------------------------------------------------------------


@QUIET
def test_findings_are_bounded_and_that_is_said(tmp_path, monkeypatch):
    """A rule that finds too much is cut off, by name and with how much it was; the others are not."""
    monkeypatch.setattr(delivery, "FINDINGS", 50)

    def noisy(history):
        newest = history.latest()
        return [Finding("noisy", newest.step, "info", "", f"p{newest.step}.{i}") for i in range(5)]

    case = healthy()
    with gradlens.watch(case.model, case.optimizer, run=tmp_path, rules=[noisy, once(19)]) as lens:
        case.train(20)
    for found in (lens.findings(), open_run(tmp_path).findings()):
        rules = [finding.rule for finding in found]
        assert rules.count("noisy") == 50
        assert rules.count("findings-bounded") == 1
        assert rules.count("once") == 1
        (left,) = [finding for finding in found if finding.rule == "findings-left-out"]
        assert left.value == 20 * 5 - 50


# --- the training thread --------------------------------------------------------------------------------------------


def test_the_training_thread_wakes_nobody(monkeypatch):
    """A step is appended to a list: no lock is taken, no event is set, while there is room."""
    woken = []
    box = inbox.Inbox(lambda: woken.append(1), items=100)

    class Item:
        step, nbytes = 0, 8

    for _ in range(50):
        box.append(Item())
    assert (len(box), woken) == (50, [])
    for _ in range(10):
        box.append(Item())
    assert woken


def test_a_full_inbox_leaves_out_whole_steps_and_says_which():
    """What finds no room is left out by step, and one finding names the steps."""
    box = inbox.Inbox(items=4)

    class Item:
        def __init__(self, step):
            self.step, self.nbytes = step, 8

    for step in range(10):
        for _ in range(2):
            box.append(Item(step))
    first = box.take()
    box.append(Item(10))
    gap, last = box.take()
    assert [item.step for item in first] == [0, 0, 1, 1]
    assert (gap.rule, gap.step, gap.value) == ("records-thinned", 2, 8.0)
    assert last.step == 10
    for step in range(11, 20):
        box.append(Item(step))
    box.take()
    box.close()
    (gap,) = box.take()
    assert gap.step == 15


@pytest.mark.parametrize(
    ("worked", "rests"), [(0.0, 0.05), (0.0005, 0.05), (0.002, 0.1), (0.02, 1.0), (0.1, 5.0), (60.0, 5.0)]
)
def test_the_recorder_rests_fifty_times_as_long_as_it_works(worked, rests):
    """Within bounds: a twentieth of a second, and five."""
    assert recorder.rest_after(worked) == pytest.approx(rests)


def test_work_is_rare_at_any_step_rate(monkeypatch):
    """What takes a fiftieth of a second is done once a second, however many steps come."""
    clock = itertools.count()
    case = healthy()
    with gradlens.watch(case.model, case.optimizer) as lens:
        monkeypatch.setattr(recorder.time, "thread_time", lambda: next(clock) / 50)
        rounds, deliver = [], lens._recorder._deliver
        monkeypatch.setattr(lens._recorder, "_deliver", lambda: rounds.append(1) or deliver())
        began, steps = time.monotonic(), 0
        while time.monotonic() - began < 2.5:
            case.train(20, first=steps)
            steps += 20
        passed = time.monotonic() - began
        assert 1 <= len(rounds) <= passed + 2


def test_what_the_training_thread_finds_comes_at_its_moment():
    """Among what rules find, in one order however steps fall into blocks."""

    def seen(history):
        newest = history.latest()
        yield Finding(f"seen at {newest.step} {newest.stage}", newest.step, "info", "")

    def found(*blocks):
        case, first = healthy(), 0
        with gradlens.watch(case.model, case.optimizer, rules=[seen]) as lens:
            for steps in blocks:
                with lens._recorder._recording:  # so that all of it waits
                    for step in range(first, first + steps):
                        if step == 5:
                            lens._failures.findings.append(Finding("noticed", 5, "info", ""))
                        case.train(1, first=step)
                lens._recorder.flush()
                first += steps
        return [finding.rule for finding in lens.findings() if finding.rule.startswith(("seen", "noticed"))]

    together = found(8)
    assert together[9:12] == ["seen at 4 used", "noticed", "seen at 5 backward"]
    assert found(3, 5) == found(5, 3) == found(*[1] * 8) == together


def test_many_steps_are_taken_in_portions(tmp_path, monkeypatch):
    """However many came: each portion is whole blocks, and findings and records are those of one step at a time."""

    def known(history):
        newest = history.latest()
        yield Finding(f"{newest.stage} {newest.step}", newest.step, "info", f"{len(history.facts)} {history.course.seen}")

    def trained(run, rows):
        monkeypatch.setattr(recorder, "ROWS", rows)
        case = gradlens.testing.dead_relu()
        lens = gradlens.watch(case.model, case.optimizer, run=run, rules=[*gradlens.rules.DEFAULT, known])
        with lens._recorder._recording:  # so that all of it waits
            case.train(40)
        lens.close()
        return [str(finding) for finding in lens.findings()], open_run(run).history()

    whole, history = trained(tmp_path / "whole", 10**9)
    assert any("used 7" in text and " 8" in text for text in whole)  # what comes later is not known then
    for rows in (1, 37, 100):
        found, portions = trained(tmp_path / f"run{rows}", rows)
        assert found == whole
        assert portions.equals(history)
    assert len(whole) > 80


def test_what_came_is_on_disk_while_the_recorder_rests(tmp_path, monkeypatch):
    """Between two rounds of rules and pictures the rows alone are written: a reader finds them within a second."""
    monkeypatch.setattr(recorder, "SHORTEST", 60.0)
    monkeypatch.setattr(recorder, "LONGEST", 60.0)
    case = healthy()
    lens = gradlens.watch(case.model, case.optimizer, run=tmp_path, rules=[once()])
    case.train(3)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and open_run(tmp_path).steps() != [0, 1, 2]:
        time.sleep(0.05)
    assert open_run(tmp_path).steps() == [0, 1, 2]
    assert lens._recorder.found == []
    assert [finding.rule for finding in lens.findings()] == ["once"]  # a question wakes it
    lens.close()


@pytest.mark.parametrize("run", [False, True])
def test_memory_stays_flat(run, tmp_path, monkeypatch):
    """Blocks leave with their last moment, without a collection of cycles: what lives does not grow with the steps."""
    import gc

    from gradlens.analysis.history import Columns, History
    from gradlens.blocks import Block

    monkeypatch.setattr(recorder, "History", lambda: History(maxlen=40))
    case, lived = healthy(), []

    def rows():
        return sum(block.rows for block in gc.get_objects() if type(block) in (Block, Columns))

    with gradlens.watch(case.model, case.optimizer, run=tmp_path if run else None) as lens:
        gc.collect()
        before = rows()  # of lenses that other tests have left
        gc.disable()
        try:
            for round_ in range(9):
                case.train(20, first=20 * round_)
                lens.flush()
                lived.append(rows() - before)
        finally:
            gc.enable()
    # The history has 40 moments of six rows. What a writer has yet to write lives a little longer, now and then; what does
    # not leave at all would be 280 to 360 moments in each of the last three rounds.
    assert min(lived[-3:]) <= 4 * 40 * 6


def test_a_question_from_another_thread_is_answered(tmp_path):
    """Of the steps that are over."""
    case = healthy()
    with gradlens.watch(case.model, case.optimizer) as lens:
        case.train(5)
        table = bounded(lambda: lens.table())
    assert table["step"].unique().tolist() == [4]
    assert os.getpid()


def test_a_warning_turned_into_an_error_stops_nothing():
    """`-W error` and a writer that fails."""
    case, bad, good = healthy(), RecordingWriter(), RecordingWriter()
    bad.write = lambda record: 1 / 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradlensWarning)
        with gradlens.watch(case.model, case.optimizer, writers=[bad, good], on_finding="warn", rules=[once()]) as lens:
            case.train(5)
    assert {finding.rule for finding in lens.findings()} == {"once", "writer-failed"}
    assert len(good.records) >= 10
