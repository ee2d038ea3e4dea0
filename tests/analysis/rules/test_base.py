"""What rules are made of: what lasts, what is remembered, what stands for a layer."""

import gc
import weakref

import numpy as np
import pytest

from gradlens.analysis.history import History
from gradlens.analysis.rules.base import (
    RowFindings,
    by_layer,
    consumed,
    format_number,
    judged,
    last_layer,
    lasting,
    layout,
    on_steps,
    remembered,
)
from gradlens.records import Finding, Parameters, Severity, Stage
from tests.analysis.made import snapshot

ABC = ("a", "b", "c")


def filled(*snapshots):
    history = History()
    for one in snapshots:
        history.append(one)
    return history


def marked(step, values, names=ABC, **options):
    """A snapshot whose column `sum` says what the condition holds of."""
    return snapshot(step, names, sum=values, **options)


def is_marked(one):
    return one.column("sum").astype(np.int8)


# --- what lasts -----------------------------------------------------------------------------------------------------


def test_it_lasts_where_it_held_at_each_of_the_steps():
    """In as many steps as are asked for, and not in fewer."""
    history = filled(marked(0, [1, 1, 0]), marked(1, [1, 0, 1]), marked(2, [1, 1, 1]))
    assert lasting(history, is_marked, 1) == [0, 1, 2]
    assert lasting(history, is_marked, 2) == [0, 2]
    assert lasting(history, is_marked, 3) == [0]
    assert lasting(history, is_marked, 4) == []
    assert lasting(History(), is_marked, 1) == []


def test_what_cannot_be_said_neither_holds_nor_breaks():
    """Of a step's several snapshots one must be able to say; a step of which nothing is known breaks it."""
    history = filled(marked(0, [1, -1, 1]), marked(0, [-1, -1, 0], backward=1), marked(1, [1, 1, 1]))
    assert lasting(history, is_marked, 2) == [0]


def test_steps_that_were_not_observed_do_not_count():
    """Ten observed steps may be a thousand steps."""
    assert lasting(filled(*(marked(100 * k, [1, 0, 0]) for k in range(10))), is_marked, 10) == [0]


def test_each_stage_has_its_own_steps():
    """A condition is asked of the newest snapshot's stage."""
    history = filled(*(marked(k, [1, 0, 0], stage=s) for k in range(3) for s in ("backward", "used")))
    assert lasting(history, is_marked, 3) == [0]
    assert lasting(history, is_marked, 4) == []


def test_rows_are_followed_by_name_when_the_model_changes():
    """A parameter that came later has not lasted, and one that moved to another row has."""
    history = filled(marked(0, [0, 1], ("x", "b")), marked(1, [1, 1, 1]))
    assert lasting(history, is_marked, 2) == [1]


def test_it_looks_no_further_back_than_it_has_to():
    """The newest snapshot alone is asked while nothing is ill, and the look back ends where nothing is left."""
    asked = []

    def condition(one):
        asked.append(one.step)
        return is_marked(one)

    history = filled(*(marked(k, [k != 4, 0, 0]) for k in range(10)))
    lasting(history, condition, 10)
    assert asked == [9, 9, 8, 7, 6, 5, 4]
    history.append(marked(10, [0, 0, 0]))
    asked.clear()
    lasting(history, condition, 10)
    assert asked == [10]


# --- what is remembered ---------------------------------------------------------------------------------------------


class Counting:
    """A rule's condition that counts what it is asked."""

    def __init__(self):
        self.asked = []

    @remembered
    def marked(self, one):
        self.asked.append(one.step)
        return is_marked(one)


def test_a_snapshot_is_asked_about_once():
    """Looking back at ten steps after each of a hundred asks a hundred times, for each rule by itself."""
    one, other, history = Counting(), Counting(), History()
    for step in range(100):
        history.append(marked(step, [1, 0, 0]))
        lasting(history, one.marked, 10)
    assert one.asked == list(range(100))
    assert lasting(history, other.marked, 2) == [0]
    assert other.asked == [99, 98]


def test_an_answer_leaves_with_its_snapshot():
    """Nothing is kept of snapshots that are gone."""
    condition = remembered(is_marked)
    one = marked(0, [1, 1, 1])
    answer = weakref.ref(condition(one))
    assert condition(one) is answer()
    del one
    gc.collect()
    assert answer() is None


def test_findings_of_rows_are_worded_when_read():
    """Each time that somebody reads them, and not before."""
    worded = []

    def word(row):
        worded.append(row)
        return Finding("r", 0, Severity.INFO, "", ABC[row])

    each = RowFindings("r", Severity.INFO, snapshot(0, ABC), [2, 0], word)
    assert worded == []
    assert [finding.parameter for finding in each] == ["c", "a"]
    assert worded == [2, 0]


# --- layers ---------------------------------------------------------------------------------------------------------

MIXED = Parameters(
    ("scale", "a.bias", "a.weight", "norm.weight", "b.x.weight", "b.y", "a.extra"),
    ((), (4,), (4, 4), (4,), (4, 4), (2, 2), (3, 3)),
    ("float32", "bfloat16", "bfloat16", "float32", "float8_e5m2", "float64", "complex64"),
)


def test_a_layer_is_what_one_module_owns():
    """Its first weight stands for it, or its first parameter where it has none; a lone one owns itself."""
    where = layout(MIXED)
    assert [MIXED.names[row] for row in where.front] == ["scale", "a.weight", "norm.weight", "b.x.weight", "b.y"]
    assert where.weighty.tolist() == [False, True, False, True, True]
    assert where.layer.tolist() == [0, 1, 1, 2, 3, 4, 1]
    assert where.narrow.tolist() == [False, False, True, False, True, False, False]
    assert layout(Parameters(MIXED.names, MIXED.shapes, MIXED.dtypes)) is where


def test_the_largest_value_speaks_for_a_layer():
    """Unknown ones do not count, and a layer of which nothing is known has none."""
    one = snapshot(0, MIXED.names, parameters=MIXED)
    values = np.asarray([1.0, 5.0, np.nan, np.nan, -2.0, 3.0, 4.0])
    assert by_layer(one, values).tolist() == [1.0, 5.0, -np.inf, -2.0, 3.0]
    assert by_layer(snapshot(0, ()), np.empty(0)).tolist() == []


def test_the_last_whole_layer_is_found_by_its_judged_rows():
    """Rows that are frozen do not speak for their layer, and a layer of frozen rows alone is none."""
    names = ("a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias")
    one = snapshot(0, names, status=["ok", "ok", "ok", "frozen", "frozen", "frozen"])
    assert last_layer(one, [0, 1, 2]) == "b"
    assert last_layer(one, [0, 1]) == "a"
    assert last_layer(one, [0]) == last_layer(one, []) == ""


def test_judged_are_those_with_a_gradient_of_their_own():
    """Zero and non-finite ones included."""
    words = ["frozen", "uncaptured", "absent", "excluded", "undefined", "nonfinite", "zero", "ok"]
    assert judged(snapshot(0, tuple("abcdefgh"), status=words)).tolist() == [False] * 5 + [True] * 3


# --- words and edges ------------------------------------------------------------------------------------------------


def test_consumed_is_the_used_gradient_where_there_is_one():
    """Else whatever is read."""
    assert consumed(filled(snapshot(0)))
    assert consumed(filled(snapshot(0, stage=Stage.ACCUMULATED)))
    both = filled(snapshot(0), snapshot(0, stage=Stage.USED))
    assert consumed(both)
    both.append(snapshot(1))
    assert not consumed(both)
    assert not consumed(History())


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1.0, "1"), (0.0012345, "0.00123"), (1.2e-7, "1.2e-07"), (12345.0, "1.2e+04")]
)
def test_numbers_have_few_digits(value, text):
    """Three at most, and powers of ten where they are very large or small."""
    assert format_number(value) == text


def test_one_step_is_this_step():
    """A rule that looks at one step does not speak of the last 1."""
    assert on_steps(1) == "at this step"
    assert on_steps(3) == "at each of the last 3 observed steps"
