"""A survey gives verdicts with evidence, leaves no trace, and says what it cannot know."""

import itertools
import math
import re
import warnings
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gradlens.errors import ArgumentError, ArgumentTypeError, GradlensWarning, ProbeError
from gradlens.probes.strongest import strongest
from gradlens.probes.survey import BYTES, survey
from gradlens.probes.table_moments import TableMoments
from gradlens.probes.verdicts import RARE

from .helpers import trace

COLUMNS = ["parameter", "index", "value", "partial", "verdict", "t", "p", "q", "agree", "expected_change", "reason"]


class Net(nn.Module):
    """BatchNorm, dropout, a tied weight, an embedding that is rarely used, and a parameter without gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)
        self.second.weight = nn.Parameter(torch.randn(6, 6) / 3)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.second.weight
        self.rare = nn.Embedding(20, 6)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x, token):
        x = F.dropout(torch.tanh(self.norm(self.first(x))), 0.2, self.training)
        return self.last(torch.tanh(self.again(self.second(x)) + self.rare(token)))


def batches(k, size=32, seed=0):
    random = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(k):
        x = torch.randn(size, 4, generator=random)
        tokens = torch.randint(0, 20, (size,), generator=random).clamp(max=18)
        made.append((x, tokens, x[:, :3].argmax(1)))
    return made


def loss(model, batch):
    x, token, y = batch
    return F.cross_entropy(model(x, token), y)


def net():
    torch.manual_seed(0)
    return Net()


def test_nothing_is_left_behind():
    """Weights, buffers, gradients, modes and random states are bit-identical after a survey, and when its loss raises."""
    model = net()
    loss(model, batches(1)[0]).backward()
    before = trace(model)
    survey(model, loss, batches(8))
    assert trace(model) == before

    def failing(m, batch):
        loss(m, batch)
        raise KeyError("mine")

    with pytest.raises(KeyError):
        survey(model, failing, batches(8))
    assert trace(model) == before


def test_verdicts_are_one_sample_t_tests_of_plain_gradients():
    """Mean, t and p of every weight equal scipy's test of the gradients that loss.backward() gives, q scipy's control."""
    model, made = net().eval(), batches(12)
    stacked = []
    for batch in made:
        model.zero_grad()
        loss(model, batch).backward()
        stacked.append(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in model.parameters()])
        )
    model.zero_grad()
    g = torch.stack(stacked).double().numpy()
    frame = survey(model, loss, made).frame
    assert list(frame.columns) == COLUMNS
    np.testing.assert_allclose(frame["partial"], g.mean(0), rtol=1e-9, atol=1e-18)
    tested = frame["reason"].isin(["", "weak"]).to_numpy()
    assert tested.sum() > 100
    expected = scipy.stats.ttest_1samp(g[:, tested], 0)
    np.testing.assert_allclose(frame["t"][tested], expected.statistic, rtol=1e-7)
    np.testing.assert_allclose(frame["p"][tested], expected.pvalue, rtol=1e-6)
    np.testing.assert_allclose(frame["q"][tested], scipy.stats.false_discovery_control(expected.pvalue), rtol=1e-6)
    kept = (frame["q"] <= 0.1).to_numpy()
    np.testing.assert_array_equal(frame["verdict"][kept], np.where(frame["partial"][kept] < 0, "increase", "decrease"))
    assert (frame["verdict"][~kept] == "undecided").all()
    np.testing.assert_allclose(frame["expected_change"], np.where(kept, -1e-4 * frame["partial"].abs(), 0), rtol=1e-12)


def test_rows_name_their_weights():
    """Each row's value is that of the weight it names; tied weights appear once."""
    model = net()
    frame = survey(model, loss, batches(8)).frame
    named = dict(model.named_parameters())
    assert list(dict.fromkeys(frame["parameter"])) == list(named)
    for name, index, value in frame[["parameter", "index", "value"]].to_numpy():
        assert value == named[name][index].item()


def test_reasons_are_named_and_counted():
    """Weights without gradient are always_zero, rarely used rows sparse, and both are left out of the tests."""
    found = survey(net(), loss, batches(8, size=4))
    frame = found.frame
    assert set(frame.query("parameter == 'unused'")["reason"]) == {"always_zero"}
    rare = frame[frame["parameter"] == "rare.weight"]
    assert set(rare["reason"][-6:]) == {"always_zero"}  # token 19 never occurs
    assert "sparse" in set(rare["reason"])
    assert found.reasons == frame["reason"].value_counts().drop("", errors="ignore").to_dict()
    assert found.coverage == (frame["verdict"] != "undecided").mean()


def test_the_table_adds_up():
    """One row a parameter, whose counts and expected changes add up to those of the whole."""
    found = survey(net(), loss, batches(16))
    table, frame = found.table, found.frame
    assert list(table["parameter"]) == [name for name, _ in net().named_parameters()]
    assert (table["increase"] + table["decrease"] + table["undecided"] == table["surveyed"]).all()
    assert table["surveyed"].sum() == len(frame) == len(found)
    assert table["expected_change"].sum() == pytest.approx(found.expected_change, rel=1e-12)
    for name, count in table[["parameter", "decrease"]].to_numpy():
        assert count == ((frame["parameter"] == name) & (frame["verdict"] == "decrease")).sum()


def test_a_clear_direction_is_found():
    """With a strong common signal nearly all weights are decided, and rightly."""
    target = torch.linspace(-1, 1, 100)
    noise = [0.05 * torch.randn(100, generator=torch.Generator().manual_seed(i)) for i in range(16)]
    weights = {"w": torch.zeros(100, requires_grad=True)}
    found = survey(weights, lambda v, n: ((v["w"] - target - n) ** 2).sum(), noise)
    assert found.coverage > 0.9
    frame = found.frame
    kept = frame["verdict"] != "undecided"
    wrong = (frame["verdict"] == "increase").to_numpy() != (target > 0).numpy()
    assert (wrong & kept).sum() == 0
    assert "increase" in str(found)


def test_by_keeps_a_subset_of_what_bh_keeps():
    """The method that holds under any dependence is stricter, and says so."""
    model, made = net(), batches(16)
    bh, by = (survey(model, loss, made, method=method).results.verdict != 0 for method in ("bh", "by"))
    assert bh[by].all()
    assert by.sum() < bh.sum()


def test_batches_of_unequal_size_are_weighted():
    """A survey of batches of sizes 8 and 24 has the mean of the gradient over all examples, and says so."""
    x = torch.randn(32 * 8, 3, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(3, 1)
    square = lambda m, b: m(b).square().mean()  # noqa: E731
    parts = [part for big in x.split(32) for part in big.split([8, 24])]
    found = survey(model, square, parts)
    square(model, x).backward()
    np.testing.assert_allclose(found.frame["partial"][:3], model.weight.grad[0], rtol=1e-5)
    assert found.sizes == (8, 24)
    assert "of 8 to 24 examples, weighted by their size" in str(found)


def test_batches_without_size_count_alike():
    """A batch that says no size counts once; batches that differ in that cannot be weighted."""
    weights = {"w": torch.zeros(1, requires_grad=True)}
    assert survey(weights, lambda v, b: v["w"].sum() * b + v["w"].sum(), list(range(8))).sizes is None
    given = iter([torch.ones(3), 2.0, 3.0])
    with pytest.raises(ArgumentError, match="batch 1 does not say how large it is, and batch 0 does"):
        survey(weights, lambda v, b: (v["w"] * torch.as_tensor(b)).sum(), given)
    assert next(given) == 3.0  # it was said at once


def test_batches_that_are_none_are_explained():
    """What cannot be passed over is named, and so is a batch without examples, before anything is computed with it."""
    for given in (batches, 8, None):
        with pytest.raises(ArgumentTypeError, match="batches are a DataLoader, a list"):
            survey(net(), loss, given)
    x, token, y = batches(1)[0]
    with pytest.raises(ArgumentError, match="batch 2 is empty"):
        survey(net(), loss, [*batches(2), (x[:0], token[:0], y[:0])])


@pytest.mark.parametrize(("sample", "expected"), [(40, 40), (0.25, 59), (1.0, 227), (10_000, 227)])
def test_a_sample_is_seeded_and_agrees_with_the_whole(sample, expected):
    """A sampled survey has the same means and t values as the whole one, at the same weights each time."""
    model, made = net().eval(), batches(8)
    whole = survey(model, loss, made).frame.set_index(["parameter", "index"])
    one, two = (survey(model, loss, made, sample=sample) for _ in range(2))
    assert one.total == len(whole) == 227
    frame = one.frame.set_index(["parameter", "index"])
    assert frame.equals(two.frame.set_index(["parameter", "index"]))
    assert frame.index.is_unique
    assert set(frame.index.get_level_values(0)) == set(whole.index.get_level_values(0))
    np.testing.assert_array_equal(frame["t"], whole["t"].loc[frame.index])
    np.testing.assert_array_equal(frame["value"], whole["value"].loc[frame.index])
    assert len(frame) == expected
    assert ("a sample of 227" in str(one)) == (expected < 227)


@pytest.mark.parametrize("top", [1, 30, 226])
def test_the_most_sensitive_weights_are_chosen_by_the_first_batch(top):
    """Of `top` weights, those of the largest partial in the first batch, the tests rest on the other batches alone."""
    model, made = net().eval(), batches(9)
    loss(model, made[0]).backward()
    size = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).abs() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    found = survey(model, loss, made, top=top)
    assert found.batches == 8
    assert len(found) == top
    expected = np.sort(size.topk(top).indices.numpy())
    whole = survey(model, loss, made[1:]).frame
    if top <= 30:  # among partials of 0 any are the largest
        assert list(zip(found.frame["parameter"], found.frame["index"], strict=True)) == list(
            whole.iloc[expected][["parameter", "index"]].itertuples(index=False, name=None)
        )
    both = found.frame.set_index(["parameter", "index"])
    np.testing.assert_array_equal(both["t"], whole.set_index(["parameter", "index"])["t"].loc[both.index])
    assert found.total == 227
    assert f"survey of {top} weights (the most sensitive of 227 in the first batch) over 8 batches" in str(found)
    assert found.table["surveyed"].sum() == len(found)
    assert survey(model, loss, made, top=227).frame.equals(survey(model, loss, made).frame)


def test_the_choice_by_sensitivity_takes_memory_for_a_few_times_as_many_weights(monkeypatch):
    """Chunk by chunk, whatever lies in them: NaN, ties, parameters without gradient, complex weights."""
    monkeypatch.setattr("gradlens.statistics.evidence.CHUNK", 7)
    random = torch.Generator().manual_seed(0)
    gradient = [torch.randn(5, 9, generator=random), None, torch.full((3,), math.nan), torch.randn(40, generator=random)]
    gradient[0][2, 3], gradient[3][:4] = -math.inf, 100.0
    like = [torch.empty(shape) for shape in ((5, 9), (2, 2), (3,), (40,))]
    found = strongest(gradient, like, 6)
    every = torch.cat([torch.zeros(4) if g is None else g.reshape(-1).abs().nan_to_num(0, math.inf) for g in gradient])
    sizes = [45, 4, 3, 40]
    flat = np.concatenate([at + start for at, start in zip(found, np.cumsum([0, *sizes[:-1]]), strict=True)])
    np.testing.assert_array_equal(flat, np.sort(every.topk(6).indices))
    assert [len(at) for at in strongest(gradient, like, 92)] == sizes


def test_a_top_that_is_none_is_refused():
    """It counts weights, and cannot be asked for together with a sample; one batch chooses, so three are the least."""
    for top in (0, 2.5, True):
        with pytest.raises(ArgumentError, match="top is how many"):
            survey(net(), loss, batches(8), top=top)
    with pytest.raises(ArgumentError, match="sample= or top="):
        survey(net(), loss, batches(8), top=5, sample=5)
    with pytest.raises(ArgumentError, match=r"at least 2 batches besides the first"):
        survey(net(), loss, batches(2), top=5)


@pytest.mark.parametrize(
    ("sample", "error"),
    [(0, ArgumentError), (-1, ArgumentError), (1.5, ArgumentError), ("1%", ArgumentTypeError), (True, ArgumentTypeError)],
)
def test_samples_that_are_none_are_refused(sample, error):
    """The error says that an int counts and a float is a share."""
    with pytest.raises(error, match="sample is a number of weights"):
        survey(net(), loss, batches(8), sample=sample)


def test_what_does_not_fit_in_memory_is_refused_before_it_starts(monkeypatch):
    """The error states what is needed and names sample=."""
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 4, "SC_PAGE_SIZE": 4096}[name])
    with pytest.raises(ArgumentError, match=r"sample=0\.01"):
        survey(net(), lambda m, b: pytest.fail("was run"), batches(2))
    assert survey(net(), loss, batches(8), sample=70).total * BYTES > 4 * 4096
    with pytest.raises(ArgumentError, match="a copy of the weights"):  # a sample does not make those any smaller
        survey(nn.Linear(1000, 2), lambda m, b: pytest.fail("was run"), batches(2), sample=1)


def test_one_gradient_lives_at_a_time(monkeypatch):
    """When the next batch is evaluated, the gradient of the last one is gone: memory is what the docstring says."""
    update, last = TableMoments.update, []

    def noted(self, gradients, weight):
        last[:] = map(weakref.ref, gradients)
        update(self, gradients, weight)

    def alone(v, x):
        assert all(ref() is None for ref in last)
        return (v["w"] * x).sum()

    monkeypatch.setattr(TableMoments, "update", noted)
    given = [torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    assert survey({"w": torch.zeros(3, requires_grad=True)}, alone, given).batches == 9
    assert last


@pytest.mark.parametrize("how", [{}, {"sample": 40}, {"top": 60}], ids=str)
@pytest.mark.parametrize("small", [0, 1 << 16])
def test_a_sparse_table_is_surveyed_as_a_dense_one(how, small, monkeypatch):
    """With `sparse=True` verdicts, means, t and q are those of the same table without, large or small."""
    monkeypatch.setattr("gradlens.probes.survey.SMALL_TABLE", small)

    def lookup(sparse):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(50, 3, sparse=sparse), nn.Flatten(), nn.Linear(12, 5))

    def of(m, b):
        return F.cross_entropy(m(b[0]), b[1])

    rows = torch.randint(30, (12, 16, 4), generator=torch.Generator().manual_seed(1))
    given = [(x, x[:, 0] % 5) for x in rows]
    sparse, dense = (survey(lookup(s), of, given, **how) for s in (True, False))
    assert len(sparse) == len(dense)
    pd.testing.assert_frame_equal(sparse.frame, dense.frame, rtol=1e-6)
    assert (sparse.frame["t"].notna() & (sparse.frame["parameter"] == "0.weight")).any()


def test_only_selected_parameters_are_surveyed():
    """`select` takes the patterns of watch()."""
    found = survey(net(), loss, batches(8), select=["first.*", "!*.bias"])
    assert found.parameters.names == ("first.weight",)
    assert len(found) == 24


def test_one_batch_is_an_error_and_few_are_a_warning():
    """Below two batches there is no evidence; below eight the warning says how strong a signal must be to be seen."""
    with pytest.raises(ArgumentError, match="at least 2 batches"):
        survey(net(), loss, batches(1))
    with pytest.raises(ArgumentError, match="not 0"):
        survey(net(), loss, [])
    with pytest.warns(GradlensWarning, match=r"4 batches leave 3 degrees of freedom.*about 3\.7 times its spread"):
        survey(net(), loss, batches(4))


def test_identical_batches_are_an_error():
    """A batch repeated is no evidence, and the error says so."""
    with pytest.raises(ArgumentError, match="these batches are identical: all 8"):
        survey(net().eval(), loss, batches(1) * 8)


def test_a_batch_given_twice_is_named():
    """A warning names the first two that gave the same gradient."""
    made = batches(8)
    with pytest.warns(GradlensWarning, match=r"batches 0 and 8 gave the same gradient \(and 1 more"):
        survey(net().eval(), loss, [*made, made[0], made[3]])


def test_equal_sums_are_no_repetition(monkeypatch):
    """Batches that touch other rows of equal weights have gradients of equal sum and norm, and are told apart."""
    monkeypatch.setattr("gradlens.statistics.evidence.CHUNK", 8)
    table = {"w": torch.full((12, 3), 0.5, requires_grad=True)}
    given = [torch.tensor([k, k + 1]) for k in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert survey(table, lambda v, rows: v["w"][rows].square().sum(), given).batches == 8


def test_partials_that_never_vary_keep_their_sign():
    """A regularised weight that the data do not touch has a certain direction, marked constant."""
    weights = {"data": torch.zeros(3, requires_grad=True), "decayed": torch.tensor([2.0, -1.0], requires_grad=True)}
    made = [torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    found = survey(weights, lambda v, b: (v["data"] * b).sum() + v["decayed"].square().sum(), made)
    frame = found.frame.query("parameter == 'decayed'")
    assert list(frame["verdict"]) == ["decrease", "increase"]
    assert list(frame["reason"]) == ["constant"] * 2
    assert "2 verdicts rest on partials that were the same in every batch" in str(found)


def test_a_gradient_that_is_not_finite_spoils_only_its_weights():
    """One NaN makes that weight undecided (nonfinite) and leaves the others' tests alone."""
    weights = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(2, requires_grad=True)}
    made = [torch.tensor([1.0 + i, -1.0 - i % 3]) for i in range(8)]
    whole = survey(weights, lambda v, x: (v["b"] * x).sum() + 0 * v["a"].sum(), made).frame

    def broken(v, x):
        factor = torch.tensor([float("nan") if x[0] == 4 else 0.0, 0.0])
        return (v["b"] * x).sum() + (v["a"] * factor).sum()

    with pytest.warns(GradlensWarning, match="batch 3 gave"):
        frame = survey(weights, broken, made).frame
    assert list(frame["reason"][:2]) == ["nonfinite", "always_zero"]
    np.testing.assert_array_equal(frame["t"][2:], whole["t"][2:])


def test_a_batch_that_is_not_finite_is_named():
    """The warning and the text say which batch spoiled the survey and what to do, and not that more batches would help."""
    made = batches(8)
    made[3][0][0, 0] = made[5][0][1, 1] = float("nan")
    with pytest.warns(GradlensWarning, match="batches 3 and 5 gave a loss or partials that are not finite"):
        found = survey(net(), loss, made)
    assert found.spoiled == (3, 5)
    assert found.reasons["nonfinite"] > 100
    assert "leave them out" in str(found)
    assert "more or larger batches" not in str(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert survey(net(), loss, batches(8)).spoiled == ()


def test_a_loader_is_passed_over_once_and_its_generator_kept():
    """A DataLoader with a generator of its own draws the same order afterwards as if it had not been surveyed."""
    data = TensorDataset(torch.randn(64, 4), torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int64))
    made = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3))
    model = net()
    before, state = made.generator.get_state(), torch.get_rng_state()
    assert survey(model, loss, made).batches == 8
    assert torch.equal(made.generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert survey(net(), loss, itertools.islice(batches(100), 9)).batches == 9


def test_dropout_draws_anew_for_each_batch():
    """Dropout is part of the noise that is measured: equal data under other masks are not identical batches."""
    model, x = nn.Sequential(nn.Linear(4, 30), nn.Dropout(0.5), nn.Linear(30, 1)), torch.randn(5, 4)
    found = survey(model, lambda m, b: m(b).square().mean(), [x] * 8)
    assert found.training == "train"
    assert (found.frame["t"].dropna().abs() < np.inf).mean() > 0.9


def test_large_surveys_have_no_frame_but_answer(monkeypatch):
    """More rows than a frame may have are an error that names the ways out, which work."""
    monkeypatch.setattr("gradlens.probes.per_weight.ROWS", 100)
    found = survey(net(), loss, batches(8))
    with pytest.raises(ArgumentError, match=re.escape(".weights(top=1000)")):
        _ = found.frame
    top = found.weights(top=10)
    assert (top["t"].abs().diff().dropna() <= 0).all()
    assert top["t"].abs().iloc[0] == np.nanmax(np.abs(found.results.t))
    assert set(found.weights("first.bias")["parameter"]) == {"first.bias"}
    with pytest.raises(ArgumentError, match=r"did you mean 'first\.bias'"):
        found.weights("first.bais")


def test_the_result_is_frozen_and_prints():
    """The text says how many weights want which way, how sure that is, and what was not decided."""
    found = survey(net(), loss, batches(16))
    with pytest.raises(AttributeError):
        found.level = 0.5
    text = str(found)
    assert text.startswith("a direction is known for ")
    assert "  survey of 227 weights over 16 batches of 32, train mode, mean loss 1." in text
    assert re.search(r"increase \d+ · decrease \d+ · undecided \d+ \(weak", text)
    assert "at most 10% of the verdicts are expected to be wrong" in text
    assert all(caveat in text for caveat in found.caveats)
    nothing = str(survey(net(), loss, batches(8), 1e-9))
    assert nothing.startswith("no direction is known: these batches do not agree on any; take more or larger ones")
    assert "nothing is certain enough" in nothing


def test_a_loss_may_take_its_batch_apart():
    """Popping the labels out of a dict, as training scripts do, is not felt by the caller or by another evaluation."""
    made = [{"x": x, "token": t, "y": y} for x, t, y in batches(8)]

    def popping(m, batch):
        y = batch.pop("y")
        return F.cross_entropy(m(**batch), y)

    found = survey(net(), popping, made)
    assert all(set(batch) == {"x", "token", "y"} for batch in made)
    np.testing.assert_array_equal(found.results.t, survey(net(), loss, batches(8)).results.t)


def test_caveats_are_those_that_apply():
    """What was measured with as many batches is named: rare events, dependent weights, other data."""
    asked = [(4, "bh"), (16, "bh"), (40, "bh"), (64, "by")]
    with warnings.catch_warnings(action="ignore"):
        said = [survey(net(), loss, batches(k), method=method).caveats for k, method in asked]
    assert [len(caveats) for caveats in said] == [3, 3, 3, 2]
    shares = ("41% were wrong at 8", "33% were wrong at 16", "23% were wrong at 32", "12% were wrong at 64")
    for caveats, measured in zip(said, shares, strict=True):
        assert measured in caveats[0]
    assert "method='by'" in said[1][1]
    assert all("other data" in caveats[-1] for caveats in said)


def test_the_caveat_on_rare_events_quotes_the_benchmark():
    """The shares in the text are those of benchmarks/layers.csv."""
    layers = pd.read_csv(Path(__file__).parents[2] / "benchmarks" / "layers.csv")
    late = layers.query("stage == 'late' and method == 'bh'").set_index(["layer", "batches"])["fdr"]
    assert late["out"].round(2).to_dict() == RARE
    assert late["rest"].max() < 0.025


@pytest.mark.parametrize(("q", "shown"), [(0.005, "0.5%"), (0.1, "10%"), (np.float32(0.25), "25%")])
def test_levels_are_shown_as_they_are(q, shown):
    """A level below one percent is not rounded to none, and numpy's numbers are numbers."""
    random = torch.Generator().manual_seed(0)
    given = [3 + 0.1 * torch.randn(5, generator=random) for _ in range(8)]
    found = survey({"w": torch.zeros(5, requires_grad=True)}, lambda v, b: (v["w"] * b).sum(), given, q)
    assert f"at most {shown} of the verdicts are expected to be wrong" in str(found)
    assert type(found.level) is float


def test_losses_that_do_not_fit_are_explained():
    """A loss without batch argument, or cut off from the model, is an error that says so."""
    with pytest.raises(ArgumentTypeError, match=r"called as loss_fn\(model, batch\)"):
        survey(net(), lambda m: 0, batches(8))
    with pytest.raises(ProbeError, match="depends on none"):
        survey(net(), lambda m, b: loss(m, b).detach(), batches(8))
    with pytest.raises(ArgumentError, match="'bh', 'by'"):
        survey(net(), loss, batches(8), method="holm")
    with pytest.raises(ArgumentError, match="between 0 and 1"):
        survey(net(), loss, batches(8), 10)


def test_progress_states_the_memory(capsys):
    """The line above the bar says how many weights are surveyed and what that needs, before it starts."""
    survey(net(), loss, batches(8), progress=True)
    said, bar = capsys.readouterr().err.split("\n", 1)
    assert said == (
        "gradlens: survey of 227 weights needs 0.0 MiB for statistics, "
        "and 0.0 MiB for a copy of the weights, and 0.0 MiB for two gradients, those of sparse tables left out"
    )
    assert "surveying" in bar


def test_much_memory_is_stated_without_a_bar_too(capsys, monkeypatch):
    """Where standard error is no terminal and nothing was asked for, one line says what a large survey needs."""
    survey(net(), loss, batches(8))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("gradlens.probes.memory.MUCH", 1)
    survey(net(), loss, batches(8))
    assert capsys.readouterr().err.startswith("gradlens: survey of 227 weights needs 0.0 MiB for")
    survey(net(), loss, batches(8), progress=False)
    assert capsys.readouterr().err == ""


def test_sizes_weigh_batches_whose_first_dimension_is_no_number_of_examples():
    """Time first: with sizes= the survey is that of batches whose examples come first."""
    weights = {"w": torch.zeros(3, requires_grad=True)}
    random = torch.Generator().manual_seed(0)
    first = [torch.randn(n, 5, 3, generator=random) for n in (4, 4, 8, 8, 2, 2, 4, 8)]
    plain = survey(weights, lambda v, b: (v["w"] * b).sum(-1).mean(), first)
    time_first = [b.transpose(0, 1) for b in first]
    loss = lambda v, b: (v["w"] * b).sum(-1).mean()  # noqa: E731
    asked = survey(weights, loss, time_first, sizes=lambda b: b.shape[1])
    np.testing.assert_allclose(asked.results.t, plain.results.t, rtol=1e-5)
    assert asked.sizes == (2, 8)
    other = survey(weights, loss, time_first)
    assert not np.allclose(other.results.t, plain.results.t, rtol=1e-3)


def test_one_batch_in_place_of_batches_is_refused():
    """survey(model, loss_fn, (x, y)) would be a survey of two batches."""
    x, _, y = batches(1)[0]
    with pytest.raises(ArgumentTypeError, match=r"\[batch\]"):
        survey(net(), loss, (x, y))
