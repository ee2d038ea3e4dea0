"""What is new of what rules say."""

import warnings

import pytest

from gradlens.analysis.history import History
from gradlens.analysis.rules.base import RowFindings
from gradlens.analysis.ruleset import FLOOD, HEALED, NAMED, RuleSet, named
from gradlens.errors import GradlensWarning
from gradlens.records import Finding, Severity
from tests.analysis.made import snapshot

MANY = tuple(f"layer{i}.weight" for i in range(20))


def told(script, *, stage="backward"):
    """A rule that says at each step what a function of the step tells: parameters, or pairs of them and severities."""

    def rule(history):
        newest = history.latest()
        if newest.stage != stage:
            return
        for word in script(newest.step):
            parameter, severity = word if isinstance(word, tuple) else (word, Severity.WARNING)
            yield Finding("told", newest.step, severity, f"seen at {newest.step}", parameter, stage=newest.stage)

    return rule


def diagnosed(rules, steps, names=MANY, stages=("backward",)):
    """`{step: findings}` of the steps at which there were any."""
    ruleset, history, result = RuleSet(rules), History(), {}
    for step in steps:
        for stage in stages:
            history.append(snapshot(step, names, stage))
            if found := ruleset(history):
                result.setdefault(step, []).extend(found)
    return result


def ill(*spans):
    """A script: one parameter is ill within these spans of steps."""
    return told(lambda step: ["layer0.weight"] if any(step in span for span in spans) else [])


# --- what is new ----------------------------------------------------------------------------------------------------


def test_an_illness_is_told_once_while_it_lasts():
    """However often the rule repeats itself."""
    assert list(diagnosed([ill(range(3, 500))], range(500))) == [3]


def test_another_parameter_and_another_rule_are_new():
    """An illness is a rule and a parameter."""
    script = told(lambda step: ["layer0.weight"] + ["layer1.weight"] * (step >= 4))

    def other(history):
        return [Finding("other", history.latest().step, Severity.WARNING, "", "layer0.weight")] * (
            history.latest().step >= 7
        )

    found = diagnosed([script, other], range(9))
    assert {step: [(f.rule, f.parameter) for f in fs] for step, fs in found.items()} == {
        0: [("told", "layer0.weight")],
        4: [("told", "layer1.weight")],
        7: [("other", "layer0.weight")],
    }


def test_a_risen_severity_is_new_and_a_fallen_one_is_not():
    """Each level is told once."""
    levels = {0: Severity.WARNING, 5: Severity.INFO, 9: Severity.ERROR, 12: Severity.WARNING, 15: Severity.ERROR}
    script = told(lambda step: [("layer0.weight", levels[max(k for k in levels if k <= step)])])
    found = diagnosed([script], range(20))
    assert {step: f.severity for step, (f,) in found.items()} == {0: Severity.WARNING, 9: Severity.ERROR}


def test_the_worst_comes_first():
    """Findings of one snapshot are sorted by severity, and otherwise as the rules are listed."""
    script = told(lambda step: [("a", Severity.INFO), ("b", Severity.ERROR), ("c", Severity.WARNING), ("d", Severity.ERROR)])
    assert [f.parameter for f in diagnosed([script], range(1))[0]] == ["b", "d", "c", "a"]


# --- healing --------------------------------------------------------------------------------------------------------


def test_a_relapse_is_told_only_after_it_has_healed():
    """Nine silent steps are no health; ten are, and the illness is new."""
    assert list(diagnosed([ill(range(5), range(4 + HEALED, 99))], range(50))) == [0]
    assert list(diagnosed([ill(range(5), range(5 + HEALED, 99))], range(50))) == [0, 5 + HEALED]


def test_patience_doubles_each_time():
    """The second time it takes twenty silent steps, the third time forty: what sways is told seldom."""
    assert list(diagnosed([ill(range(1), range(11, 12), range(31, 32), range(72, 73))], range(99))) == [0, 11, 72]
    swaying = told(lambda step: ["layer0.weight"] if step % (HEALED + 1) == 0 else [])
    assert len(diagnosed([swaying], range(1000))) == 2


def test_only_the_stage_where_it_spoke_can_heal_it():
    """Silence at `used` says nothing of a rule that looks at `backward`."""
    found = diagnosed([ill(range(1), range(6, 7))], range(9), stages=("backward", "used"))
    assert list(found) == [0]
    found = diagnosed([ill(range(1), range(11, 12))], range(20), stages=("backward", "used"))
    assert list(found) == [0, 11]


def test_a_parameter_that_is_not_looked_at_does_not_heal():
    """Where two optimizers step in turn, each parameter's silence is counted in its own snapshots."""
    ruleset, history, steps = RuleSet([ill(range(1), range(18, 99))]), History(), []
    for step in range(30):
        history.append(snapshot(step, ("layer0.weight",) if step % 2 == 0 else ("layer1.weight",)))
        steps += [step] * len(ruleset(history))
    assert steps == [0]


def test_several_backwards_of_a_step_are_one_step_of_silence():
    """Patience counts steps."""
    ruleset, history, steps = RuleSet([ill(range(1), range(5, 9))]), History(), []
    for step in range(9):
        for backward in range(4):
            history.append(snapshot(step, MANY, backward=backward))
            steps += [step] * len(ruleset(history))
    assert steps == [0]


# --- floods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [FLOOD, FLOOD + 1])
def test_more_than_eight_parameters_are_told_as_one(count):
    """With how many, the first by name in model order, and all of them in `parameters`."""
    script = told(lambda step: reversed(MANY[:count]))
    (found,) = diagnosed([script], range(30)).values()
    if count == FLOOD:
        assert [f.parameter for f in found] == list(reversed(MANY[:count]))
        return
    (finding,) = found
    assert finding.parameter is None
    assert finding.parameters == MANY[:count]
    assert finding.value == count
    assert finding.seen.startswith(
        f"{count} of 20 parameters: layer0.weight, layer1.weight, layer2.weight, layer3.weight and"
    )
    assert f"and {count - NAMED} more; of the first: seen at 0" in finding.seen


def test_a_flood_is_of_one_rule_and_severity():
    """Errors are not hidden in a flood of warnings, nor a word on the model in one on parameters."""
    mixed = [(name, Severity.ERROR if i < 3 else Severity.WARNING) for i, name in enumerate(MANY)]
    (found,) = diagnosed([told(lambda step: [*mixed, None])], range(3)).values()
    assert [(f.severity, f.parameter, len(f.parameters)) for f in found] == [
        (Severity.ERROR, "layer0.weight", 0),
        (Severity.ERROR, "layer1.weight", 0),
        (Severity.ERROR, "layer2.weight", 0),
        (Severity.WARNING, None, 17),
        (Severity.WARNING, None, 0),
    ]


def test_what_comes_after_a_flood_is_told_by_itself():
    """Those of the flood are known; one more is new."""
    found = diagnosed([told(lambda step: MANY[: 10 + (step >= 3)])], range(6))
    assert {step: [f.parameter for f in fs] for step, fs in found.items()} == {0: [None], 3: ["layer10.weight"]}


def each(worded, count):
    """A rule that finds so many parameters at every step, and notes which it had to word."""

    def rule(history):
        newest = history.latest()

        def word(row):
            worded.append((newest.step, row))
            return Finding("each", newest.step, Severity.WARNING, "seen", newest.names[row])

        return RowFindings("each", Severity.WARNING, newest, range(count), word)

    return rule


@pytest.mark.parametrize("count", [FLOOD, FLOOD + 1])
def test_only_what_is_handed_on_is_worded(count):
    """Each finding once, and of a flood the first alone, though the rule repeats them a hundred times."""
    worded = []
    (found,) = diagnosed([each(worded, count)], range(100)).values()
    assert worded == ([(0, row) for row in range(FLOOD)] if count == FLOOD else [(0, 0)])
    assert [f.parameters or f.parameter for f in found] == (list(MANY[:FLOOD]) if count == FLOOD else [MANY[:count]])


def test_wording_that_raises_switches_the_rule_off():
    """As the rule itself would."""

    def rule(history):
        return RowFindings("each", Severity.WARNING, history.latest(), [0], lambda row: 1 / 0)

    with pytest.warns(GradlensWarning, match="ZeroDivisionError"):
        (found,) = diagnosed([rule], range(3)).values()
    assert found[0].rule == "rule"


# --- rules that fail ------------------------------------------------------------------------------------------------


class Broken:
    """A rule that counts how often it is asked, and raises."""

    name = "broken"

    def __init__(self, error, after=0):
        self.error, self.after, self.asked = error, after, 0

    def __call__(self, history):
        self.asked += 1
        if self.asked > self.after:
            raise self.error


def test_a_rule_that_raises_is_named_once_and_asked_no_more():
    """The others go on, and a warning and a finding say where it failed."""
    broken = Broken(ZeroDivisionError("by zero"), after=2)
    with pytest.warns(GradlensWarning, match="the rule broken raised ZeroDivisionError: by zero") as caught:
        found = diagnosed([broken, ill(range(5, 9))], range(9))
    assert len(caught) == 1
    assert broken.asked == 3
    assert list(found) == [2, 5]
    (finding,) = found[2]
    assert (finding.rule, finding.severity, finding.parameter) == ("broken", Severity.WARNING, None)
    assert "test_ruleset.py, line" in finding.seen
    assert "switched off" in finding.seen


def test_what_a_generator_said_before_it_raised_is_dropped():
    """Half an answer is none: the rule is switched off as a whole."""

    def half(history):
        yield Finding("half", 0, Severity.WARNING, "", "layer0.weight")
        raise KeyError("gone")

    with pytest.warns(GradlensWarning, match="KeyError"):
        (found,) = diagnosed([half], range(3)).values()
    assert [f.rule for f in found] == ["half"]
    assert "itself raised KeyError" in found[0].seen


def test_a_warning_that_is_an_error_does_not_stop_the_records():
    """Warnings filtered into errors are the user's business, and not on this thread."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = diagnosed([Broken(RuntimeError())], range(2)).values()
    assert "raised RuntimeError (" in found[0].seen


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Finding("one", 0, Severity.INFO, ""), "not a single one"),
        (["a text"], "not str"),
        ([None], "not NoneType"),
        (17, "not iterable"),
        (True, "not iterable"),
    ],
)
def test_what_is_no_list_of_findings_switches_the_rule_off(given, message):
    """With a word on what a rule is to give."""
    with pytest.warns(GradlensWarning, match=message):
        (found,) = diagnosed([lambda history: given], range(3)).values()
    assert message in found[0].seen


@pytest.mark.parametrize("nothing", [None, [], (), iter(())])
def test_finding_nothing_may_be_said_in_any_way(nothing):
    """None, an empty list, an empty generator."""
    assert diagnosed([lambda history: nothing], range(3)) == {}


def test_an_interrupt_is_not_swallowed():
    """Only exceptions are a rule's failure."""
    with pytest.raises(KeyboardInterrupt):
        diagnosed([Broken(KeyboardInterrupt())], range(1))


def test_an_empty_history_is_not_asked_about():
    """Rules are called once there is a snapshot."""
    broken = Broken(RuntimeError())
    assert RuleSet([broken])(History()) == []
    assert broken.asked == 0


def test_a_rule_is_named_as_its_findings_or_its_function():
    """Its `name`, its `__name__`, else its class."""

    class Plain:
        def __call__(self, history):
            return None

    class Odd(Plain):
        name = 7

    assert named(Broken(None)) == "broken"
    assert named(test_an_empty_history_is_not_asked_about) == "test_an_empty_history_is_not_asked_about"
    assert (named(Plain()), named(Odd())) == ("Plain", "Odd")
