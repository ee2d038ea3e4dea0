"""What is new of what rules say."""

import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradlens.analysis.history import History
from gradlens.analysis.rules.base import ColumnRule, RowFindings, newest_of
from gradlens.analysis.ruleset import FLOOD, HEALED, NAMED, RuleSet, named
from gradlens.errors import GradlensWarning
from gradlens.records import Finding, Parameters, Severity
from tests.analysis.made import snapshot
from tests.analysis.test_blocks import blocked

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


class Rows(ColumnRule):
    """Holds where a sum is above 0; an error at moments whose scale is 2. Its findings are worded late, or all at once."""

    name = "rows"

    def __init__(self, *, settled, late):
        self.settled, self.late = settled, late

    def holds(self, columns):
        return columns.column("sum").astype(np.int8)

    def findings(self, history, rows):
        newest = newest_of(history)
        severity = Severity.ERROR if newest.scale[0] == 2 else Severity.WARNING

        def word(row):
            return Finding("rows", newest.step, severity, f"seen at {newest.step}, {newest.backward}", newest.names[row])

        found = RowFindings("rows", severity, newest, rows, word)
        return found if self.late else list(found)


def defined(moments):
    """`[(moment, name, severity)]` that are new, by the definition: of each illness, for how many steps each stage where
    it was told has been silent about it."""
    illnesses, times, new = {}, {}, []
    for at, (step, stage, names, ill, severity) in enumerate(moments):
        told = [names[row] for row in sorted(ill) if row < len(names)]
        for name in told:
            if name not in illnesses:
                times[name] = times.get(name, 0) + 1
                illnesses[name] = [severity, {}]
                new.append((at, name, severity))
            elif severity.rank > illnesses[name][0].rank:
                illnesses[name][0] = severity
                new.append((at, name, severity))
            illnesses[name][1][stage] = {step}
        for name in [name for name in illnesses if name in names and name not in told]:
            silent = illnesses[name][1]
            if stage in silent:
                silent[stage] |= {step}  # with the step at which it was told
                if len(silent[stage]) > HEALED * 2 ** (times[name] - 1):
                    del silent[stage]
            if not silent:
                del illnesses[name]
    return new


some = st.sets(st.integers(0, 5), max_size=3)
severities = st.sampled_from((Severity.WARNING, Severity.WARNING, Severity.ERROR))
places = st.sampled_from(
    [("backward", MANY[:6])] * 4 + [("used", MANY[:6]), ("backward", MANY[:3]), ("backward", MANY[3:6])]
)
stretch = st.tuples(st.lists(places, min_size=1, max_size=2), some, severities, st.sampled_from((1, 3, 9, 11, 12, 25)))


ONE = [("backward", MANY[:6])]


def of_one(*ill, also=()):
    """Stretches in which a row is ill or not, of so many moments each."""
    return [(ONE, {0, *also} if i % 2 == 0 else set(also), Severity.WARNING, n) for i, n in enumerate(ill)]


@example(of_one(3, 12, 3), 500, 1, True, True)  # healed within a block: worded as it is now
@example(of_one(3, 12, 3, also=[1]), 500, 1, True, True)
@example(of_one(3, 19, 3, also=[1]), 4, 2, True, True)  # silent on nine steps and the rest of that at which it was told
@example(of_one(3, 21, 3, also=[1]), 4, 2, True, True)  # on ten
@settings(deadline=None, max_examples=100)
@given(st.lists(stretch, max_size=7), st.sampled_from((1, 4, 50, 500)), st.integers(1, 2), st.booleans(), st.booleans())
def test_what_is_new_is_what_its_definition_says(stretches, together, a_step, settled, late):
    """Whatever rows are ill, on which stage, in which part of the model and how badly, how many moments are asked about at
    once, and whether their findings are worded late: the same ones are new, at the same moments, with the words of these."""
    kinds = [(*where[i % len(where)], ill, severity) for where, ill, severity, n in stretches for i in range(n)]
    moments = [(at // a_step, *kind) for at, kind in enumerate(kinds)]
    settled &= len({severity for *_, severity in moments}) < 2
    history, ruleset, found = History(maxlen=1000), RuleSet([Rows(settled=settled, late=late)]), []
    of = {names: Parameters(names, ((4,),) * len(names), ("float32",) * len(names)) for _, _, names, *_ in moments}
    snapshots = []
    for at, (step, stage, names, ill, severity) in enumerate(moments):
        scale, sums = 2.0 if severity == Severity.ERROR else 1.0, [float(row in ill) for row in range(len(names))]
        snapshots.append(snapshot(step, names, stage, backward=at, scale=scale, sum=sums, parameters=of[names]))
    for start in range(0, len(moments), together):
        history.extend(blocked(snapshots[start : start + together]))
        found += ruleset.ask(history)
    assert [(at, finding.parameter, finding.severity) for at, finding in found] == defined(moments)
    assert [finding.seen for _, finding in found] == [f"seen at {moments[at][0]}, {at}" for at, _ in found]


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
