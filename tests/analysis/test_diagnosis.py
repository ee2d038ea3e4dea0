"""The findings of a run put in order: the origin first, and what may be said where nothing was found."""

from dataclasses import replace

import numpy as np
import pytest

from gradlens.analysis.confidence import MEASURED, Counts
from gradlens.analysis.diagnosis import BECOMES, DOES, MADE, WATCHING, diagnose, explains, said_of_loss
from gradlens.analysis.trend import State, Trend, judged
from gradlens.findings import CATALOGUE
from gradlens.records import Finding, Severity

RNG = np.random.default_rng(0)


def loss(start, end, n=200, noise=0.01):
    """The trend of a loss that goes from one value to another on a straight line."""
    values = np.linspace(start, end, n) + noise * RNG.normal(size=n)
    return judged(np.arange(n), values)


FALLS, FLAT, RISES = loss(2.3, 0.3), loss(2.3, 2.29), loss(2.3, 9.0)


def finding(rule, step=0, severity=Severity.WARNING, parameter=None):
    return Finding(rule, step, severity, f"{rule} was seen", parameter, (f"the cause of {rule}",), "mend it")


@pytest.mark.parametrize(("trend", "state"), [(FALLS, State.FALLS), (FLAT, State.FLAT), (RISES, State.RISES)])
def test_a_loss_falls_stays_or_rises(trend, state):
    """By a tenth of itself, and by more than its noise."""
    assert trend.state == state
    assert trend.ill == (state != State.FALLS)


@pytest.mark.parametrize(
    ("values", "options", "state"),
    [
        ([1.0] * 5, {}, State.YOUNG),
        ([1.0, *[-1.0] * 40], {}, State.SIGNED),
        ([1.0] * 40, {"several": True}, State.SEVERAL),
        ([1.0] * 40 + [np.nan] * 3, {}, State.NONFINITE),
        ([3.0] * 10 + [np.nan] + [0.5] * 40, {}, State.FALLS),
    ],
)
def test_a_loss_that_is_no_measure_says_so(values, options, state):
    """Few points, both signs, several optimizers; NaN at the end, and NaN once."""
    assert judged(np.arange(len(values)), np.asarray(values), **options).state == state


def test_noise_alone_is_flat():
    """A loss that sways around one value neither falls nor rises, in a hundred draws."""
    states = [judged(np.arange(100), 2 + 0.3 * RNG.normal(size=100)).state for _ in range(100)]
    assert states.count(State.FLAT) >= 97


def test_nothing_looks_ill_is_said_of_a_loss_that_falls():
    """And of no other: where it is not known, or does not fall, that is said."""
    assert diagnose([], FALLS).verdict.startswith("nothing looks ill: the loss falls")
    assert "not known" in diagnose([], Trend(State.UNKNOWN)).verdict
    flat = diagnose([], FLAT)
    assert flat.verdict.startswith("the loss does not fall (2.")
    assert flat.verdict.endswith("and no rule found why")
    assert flat.ill
    assert flat.origin is None


@pytest.mark.parametrize(
    ("ratio", "step", "origin"), [(2.0, 15, "update_ratio"), (2.0, 9, "vanishing"), (1e-7, 15, "vanishing")]
)
def test_a_gradient_that_vanishes_after_weights_leapt_follows_from_that(ratio, step, origin):
    """Where it vanished from the first step on, or weights hardly moved, it is the other way round."""
    found = [finding("vanishing", step), replace(finding("update_ratio", 0), value=ratio)]
    diagnosis = diagnose(found, FLAT)
    assert diagnosis.origin.rule == origin
    assert [f.rule for f in diagnosis.follows] == [f.rule for f in found if f.rule != origin]


def test_a_loss_that_leapt_is_not_told_as_one_that_fell():
    """It rose far above its first point in the first steps, and came back to it: that is said, and no healthy fall."""
    back = judged(
        np.arange(200), np.concatenate([[2.31], np.full(20, 547.0), np.linspace(547.0, 2.38, 100), np.full(79, 2.38)])
    )
    assert (back.state, back.begin, back.leapt) == (State.FALLS, 2.31, True)
    assert said_of_loss(back) == "the loss leapt at first, from 2.31, and falls since, from 547 to 2.38"
    assert diagnose([], back).verdict.startswith("nothing looks ill so far: the loss leapt at first")
    below = replace(back, now=1.0)
    assert not below.leapt
    assert not FALLS.leapt


@pytest.mark.parametrize(
    ("origin", "others"),
    [
        ("softmax-twice", ["too_slow", "disagreement"]),
        ("cut", ["absent", "unmoved"]),
        ("eps", ["nonfinite"]),
        ("foreign-parameters", ["stale", "unmoved", "disagreement"]),
        ("clipped_scaled", ["too_slow", "update_ratio", "loss_scaled"]),
        ("fading", ["vanishing", "collapse", "disagreement"]),
        ("weight_decay", ["vanishing", "shrunk", "fading"]),
        ("input_scale", ["exploding", "spike", "dead", "update_ratio"]),
        ("undivided", ["update_ratio", "dead", "too_fast"]),
        ("update_ratio", ["dead", "collapse", "nonfinite"]),
        ("lr_gone", ["too_slow"]),
        ("dead", ["too_slow"]),
        ("vanishing", ["too_slow"]),
    ],
)
def test_the_origin_comes_first_and_the_rest_follows(origin, others):
    """In whatever order they were found, and however early a consequence was."""
    found = [*(finding(rule, step) for step, rule in enumerate(others)), finding(origin, 90)]
    for order in (found, found[::-1]):
        diagnosis = diagnose(order, FLAT)
        assert diagnosis.origin.rule == origin
        assert {each.rule for each in diagnosis.follows} == set(others)
        assert diagnosis.beside == ()


@pytest.mark.parametrize(("confidence", "words"), [(0.891, "89%"), (0.99, "99%"), (0.996, "over 99%"), (1.0, "over 99%")])
def test_no_verdict_is_called_certain(confidence, words):
    """What rounds to 100% is "over 99%", in the line and in the text."""
    diagnosis = replace(diagnose([finding("stale", 3)], FLAT), confidence=confidence)
    assert f"; {words} sure, " in diagnosis.line()
    assert f"  confidence: {words}" in str(diagnosis).splitlines()


def test_what_is_said_of_the_watching_is_no_verdict_on_the_training():
    """A writer that failed makes no training ill, and hides nothing that is."""
    curves = finding("writer-failed", 1)
    healthy = diagnose([curves], FALLS)
    assert (healthy.origin, healthy.ill, healthy.beside, healthy.watching) == (None, False, (), (curves,))
    assert healthy.verdict == diagnose([], FALLS).verdict
    assert healthy.line() == f"{healthy.verdict}; gradlens itself: writer-failed"
    assert str(healthy).splitlines()[1:] == [f"  gradlens itself (writer-failed): {curves.seen}"]
    ill = diagnose([curves, finding("stale", 3)], FLAT)
    assert (ill.origin.rule, ill.beside, ill.watching) == ("stale", (), (curves,))
    assert ill.confidence == diagnose([finding("stale", 3)], FLAT).confidence


def test_that_nothing_is_on_disk_is_the_verdict_where_the_training_has_none():
    """An error of ours is never behind "nothing looks ill"; a cause in the training comes first."""
    disk = finding("writer-failed", 1, Severity.ERROR)
    alone = diagnose([disk, finding("budget", 2)], FALLS)
    assert (alone.origin, [each.rule for each in alone.watching]) == (disk, ["budget"])
    ill = diagnose([disk, finding("stale", 3)], FLAT)
    assert (ill.origin.rule, ill.beside, ill.watching) == ("stale", (), (disk,))


def test_each_of_those_findings_is_in_the_catalogue():
    """And none of them has a place among causes."""
    assert set(CATALOGUE) >= WATCHING
    assert WATCHING.isdisjoint({*MADE, *DOES, *BECOMES})


def test_an_error_is_worse_than_a_warning_and_earlier_is_before_later():
    """Of two on one level."""
    assert diagnose([finding("stale", 3), finding("lost", 2)], FLAT).origin.rule == "lost"
    assert diagnose([finding("stale", 3), finding("cut", 9, Severity.ERROR)], FLAT).origin.rule == "cut"


def test_tiny_steps_explain_no_nan():
    """What comes of large numbers alone is not laid on what was found before."""
    nan = finding("nonfinite", 140, Severity.ERROR)
    for rule in ("too_slow", "disagreement", "lr_gone"):
        assert diagnose([finding(rule, 40), nan], FLAT).origin is nan
    for rule in ("eps", "exploding", "too_fast", "update_ratio"):
        assert diagnose([finding(rule, 40), nan], FLAT).origin.rule == rule


def test_an_info_is_no_origin_unless_the_loss_does_not_fall():
    """Then it is the best that is known, and less sure."""
    info = finding("undivided", 3, Severity.INFO)
    assert diagnose([info], FALLS).origin is None
    unsure = diagnose([info], FLAT)
    assert unsure.origin is info
    assert unsure.confidence < diagnose([finding("undivided", 3)], FLAT).confidence


@pytest.mark.parametrize("situation", ["falls", "beside", "info"])
def test_what_weakened_verdicts_makes_them_less_sure(situation):
    """As far as it was measured to; what strengthened them does not make them surer than their rule."""
    for right, less in ((5, True), (10, False)):
        counts = Counts({"stale": (9, 10)}, ((90, 100), (0, 0), (0, 0)), {situation: (right, 10)})
        sure = counts.of_verdict("stale", 0, ())
        assert (counts.of_verdict("stale", 0, (situation,)) < sure - 0.1) == less
        assert counts.of_verdict("stale", 0, (situation,)) <= sure


def test_confidence_is_the_share_that_was_right():
    """Of many verdicts that share; of few it is near that of all rules of the level; of none it is that."""
    counts = Counts({"a": (900, 1000), "b": (0, 1)}, ((80, 100), (0, 0), (0, 0)), {}, {"falls": (95, 100)})
    assert counts.of_verdict("a", 0, ()) == pytest.approx(0.9, abs=0.001)
    assert 0.4 < counts.of_verdict("b", 0, ()) < counts.of_verdict("unknown", 0, ()) == pytest.approx(0.79, abs=0.01)
    assert counts.of_quiet("falls") == pytest.approx(0.94, abs=0.01)
    assert counts.of_quiet("young") == 0.5


def test_explaining_has_no_circles():
    """No two rules explain each other, and no rule itself."""
    rules = {*MADE, *DOES, *BECOMES}
    assert not [(a, b) for a in rules for b in rules if a < b and explains(a, b) and explains(b, a)]
    assert not [rule for rule in rules if explains(rule, rule)]
    assert set(MEASURED.rules) <= rules


def test_the_text_says_what_to_do():
    """The verdict, what was seen, what to do, what follows, and how sure that is."""
    text = str(diagnose([finding("fading", 40), finding("collapse", 20)], FLAT))
    for words in (
        "most likely the cause of fading",
        "seen: fading was seen",
        "do: mend it",
        "follows from it: collapse",
        "confidence: ",
    ):
        assert words in text


def test_a_user_rule_may_be_the_origin():
    """A rule that the table does not know stands between mistakes and consequences."""
    diagnosis = diagnose([finding("mine", 5), finding("dead", 1)], FLAT)
    assert diagnosis.origin.rule == "mine"
    assert [each.rule for each in diagnosis.follows] == ["dead"]
