"""Several backwards a step: those whose gradients were thrown away, and losses that were not divided."""

import numpy as np
import pytest

from gradlens import rules
from gradlens.facts import Graph, Operation
from gradlens.records import Stage
from tests.analysis.made import last
from tests.analysis.made import snapshot as made
from tests.analysis.rules.courses import falling, flat, graph, history_of, rules_of, settings

#: The sums of three micro-batches' gradients, of two parameters.
PARTS = [np.array([0.3, -0.2]), np.array([0.1, 0.5]), np.array([-0.4, 0.25])]


def one(step, sums, stage=Stage.BACKWARD, **more):
    return made(step, stage=stage, sum=sums, **more)


def step(number, used, *, parts=PARTS, weights=None):
    """A step of several backwards, and what its optimizer used."""
    weights = weights or [1.0] * len(parts)
    squares = [0.01 * (i + 1) for i in range(len(parts))]
    given = [
        one(number, part, backward=i, weight_square_sum=weights[i], square_sum=squares[i]) for i, part in enumerate(parts)
    ]
    return [*given, one(number, used, Stage.USED, backward=len(parts) - 1, square_sum=squares[-1])]


def run(*steps):
    return [each for part in steps for each in part]


# --- LastOnly -------------------------------------------------------------------------------------------------------


def test_the_last_gradient_alone_on_three_steps():
    """What the others gave was thrown away; two steps do not say so yet."""
    thrown = [step(k, PARTS[-1]) for k in range(3)]
    assert last(rules.LastOnly(), *run(*thrown[:2])) == []
    (finding,) = last(rules.LastOnly(), *run(*thrown))
    assert "the last of 3 backwards alone" in finding.seen
    assert finding.value == 3.0


@pytest.mark.parametrize(
    "steps",
    [
        [step(k, sum(PARTS)) for k in range(3)],
        [step(0, PARTS[-1]), step(1, sum(PARTS)), step(2, PARTS[-1])],
        [step(k, PARTS[-1], weights=[1.0, 1.1, 1.2]) for k in range(3)],
        [step(k, PARTS[0], parts=PARTS[:1]) for k in range(3)],
    ],
    ids=["they add up", "one step adds up", "weights moved between (SAM)", "one backward"],
)
def test_steps_that_use_what_they_should(steps):
    """Sums are the rule; a method that moves the weights between two passes means the last one."""
    assert last(rules.LastOnly(), *run(*steps)) == []


def test_sums_that_are_always_0_tell_nothing():
    """As those of the last layer under cross entropy: the other parameter decides."""
    zeros = [np.array([0.0, part[1]]) for part in PARTS]
    assert last(rules.LastOnly(), *run(*(step(k, zeros[-1], parts=zeros) for k in range(3))))
    nothing = [np.zeros(2)] * 3
    assert last(rules.LastOnly(), *run(*(step(k, nothing[-1], parts=nothing) for k in range(3)))) == []


# --- Undivided ------------------------------------------------------------------------------------------------------


def history(loss, *facts, parts=PARTS, used=None):
    """Three steps at the end of a run."""
    whole = history_of(loss, *facts, newest=made(step=0))
    for number in range(197, 200):
        for each in step(number, sum(parts) if used is None else used, parts=parts):
            whole.append(each)
    return whole


@pytest.mark.parametrize(("loss", "severity"), [(flat(), "warning"), (falling(), "info")])
def test_a_sum_of_losses_that_were_not_divided(loss, severity):
    """Loud where the loss does not fall: a smaller learning rate makes up for it."""
    asked = history(loss, graph("NllLoss", "LogSoftmax", "Addmm"), settings())
    assert rules_of(rules.Undivided(), asked) == [("undivided", severity)]
    (finding,) = rules.Undivided()(asked)
    assert "the gradients of 3 backwards are summed and their losses are not divided by 3" in finding.seen


def test_a_sum_that_ended_in_nan():
    """The last steps before it are asked, and it is what made the loss NaN."""
    loss = np.append(flat(steps=190), np.full(10, np.nan))
    asked = history_of(loss, graph("NllLoss", "LogSoftmax", "Addmm"), settings(), newest=made(step=0))
    for number in range(180, 200):
        for each in step(number, sum(PARTS)):
            if number >= 190:
                each = one(number, np.full(2, np.nan), each.stage, backward=each.backward, status=["nonfinite"] * 2)
            asked.append(each)
    assert rules_of(rules.Undivided(), asked) == [("undivided", "warning")]


@pytest.mark.parametrize(
    "asked",
    [
        history(flat(), graph("Div", "NllLoss"), settings()),
        history(flat(), graph("Mul", "NllLoss"), settings()),
        history(flat(), graph("NllLoss"), settings(), parts=PARTS[:2]),
        history(flat(), graph("NllLoss"), settings(), used=PARTS[-1]),
        history(flat(), settings()),
    ],
    ids=["divided", "times a third", "two backwards", "the last alone", "no graph"],
)
def test_accumulation_as_it_should_be(asked):
    """A loss that was divided, two losses of one step, and what other rules say are left alone."""
    assert rules_of(rules.Undivided(), asked) == []


# --- LeftOver -------------------------------------------------------------------------------------------------------


def looked(*left, backward=0):
    """Looks at the first backward of steps, each with what was in `.grad`."""
    return [Graph((Operation("NllLoss"),), step, backward, left=share) for step, share in enumerate(left)]


def over_ranks(*facts, stage=Stage.REDUCED):
    return history_of(flat(), *facts, newest=made(step=199, stage=stage))


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        (looked(0.0, 1.0, 1.0, 1.0), True),
        (looked(0.0, 1.0, 1.0), False),
        (looked(0.0, 1.0, 0.5, 1.0), False),
        (looked(0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0), True),
        (looked(0.0, *[float("nan")] * 4), False),
        (looked(0.0, 1.0, 1.0, 1.0, backward=1), False),
    ],
)
def test_gradients_that_are_there_as_a_step_begins(facts, found):
    """At three looks in a row, over ranks, at the first backward of a step."""
    assert rules_of(rules.LeftOver(), over_ranks(*facts)) == [("left_over", "warning")] * found


def test_one_process_is_asked_by_another_rule():
    """`Stale` compares the numbers themselves there."""
    assert rules_of(rules.LeftOver(), over_ranks(*looked(0.0, 1.0, 1.0, 1.0), stage=Stage.BACKWARD)) == []
