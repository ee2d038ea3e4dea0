"""Findings do not depend on how steps fall into blocks."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens.analysis import rules
from gradlens.analysis.history import History
from gradlens.analysis.rules.base import ColumnRule, RowFindings, lasting, newest_of
from gradlens.analysis.rules.occasional import Occasional
from gradlens.analysis.ruleset import RuleSet
from gradlens.analysis.streaks import Streaks
from gradlens.blocks import Block, block_of, grouped
from gradlens.facts import Features, Graph, Group, Modes, Operation, Settings
from gradlens.records import Finding, Parameters, Severity
from tests.analysis.made import snapshot

WHOLE = Parameters(
    ("a.weight", "a.bias", "b.weight", "c.weight"),
    ((4, 4), (4,), (4, 4), (2, 2)),
    ("float32", "float32", "bfloat16", "float16"),
)
#: Rules that look at columns. The others look at the run as a whole, now and then.
OF_COLUMNS = [rule for rule in rules.DEFAULT if not isinstance(rule, Occasional)]
MARKS = st.lists(st.sampled_from([-1, 0, 1, 1, 1]), min_size=4, max_size=4)
PART = Parameters(("a.weight", "c.weight"), ((4, 4), (2, 2)), ("float32", "float16"))
STATUSES = ["frozen", "uncaptured", "absent", "excluded", "undefined", "nonfinite", "zero", "ok", "ok", "ok"]
SIZES = [0.0, 1e-12, 1e-3, 1.0, 1e4, 1e9]


@st.composite
def histories(draw, most=30, losses=False):
    """Snapshots as lenses give them: several backwards, one or two optimizers, wild numbers that stay for a while."""
    made, step = [], 0
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    turns = draw(st.booleans())
    course = _losses(rng, most) if losses and draw(st.booleans()) else None
    wild = {}
    for number in range(draw(st.integers(1, most))):
        if not wild or rng.random() < 0.2:
            wild = _wild(rng)
        backwards = int(rng.choice([1, 1, 2]))
        loss = None if course is None else course[number]
        for backward in range(backwards):
            made.append(_moment(step, WHOLE, "backward", backward, rng, wild, loss))
        if rng.random() < 0.9:
            used = PART if turns and step % 2 else WHOLE
            made.append(_moment(step, used, "used", backwards - 1, rng, wild, loss))
        step += int(rng.choice([1, 1, 1, 2, 7]))
    return made


def _losses(rng, most):
    """Losses that fall, stay, rise, change their sign or end, and turn somewhere."""
    slope = rng.choice([-0.02, 0.0, 0.05], 2)
    turn = rng.integers(1, most)
    steps = np.arange(most)
    course = np.where(steps < turn, slope[0] * steps, slope[0] * turn + slope[1] * (steps - turn))
    result = rng.choice([1.0, 1.0, 0.0]) + course + rng.choice([0.0, 0.01, 0.3]) * rng.standard_normal(most)
    result[rng.integers(0, most) :] *= rng.choice([1.0, 1.0, np.nan])
    return result


def facts_of(snapshots, seed):
    """What is known beside the columns, each with the place of the first moment that knows it."""
    rng, result = np.random.default_rng(seed), []
    lr = dict.fromkeys(range(rng.integers(1, 3)), 0.1)
    features = rng.choice([1.0, 0.01])
    for place, one in enumerate(snapshots):
        if one.stage != "backward":
            continue
        kinds = rng.random(5) < 0.3
        if kinds[0] or not place:
            for index in lr:
                lr[index] *= float(rng.choice([1.0, 1.0, 1e-6, 1e3]))
                decay, eps = float(rng.choice([0.0, 0.1])), float(rng.choice([1e-8, 1e-3]))
                strange = ((3,),) * int(rng.integers(0, 2))
                group = Group(lr[index], decay, eps, parameters=WHOLE.names[:2], strange=strange, dtypes=("float16",))
                result.append((place, Settings(one.step, str(rng.choice(["SGD", "LBFGS"])), index, (group,))))
        if kinds[1]:
            result.append((place, _graph(rng, one)))
        if kinds[2]:
            evaluated = ("drop",) * int(rng.integers(0, 2))
            result.append((place, Modes(one.step, not evaluated, evaluated, dropout=evaluated)))
        if kinds[3]:
            spread, rms = features * float(rng.choice([1.0, 0.01])), float(rng.choice([1.0, 100.0]))
            layer = str(rng.choice(["", "c", "input:a", "latent:mu"]))
            result.append((place, Features(one.step, one.backward, layer, spread, rms, 0.0)))
    return result


def _graph(rng, one):
    """Of a loss that is softmax taken twice, or not."""
    names = ["NllLoss", "LogSoftmax", *(["Softmax"] * int(rng.integers(0, 2))), "Addmm"]
    operations = [Operation(name, (i + 1,), (4, 2), {"dim": 1}) for i, name in enumerate(names)]
    leaf = Operation("AccumulateGrad", (), (4, 4), leaf="a.weight")
    return Graph((*operations, leaf), one.step, one.backward, one.scalars.get("loss"))


def _wild(rng):
    return {
        "status": rng.choice(STATUSES, 4),
        "square_sum": rng.choice(SIZES, 4),
        "weight_square_sum": rng.choice(SIZES, 4),
        "update_square_sum": rng.choice(SIZES, 4),
        "update_before_square_sum": rng.choice(SIZES, 4),
        "update_used_square_sum": rng.choice([1.0, np.nan], 4),
        "update_numel": rng.choice([0, 100], 4),
        "update_stuck": rng.choice([0, 60, 100], 4),
        "sum": rng.choice([0.0, 1.0, 3.0], 4),
        "nan": rng.choice([0, 0, 3], 4),
        "scale": rng.choice([1.0, 1.0, 65536.0, np.nan]),
    }


def _moment(step, parameters, stage, backward, rng, wild, loss):
    rows = [WHOLE.names.index(name) for name in parameters.names]
    columns = {name: np.asarray(values)[rows] for name, values in wild.items() if name not in ("scale", "status")}
    if rng.random() < 0.1:
        columns["square_sum"] = columns["square_sum"] * rng.choice([0.0, 1e6])
    return snapshot(
        step, parameters.names, stage, backward=backward, parameters=parameters, scale=wild["scale"],
        status=[str(wild["status"][row]) for row in rows], loss=float(rng.random()) if loss else None, **columns,
    )  # fmt: skip


def blocked(snapshots):
    """The same as blocks, and the moments in their order."""
    numbers = grouped([(one.stage, one.parameters) for one in snapshots])
    groups = [
        [one for one, at in zip(snapshots, numbers, strict=True) if at == number] for number in range(max(numbers) + 1)
    ]
    blocks, seen, order = [_joined(group) for group in groups], [0] * len(groups), []
    for number in numbers:
        order.append((blocks[number], seen[number]))
        seen[number] += 1
    return order


def _joined(group):
    parts = [block_of(one) for one in group]

    def over(name):
        return np.concatenate([getattr(part, name) for part in parts])

    return Block(
        parts[0].stage, parts[0].parameters, *(over(name) for name in ("step", "backward", "time", "status", "scale")),
        {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
        [None] * len(parts), [one.scalars for one in group],
    )  # fmt: skip


def split(snapshots, sizes):
    """Stretches of these sizes, over and over."""
    at, k = 0, 0
    while at < len(snapshots):
        size = sizes[k % len(sizes)]
        yield snapshots[at : at + size]
        at, k = at + size, k + 1


def by_hand(history):
    """A user's rule, which looks at each moment and back."""
    newest = history.latest()
    for row in lasting(history, lambda table: table.column("square_sum") > 100, 2):
        yield Finding("by_hand", newest.step, Severity.INFO, f"{len(history)} {newest.stage}", newest.names[row])


def found_in(blocks, facts=(), **options):
    """What all rules and a user's find in a run, and what course and diagnosis are at its end."""
    ruleset, history = RuleSet([*rules.DEFAULT, by_hand]), History(**options)
    result, seen = [], 0
    for moments in blocks:
        history.extend(moments, [(place - seen, fact) for place, fact in facts if seen <= place < seen + len(moments)])
        result += ruleset(history)
        history.trim()
        seen += len(moments)
    result += ruleset.last(history)
    assert not [finding for finding in result if "the rule itself raised" in finding.seen]
    return [(f.rule, f.step, f.parameter, f.parameters, f.severity, str(f)) for f in result], history.course.losses()


@settings(max_examples=60, deadline=None)
@given(
    histories(most=60, losses=True),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 80), min_size=1, max_size=4),
    st.sampled_from([1000, 7]),
)
def test_findings_do_not_depend_on_blocks(snapshots, seed, sizes, maxlen):
    """All built-in rules and a user's, with losses, graphs and settings, cut anywhere; nor does a short memory matter."""
    facts = facts_of(snapshots, seed)
    singly = found_in(([(block_of(one), 0)] for one in snapshots), facts, maxlen=maxlen)
    together = found_in((blocked(part) for part in split(snapshots, sizes)), facts, maxlen=maxlen)
    assert together == singly


@settings(max_examples=25, deadline=None)
@given(histories(), st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_a_block_says_what_its_snapshots_say(snapshots, sizes):
    """Each rule at each moment, asked by itself: the conditions over blocks find what the rule finds with a history."""
    history, expected = History(), []
    for one in snapshots:
        history.append(one)
        expected += [[(f.parameter, f.severity) for f in rule(history)] for rule in OF_COLUMNS]
    history, seen = History(), []
    for part in split(snapshots, sizes):
        history.extend(blocked(part))
    for moment in history.since(-1):
        until = history.until(moment)
        seen += [[(f.parameter, f.severity) for f in rule(until)] for rule in OF_COLUMNS]
    assert seen == expected


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([WHOLE, PART]), MARKS), min_size=1, max_size=30),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 4),
)  # fmt: skip
def test_a_streak_is_what_looking_back_finds(script, sizes, steps):
    """`Streaks`, block by block, agrees with `lasting`, which looks back at each moment."""
    snapshots, step = [], 0
    for later, parameters, marks in script:
        step += later
        marks = marks[: len(parameters)]
        snapshots.append(snapshot(step, parameters.names, parameters=parameters, sum=marks))
    history, expected = History(), []
    for one in snapshots:
        history.append(one)
        expected.append(lasting(history, lambda table: table.column("sum").astype(np.int8), steps))
    history, streaks, seen = History(), Streaks(steps), {}
    for part in split(snapshots, sizes):
        for columns in history.extend(blocked(part)):
            lasts = streaks.lasting(columns, columns.column("sum").astype(np.int8))
            seen |= {moment.seq: np.flatnonzero(row).tolist() for moment, row in zip(columns.moments, lasts, strict=True)}
    assert [seen[seq] for seq in range(len(snapshots))] == expected


class Counting(ColumnRule):
    """A rule that counts what it is asked, and finds where the mark is 1."""

    name = "counting"
    settled = True

    def __init__(self):
        self.blocks, self.worded = 0, 0

    def holds(self, columns):
        self.blocks += 1
        return columns.column("sum").astype(np.int8)

    def findings(self, history, rows):
        self.worded += 1
        newest = newest_of(history)
        return RowFindings(self.name, Severity.INFO, newest, rows, lambda row: Finding("counting", newest.step, "info", ""))


def test_one_question_a_block():
    """A thousand steps are one question; while the same rows stay ill, nothing more is asked."""
    rule, history = Counting(), History(maxlen=5000)
    ruleset, one = RuleSet([rule]), Parameters(("a",), ((4,),), ("float32",))
    history.extend(blocked([snapshot(step, ("a",), sum=step >= 500, parameters=one) for step in range(1000)]))
    assert len(ruleset(history)) == 1
    assert (rule.blocks, rule.worded) == (1, 1)
    history.extend(blocked([snapshot(step, ("a",), sum=1, parameters=one) for step in range(1000, 2000)]))
    assert ruleset(history) == []
    assert (rule.blocks, rule.worded) == (2, 1)
