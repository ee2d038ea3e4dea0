"""Models that say the same for every example."""

import numpy as np
import pytest

from gradlens import rules
from gradlens.analysis.rules.rare import rare_shares
from gradlens.facts import Graph, Operation
from gradlens.records import Stage
from tests.analysis.made import snapshot
from tests.analysis.rules.courses import falling, flat, graph, history_of, looks, rules_of

FELL = [0.4, 0.3, 0.2, 0.1, 0.02, 0.01]


@pytest.mark.parametrize(
    ("loss", "spreads", "outputs", "found"),
    [
        (flat(), FELL, None, True),
        (np.concatenate([falling(4.0, 0.5, 20), flat(0.5, 0.001, 180)]), FELL, None, True),  # it fell, and stands since
        (falling(), FELL, None, False),
        (flat(), [0.02] * 6, [0.01] * 6, True),  # it never passed anything on
        (flat(), [0.02] * 6, [0.01, 0.01, 0.02, 0.03, 0.05, 0.09], False),  # what it says begins to differ
        (flat(), [0.5] * 6, [0.1] * 6, False),
        (falling(), [0.4, 0.3, 0.2, 0.15, 0.14, 0.13], [1.0, 0.5, 0.1, 0.05, 0.01, 0.005], True),  # 0 by a constant
        (falling(), [0.5] * 6, [100.0, 50.0, 9.0, 2.0, 1.0, 1.0], False),  # weights that began too large
    ],
)
def test_features_or_outputs_that_no_longer_differ(loss, spreads, outputs, found):
    """Features that lost their spread, or an output that shrank as they drew together."""
    said = rules_of(rules.Collapse(), history_of(loss, *looks(spreads, outputs)))
    assert said == [("collapse", "warning")] * found


def test_features_that_never_differed_are_given_time():
    """A plateau at the start is no collapse yet."""
    assert rules_of(rules.Collapse(), history_of(flat(steps=60), *looks([0.02] * 6, [0.01] * 6), steps=60)) == []


def test_units_that_died_are_the_likely_reason():
    """Where all features are 0 for all examples."""
    (finding,) = rules.Collapse()(history_of(flat(), *looks(FELL, dead=0.95)))
    assert "died" in finding.causes[0]
    assert "95% of the features are 0" in finding.seen


@pytest.mark.parametrize(
    ("ratios", "steps", "found"),
    [
        ([0.05, 0.04, 0.02, 0.01, 0.01], 200, True),
        ([0.05, 0.2, 0.5, 0.8, 0.9], 200, False),
        ([0.05, 0.04, 0.02, 0.02, 0.03], 200, False),  # it wakes up
        ([0.05, 0.04, 0.02, 0.01, 0.01], 60, False),
    ],
)
def test_a_latent_that_the_decoder_gets_nothing_from(ratios, steps, found):
    """mu's deviation over the batch beside the noise, late in the run."""
    history = history_of(flat(steps=steps), *looks(ratios, layer="latent:mean", rms=1.0), steps=steps)
    assert rules_of(rules.EmptyLatent(), history) == [("empty_latent", "warning")] * found


def judge_and_maker():
    """The graphs of two losses, of which the first reaches one part and the second both."""
    d, g = (Operation("Leaf", (), (4,), {}, name) for name in ("D.weight", "G.weight"))
    return Graph((Operation("Mean", (1,), ()), d)), Graph((Operation("Mean", (1, 2), ()), d, g), backward=1)


@pytest.mark.parametrize(
    ("end", "norm", "found"), [(0.01, 0.01, True), (0.5, 0.01, False), (0.01, 0.9, False)], ids=["won", "even", "useful"]
)
def test_a_discriminator_that_has_won(end, norm, found):
    """Its loss is gone, and so is what it tells the generator."""
    history = history_of(
        flat(), *judge_and_maker(), loss_0=np.geomspace(1.4, end, 200), loss_1=flat(0.7), norm_1=np.geomspace(1.0, norm, 200)
    )
    assert rules_of(rules.DiscriminatorWon(), history) == [("discriminator_won", "warning")] * found


def batches(share, p, n=300, seed=0):
    """Gradients p - s of the output's bias, and losses, where p is said to every input."""
    s = np.random.default_rng(seed).binomial(64, share, n) / 64
    return p - s, -s * np.log(p) - (1 - s) * np.log(1 - p)


@pytest.mark.parametrize("share", [0.01, 0.03, 0.1])
def test_losses_that_follow_the_share_of_positives_give_the_share(share):
    """The level of the loss is the entropy of the answer, and the line explains all of it."""
    gradient, losses = batches(share, share)
    (found,), (slope,), fit = rare_shares(gradient[:, None], losses, [1])
    assert found == pytest.approx(share, rel=0.2)
    assert slope < 0
    assert fit > 0.99


@pytest.mark.parametrize(
    ("noise", "weight", "found"),
    [(0.002, 1, True), (0.3, 1, False), (0.002, 20, False)],
    ids=["constant answer", "an answer of its own", "weighted"],
)
def test_a_class_that_is_never_said(noise, weight, found):
    """Batch losses on a line over the bias's gradient; where the input matters, they leave it, and weights stretch it."""
    gradient, losses = batches(0.02, 0.02)
    gradient = weight * gradient
    losses = losses + np.abs(noise * np.random.default_rng(1).standard_normal(len(losses)))
    facts = [graph("BinaryCrossEntropyWithLogits", "Addmm"), *looks([0.5] * 4, layer="head")]
    history = history_of(losses, *facts, steps=300)
    for step, (g, loss) in enumerate(zip(gradient, losses, strict=True)):
        history.append(snapshot(step, ("head.weight", "head.bias"), Stage.BACKWARD, numel=[20, 1], sum=[0, g], loss=loss))
    assert rules_of(rules.RareClass(), history) == [("rare_class", "warning")] * found


def seen_batches(gradients, losses, *facts, outputs=1):
    """A history of backwards whose biases `a.bias, b.bias, ...` had these gradients, `[m, heads]`."""
    history = history_of(losses, *facts, steps=len(losses))
    names = tuple(f"{'abcdef'[i]}.bias" for i in range(gradients.shape[1]))
    for step, (row, loss) in enumerate(zip(gradients, losses, strict=True)):
        history.append(snapshot(step, names, Stage.BACKWARD, numel=[outputs] * len(names), sum=list(row), loss=loss))
    return history


def questions(*layers):
    """The graph of a sum of yes-or-no losses, one of each layer's output."""
    ops, n = [Operation("Add", tuple(range(1, len(layers) + 1)), ())], len(layers)
    ops += [Operation("BinaryCrossEntropyWithLogits", (n + 1 + i,), ()) for i in range(n)]
    ops += [Operation("Addmm", (2 * n + 1 + i,), (64, 1)) for i in range(n)]
    return Graph((*ops, *(Operation("Leaf", (), (1,), {}, f"{layer}.bias") for layer in layers)))


@pytest.mark.parametrize(
    ("noise", "found"), [((0.001, 0.001), True), ((0.001, 0.3), False), ((0.3, 0.3), False)], ids=["both", "one", "none"]
)
def test_several_heads_that_say_no_to_everything(noise, found):
    """Losses of two heads add up and lie on a plane; where one head has an answer of its own, they leave it."""
    parts = [batches(share, share, seed=i) for i, share in enumerate((0.02, 0.05))]
    rest = np.random.default_rng(5).standard_normal((2, len(parts[0][1])))
    losses = sum(part[1] for part in parts) + np.abs(np.asarray(noise) @ rest)
    history = seen_batches(np.column_stack([part[0] for part in parts]), losses, questions("a", "b"))
    said = list(rules.RareClass()(history))
    assert [finding.rule for finding in said] == ["rare_class"] * found
    if found:
        assert "2.0%" in said[0].seen
        assert "and" in said[0].seen


def test_losses_on_slices_of_one_layer_are_one_head():
    """Two losses on columns of one output add up: the level of both gives the share."""
    gradients, losses = batches(0.03, 0.03)
    ops = (
        Operation("Add", (1, 2), ()),
        *(Operation("BinaryCrossEntropyWithLogits", (i,), ()) for i in (3, 4)),
        *(Operation("Select", (5,), (64,)) for _ in range(2)),
        Operation("Addmm", (6,), (64, 2)),
        Operation("Leaf", (), (2,), {}, "a.bias"),
    )
    (finding,) = rules.RareClass()(seen_batches(2 * gradients[:, None], 2 * losses, Graph(ops), outputs=2))
    assert finding.value == pytest.approx(0.03, rel=0.2)


def pairs(*distance):
    """The graph of a distance between two answers of one layer, or of one answer and what the loop gives."""
    same = (3, 4) if "targets" not in distance else (3, -1)
    ops = (
        Operation("Mean", (1,), ()),
        Operation("Pow", (2,), (8, 4)),
        Operation("Sub", same, (8, 4)),
        Operation("Addmm", (5,), (8, 4)),
        Operation("Addmm", (5,), (8, 4)),
        Operation("Leaf", (), (4,), {}, "a.bias"),
    )
    return Graph(ops)


@pytest.mark.parametrize(
    ("facts", "outputs", "found"),
    [
        (pairs(), [1.0, 0.5, 0.3, 0.2, 0.1, 0.08, 0.06], True),
        (pairs("targets"), [1.0, 0.5, 0.3, 0.2, 0.1, 0.08, 0.06], False),
        (pairs(), [1.0, 0.5, 0.3, 0.2, 0.06, 0.05, 0.06], False),  # it grows again
        (pairs(), [0.06, 0.08, 0.1, 0.2, 0.3, 0.5, 1.0], False),
    ],
)
def test_answers_that_are_compared_with_each_other(facts, outputs, found):
    """Nothing but a collapse makes them shrink from look to look; where there are targets, they may."""
    history = history_of(falling(), facts, *looks([0.6] * 7, outputs))
    assert rules_of(rules.Collapse(), history) == [("collapse", "warning")] * found
