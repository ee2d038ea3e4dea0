"""The page of text: what it says of few and of many parameters, and of one weight."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from gradlens import fields
from gradlens.activations import Activations
from gradlens.analysis.diagnosis import diagnose
from gradlens.analysis.history import History
from gradlens.analysis.trend import State, Trend
from gradlens.records import Finding, Severity, Stage, Top
from gradlens.writers import report
from tests.analysis.made import snapshot


def history(*snapshots):
    result = History()
    for one in snapshots:
        result.append(one)
    return result


def finding(parameter="a.weight", severity=Severity.WARNING, rule="mine", step=3, **more):
    given = {"seen": f"what was seen of {parameter}", "causes": ("this", "that"), "remedy": "do it"}
    return Finding(rule=rule, step=step, severity=severity, parameter=parameter, **(given | more))


def used(step=0, names=("a.weight", "a.bias"), **columns):
    moved = {"update_numel": 100, "update_square_sum": 1e-6, "update_before_square_sum": 1.0, "update_moving": 100}
    return snapshot(step, names, Stage.USED, **(moved | columns))


def rows_of(page, heading):
    """The lines below a heading, up to the next empty line."""
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading))
    stop = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    return lines[start + 1 : stop]


def test_the_page_has_its_parts_in_order():
    """Title, health, directions, weights, updates, cost: each once, health first."""
    page = report.text(history(used(top=True)), [finding()], overhead="1 % of the time", title="gradlens: runs/x")
    heads = [line.split(" ")[0].rstrip(":,") for line in page.splitlines() if line and line[0] != " "]
    assert heads == ["gradlens", "HEALTH", "DIRECTIONS", "MOST", "UPDATES", "COST"]
    assert page.splitlines()[0] == "gradlens: runs/x"
    assert page.splitlines()[-1] == "  1 % of the time"


LAYERS = ("0.weight", "0.bias", "1.weight", "2.weight", "3.weight", "4.weight")


def test_the_flow_says_how_the_size_changes_from_layer_to_layer():
    """In powers of ten below the largest weight matrix; biases are left out, what is all 0 or not finite is named."""
    status = ["ok", "ok", "ok", "zero", "nonfinite", "ok"]
    seen = history(used(names=LAYERS, status=status, square_sum=[1e-14, 1.0, 1e-8, 0.0, math.nan, 1e-2]))
    *sized, picture, powers = [line.strip() for line in rows_of(report.text(seen, []), "LAYER FLOW")]
    assert " ".join(sized) == (
        "first 1.0e-08 (0.weight), last 0.01 (4.weight); smallest 1.0e-08 (0.weight), largest 0.01 (4.weight)"
    )
    assert picture == "powers of ten below the largest, from layer to layer:"
    assert powers == "6 3 none nan 0"


def test_the_flow_of_a_deep_model_is_evenly_thinned():
    """First and last stay, and how many of how many are shown is said."""
    names = tuple(f"{i}.weight" for i in range(100))
    sizes = [10.0 ** (-2 - 2 * (i // 10)) for i in reversed(range(100))]  # ten layers a power of ten
    lines = rows_of(report.text(history(used(names=names, square_sum=sizes)), []), "LAYER FLOW")
    shown = lines[-1].split()
    assert "(24 of 100)" in lines[-2]
    assert len(shown) == 24
    assert (shown[0], shown[-1]) == ("9", "0")
    assert shown == sorted(shown, key=int, reverse=True)


@pytest.mark.parametrize(
    ("names", "status"),
    [(("a.weight", "a.bias"), None), (("a.weight", "b.weight"), ["frozen", "ok"]), (LAYERS, ["zero"] * 6)],
)
def test_there_is_no_flow_of_less_than_two_layers(names, status):
    """Nor of partials that are all 0."""
    columns = {"square_sum": 0.0} if names is LAYERS else {}
    assert "LAYER FLOW" not in report.text(history(used(names=names, status=status, **columns)), [])


def test_it_is_the_same_each_time():
    """Nothing of the page depends on anything but the history and the findings."""
    seen, found = history(used(top=True, loss=1.0), used(1, top=True, loss=0.5)), [finding(), finding("a.bias")]
    assert report.text(seen, found) == report.text(seen, found)


def test_nothing_was_seen():
    """Before the first backward the page says so, and what was found all the same."""
    assert report.text(history(), []).splitlines() == ["gradlens", report.NOTHING]
    assert "WARNING mine" in report.text(history(), [finding()])
    assert "nothing was captured yet" in report.brief(history(), [])


def test_steps_size_and_loss():
    """The first lines say which steps, how many weights, and how the loss went."""
    seen = history(used(7, loss=2.5), snapshot(8, loss=0.25), used(8, loss=0.25), used(9, loss=0.5))
    lines = report.text(seen, []).splitlines()
    assert lines[1] == "  3 steps, 7 to 9: 2 parameters, 200 weights"
    assert lines[2] == "  loss 2.5 at step 7, 0.5 at step 9; lowest 0.25 at step 8"
    assert "lens.observe(loss=loss)" in report.text(history(used()), []).splitlines()[2]
    assert report.text(history(used(3, loss=1.5)), []).splitlines()[1:3] == [
        "  step 3: 2 parameters, 200 weights",
        "  loss 1.5 at step 3",
    ]


# --- health ---------------------------------------------------------------------------------------------------------


def test_what_came_first_is_pointed_out_where_it_is_not_the_worst():
    """A step that was too large, and NaN three steps later: the first line says where to begin."""
    nan = finding(severity=Severity.ERROR, rule="nonfinite", step=3, causes=("x",))
    page = report.text(history(used()), [nan, finding(rule="update_ratio", step=0)])
    assert rows_of(page, "HEALTH")[0] == "  it began with update_ratio at step 0: what came later may follow from that"
    for silent in ([nan], [nan, finding(step=3)], [nan, finding(step=5)], [nan, finding(severity=Severity.INFO, step=0)]):
        assert "it began with" not in report.text(history(used()), silent)


def test_a_healthy_model_is_said_to_be():
    """No findings is a sentence, not an empty part."""
    assert "HEALTH: no rule found anything" in report.text(history(used()), [])


def test_findings_are_grouped_and_the_worst_come_first():
    """One section a rule and advice, errors before warnings, with numbers, causes and what to do."""
    found = [
        finding("a.weight", step=1),
        finding("a.bias", step=4),
        finding(None, Severity.INFO, "calm"),
        finding("a.bias", Severity.ERROR, "worse", 9, causes=(), remedy=""),
    ]
    page = report.text(history(used()), found)
    assert "HEALTH: 1 error, 2 warnings, 1 info" in page
    assert rows_of(page, "HEALTH") == [
        "  it began with mine at step 1: what came later may follow from that",
        "  ERROR worse, at step 9: a.bias",
        "    what was seen of a.bias",
        "  WARNING mine, from step 1: a.weight, a.bias",
        "    what was seen of a.weight",
        "    likely: this; that",
        "    do: do it",
        "  INFO calm, at step 3: the model",
        "    what was seen of None",
        "    likely: this; that",
        "    do: do it",
    ]


def test_many_findings_are_cut_with_their_number():
    """Many kinds, or many parameters of one, are counted beyond the first."""
    page = report.text(history(used()), [finding(f"p{i}") for i in range(7)])
    assert "WARNING mine, at step 3: p0, p1, p2 and 4 more" in page
    page = report.text(history(used()), [finding(rule=f"rule{i}") for i in range(9)])
    assert "  and 4 more kinds, less severe or later: findings() has all" in page
    assert page.count("WARNING rule") == report.GROUPS


def test_a_finding_of_many_parameters_says_how_many():
    """What the diagnosis has put together is not `the model`."""
    together = finding(None, parameters=("a", "b", "c"))
    assert "WARNING mine, at step 3: 3 parameters" in report.text(history(used()), [together])


# --- directions -----------------------------------------------------------------------------------------------------


def test_directions_of_each_parameter():
    """Negative partials ask for an increase; the bar shows it; the last row is the whole model."""
    page = report.text(history(used(negative=[75, 0], positive=[25, 0], zero=[0, 100])), [])
    first, second, whole = rows_of(page, "DIRECTIONS")[-3:]
    assert first.split("  ")[1] == "a.weight"
    assert [cell for cell in first.split() if cell.isdigit()] == ["100", "75", "25", "0"]
    assert "+++++++++---" in first
    assert "100 %  ............" in second
    assert whole.split()[:10] == ["the", "whole", "model", "200", "38", "%", "12", "%", "50", "%"]


def test_a_share_that_is_not_all_does_not_look_like_it():
    """99.9 % is not 100 %, and 0.1 % not 0."""
    page = report.text(history(used(numel=1000, negative=999, positive=1, zero=0)), [])
    assert ">99 %" in page
    assert "<1 %" in page
    assert "100 %" not in page


def test_a_status_that_is_not_ok_stands_in_the_row():
    """An absent or non-finite parameter is named as such, and counted above."""
    seen = history(used(status=["ok", "nonfinite"]))
    lines = rows_of(report.text(seen, []), "DIRECTIONS")
    assert words(" ".join(lines[:2])).endswith("by the used gradient of step 0; of 2 parameters 1 nonfinite")
    assert lines[4].split()[0] == "a.bias"
    assert "nonfinite" in lines[4]
    assert "+" not in lines[4]


def test_update_ratios_come_from_the_last_update():
    """Asked in the middle of a step, the ratio is that of the step before; without an optimizer there is none."""
    seen = history(used(), snapshot(1))
    lines = rows_of(report.text(seen, []), "DIRECTIONS")
    assert "backward gradient of step 1" in lines[0]
    assert lines[2].split()[-1] == "0.001"
    page = report.text(history(snapshot()), [])
    assert rows_of(page, "DIRECTIONS")[2].split()[-1] == "-"
    assert "UPDATES" not in page


def test_many_parameters_are_cut_to_the_most_telling():
    """Of 500 parameters the ill, the found and the one-sided ones have a row, in model order, and the rest are counted."""
    names = tuple(f"layer{i}.weight" for i in range(500))
    positive, status = np.full(500, 50), ["ok"] * 500
    status[300] = "absent"
    positive[444] = 90
    seen = history(used(0, names, positive=positive, negative=100 - positive, status=status))
    page = report.text(seen, [finding("layer77.weight")])
    lines = rows_of(page, "DIRECTIONS")
    shown = [line.split()[0] for line in lines if line.startswith("  layer")]
    assert len(shown) == report.SHOWN
    assert shown == sorted(shown, key=lambda name: int(name[5:-7]))
    assert {"layer77.weight", "layer300.weight", "layer444.weight"} <= set(shown)
    assert lines[-1] == "  and 484 more: table() has all"


@pytest.mark.parametrize("n", [1, 5, 20, 21, 500])
def test_the_page_fits(n):
    """Whatever the names and however many, no line is wider than the page, and it is one page."""
    names = tuple(f"{'block.' * (i % 20)}{i}.a_rather_long_name_of_a_weight_{i}.weight" for i in range(n))
    found = [finding(name, rule=name, seen="numbers " * 40) for name in names]
    seen = history(used(0, names, top=True, loss=0.1), used(1, names, top=True, loss=0.1, numel=10**9))
    for page in (report.text(seen, found, overhead="words " * 40), report.brief(seen, found)):
        assert max(map(len, page.splitlines())) <= report.WIDTH
        assert len(page.splitlines()) < 100
    assert page.isascii()


def test_the_first_lines_have_the_whole_verdict():
    """A long verdict goes on in the next line; it is not cut."""
    verdict = "most likely " + "a cause of many words " * 12 + "from step 3"
    diagnosis = replace(diagnose([], Trend(State.UNKNOWN)), verdict=verdict)
    page = report.brief(history(used(loss=0.1)), [], diagnosis=diagnosis)
    assert verdict in " ".join(page.split())
    assert max(map(len, page.splitlines())) <= report.WIDTH


# --- weights --------------------------------------------------------------------------------------------------------


def test_the_most_sensitive_weights_are_named():
    """Ten weights of all parameters by falling size of their partials, each by its index, with the way to go."""
    partial, index = np.zeros((2, fields.TOP)), np.full((2, fields.TOP), -1)
    partial[0, :2], index[0, :2] = [-0.5, 0.25], [37, 0]
    partial[1, :1], index[1, :1] = [1.5], [99]
    one = used(top=True)
    object.__setattr__(one, "top", Top(index, partial, np.full((2, fields.TOP), 0.125)))
    assert rows_of(report.text(history(one), []), "MOST SENSITIVE")[1:] == [
        "  a.bias[99]      0.125     +1.5  decrease",
        "  a.weight[3, 7]  0.125     -0.5  increase",
        "  a.weight[0, 0]  0.125    +0.25  decrease",
    ]
    assert "most sensitive: a.bias[99] = 0.125, partial +1.5: decrease" in report.brief(history(one), [])


def test_ten_of_them():
    """There are no more than ten, and none where none was kept."""
    assert len(rows_of(report.text(history(used(top=True)), []), "MOST SENSITIVE")) == 1 + report.WEIGHTS
    assert "MOST SENSITIVE" not in report.text(history(used()), [])


def test_scalars_and_complex_weights_have_names():
    """A scalar has its parameter's name; a complex entry has a last index for its two parts."""
    assert report.named("w", ()) == "w"
    assert report.named("w", (3, 17)) == "w[3, 17]"
    from gradlens.records import Parameters

    assert report._index(Parameters(("w",), ((2, 3),), ("complex64",)), 0, 7) == (1, 0, 1)
    assert report._index(Parameters(("w",), ((),), ("float32",)), 0, 0) == ()


# --- updates --------------------------------------------------------------------------------------------------------


def test_what_the_steps_were_like():
    """Range of update ratios over weights, not biases; moves against the gradient; predicted change; sign changes."""
    more = {
        "update_before_square_sum": [1.0, 1e-12], "update_dot": -1e-3, "update_used_square_sum": 1.0,
        "update_against": 25, "update_loss_dot": -2e-3, "flip_compared": 100, "flip_moving": 100, "flip_count": 40,
    }  # fmt: skip
    page = report.text(history(used(**more)), [])
    lines = rows_of(page, "UPDATES")
    assert lines[0] == f"  |dw|/|w| is 0.001 (a.weight); {report.USUAL}"
    assert lines[1].startswith(
        "  25 % of the weights moved against their own gradient; the update's cosine with downhill is 1.00"
    )
    assert lines[2] == "  to first order the step changes its batch's loss by -0.004"
    assert lines[3] == "  40 % of the weights' partials changed their sign since the step before"
    assert lines[4] == "  updates and flips rest on every weight"


def test_totals_say_what_they_rest_on():
    """Where an optimizer wrote over some gradients, their parameters are in no total: the page says how much is left."""
    nan = float("nan")
    more = {
        "update_before_square_sum": [1.0, 1.0], "update_dot": [-1e-3, nan], "update_used_square_sum": [1.0, nan],
        "update_against": 25, "update_loss_dot": [-2e-3, nan], "update_loss_exact": [1, nan],
    }  # fmt: skip
    page = report.text(history(used(**more)), []).replace("\n    ", " ")
    assert "  the moves against, the cosine and the loss change rest on 1 of 2 parameters, 50 % of the weights" in page
    assert "every weight" not in page
    assert "to first order the step changes its batch's loss by -0.002" in page


def test_a_sample_is_said_to_be_one():
    """Where memory allowed a sample only, the page says what share the numbers rest on."""
    more = {"update_dot": -1e-3, "update_used_square_sum": 1.0, "update_numel": [100, 10]}
    assert "at least 10 % of each parameter" in report.text(history(used(**more)), [])


# --- one weight -----------------------------------------------------------------------------------------------------


def explain(partial=-0.5, name="fc1.weight", at=(3, 17), **more):
    given = {"value": 0.25, "rank": 3, "numel": 1000}
    return report.explain(name, at, partial=partial, **(given | more))


def words(text):
    return " ".join(text.split())


def test_a_weight_that_should_increase():
    """A negative partial: raising the weight lowers the loss, so it should increase, and by how much."""
    text = words(explain())
    assert text.startswith(
        "fc1.weight[3, 17] is 0.25. Its partial dL/dw is -0.5: with every other weight held fixed, raising"
    )
    assert "raising it a little lowers the loss" in text
    assert "it should increase" in text
    assert "by 0.001 would change the loss by about -5.0e-04" in text
    assert "number 3 of the 1,000 weights of fc1.weight" in text
    assert "no verdict" in text


def test_a_weight_that_should_decrease():
    """A positive partial is the mirror image."""
    text = words(explain(0.5, rank=1))
    assert "raising it a little raises the loss" in text
    assert "it should decrease" in text
    assert "+5.0e-04" in text
    assert "the one to which the loss answers most" in text


def test_a_weight_that_should_hold_or_has_no_direction():
    """Exactly 0 is hold, and what is not finite is undefined: neither is ranked or warned about."""
    assert "The direction is hold." in words(explain(0.0))
    for partial in (math.nan, math.inf):
        text = words(explain(partial))
        assert "undefined" in text
        assert "number 3" not in text
        assert "verdict" not in text


def test_the_only_weight_is_not_compared():
    """A scalar is named without an index and has no rank."""
    text = explain(name="temperature", at=(), numel=1, rank=1)
    assert text.startswith("temperature is 0.25")
    assert "answers most" not in text


@pytest.mark.parametrize(
    ("history", "sentence"),
    [
        ([-1.0, -2.0, -3.0], "so was kept, it should increase on 3."),
        ([1.0, -2.0, 3.0, 0.0, 3.0], "increase on 1 and decrease on 3; its sign changed 2 times from one to the next."),
        ([1.0, -2.0], "increase on 1 and decrease on 1; its sign changed once from one to the next."),
        ([0.0, math.nan], "it should move on none."),
    ],
)
def test_how_the_sign_behaved(history, sentence):
    """Counts of both directions and of changes, over the steps where the weight was kept."""
    assert sentence in words(explain(history=history))


def test_one_step_is_no_behaviour():
    """With one step seen there is nothing to say, and all weights of a small parameter are always kept."""
    assert "recent steps" not in explain(history=[1.0])
    assert "Of the 2 recent steps, it should" in words(explain(history=[1.0, 1.0], numel=8))


def test_the_paragraph_fits_and_keeps_the_name_whole():
    """Lines are no wider than the page, and none ends within the weight's name."""
    for n in range(60):
        text = explain(name="x" * n + ".weight", at=(1, 2, 3, 4), history=[1.0, -1.0])
        assert max(map(len, text.splitlines())) <= report.WIDTH
        assert "weight[1, 2, 3, 4]" in text
        assert "\n\n" not in text


def test_the_blocks_of_a_deep_model_stay_apart():
    """F26: the number of a block, which tells its parameters from the next one's, is not what is cut."""
    names = [
        *(f"transformer.h.{i}.attn.c_attn.{kind}" for i in range(48) for kind in ("weight", "bias")),
        *(f"{part}.layers.{i}.self_attn.out_proj.weight" for part in ("encoder", "decoder") for i in range(24)),
        *(f"model.stages.{i}.blocks.{j}.mlp.fully_connected_1.weight" for i in range(4) for j in range(9)),
        "backbone_of_the_whole_model.embeddings.weight",
    ]
    cut = [report._cut(name, report.NAME) for name in names]
    assert len(set(cut)) == len(names)
    assert all(len(name) <= report.NAME for name in cut)
    assert cut[0] == "tra..h.0.attn.c_attn.weight"
    assert report._cut("0.weight", report.NAME) == "0.weight"


def made(step, *modules):
    """A pass: modules as (name, type, rms, spread, dead, saturated), of 10 units and 8 examples."""
    names, kinds, rms, spread, dead, saturated = zip(*modules, strict=True)
    norm = np.array(rms) * math.sqrt(80)
    sums = np.stack(
        [np.full(len(names), 80.0), np.zeros(len(names)), norm, norm * spread, np.full(len(names), 10.0),
         10 * np.array(dead), 80 * np.array(saturated)], 1,
    )  # fmt: skip
    return Activations(step, 0, 0.0, names, kinds, (1,) * len(names), sums)


def of_activations(*passes):
    seen = history(used())
    for each in passes:
        seen.note(each)
    return rows_of(report.text(seen, []), "ACTIVATIONS")


def test_activations_are_those_of_the_newest_pass_in_order():
    """By module: size, spread, dead and saturated share; a spread that is not known is a dash, a share is left empty."""
    pages = of_activations(
        made(0, ("fc", "Linear", 9.0, 0.9, 0.0, math.nan)),
        made(
            4,
            ("fc", "Linear", 2.0, 0.5, 0.0, math.nan),
            ("act", "ReLU", 1.25, 0.01, 0.9, math.nan),
            ("gate", "Sigmoid", 0.7, math.nan, 0.0, 0.75),
        ),
    )
    assert [re.split(r"\s{2,}", line.strip()) for line in pages[-3:]] == [
        ["fc", "Linear", "2", "0.5", "0 %"],
        ["act", "ReLU", "1.25", "0.01", "90 %"],
        ["gate", "Sigmoid", "0.7", "-", "0 %", "75 %"],
    ]
    assert pages[-4].split() == ["rms", "spread", "dead", "saturated"]
    head = report.text(history(used()), [])
    assert "ACTIVATIONS" not in head


def test_of_many_modules_those_that_stand_out():
    """Little spread, much dead, much saturated; in the order of the forward pass, and the rest is counted."""
    plain = [(f"m{i}", "Linear", 1.0, 0.9, 0.0, math.nan) for i in range(60)]
    plain[7] = ("m7", "ReLU", 1.0, 0.8, 1.0, math.nan)
    plain[30] = ("m30", "Linear", 1.0, 0.0, 0.0, math.nan)
    plain[55] = ("m55", "Tanh", 1.0, 0.9, 0.0, 0.99)
    lines = of_activations(made(2, *plain))
    named = [line.split()[0] for line in lines if line.split()[0].startswith("m")]
    assert {"m7", "m30", "m55"} <= set(named)
    assert named == sorted(named, key=lambda name: int(name[1:]))
    assert lines[-1].strip() == f"and {60 - len(named)} more: lens.activations() has them all"


def test_a_pass_in_which_nothing_is_known():
    """A row whose shares are all NaN costs no report."""
    (line,) = of_activations(made(0, ("odd", "Odd", math.nan, math.nan, math.nan, math.nan)))[-1:]
    assert line.split()[:2] == ["odd", "Odd"]
