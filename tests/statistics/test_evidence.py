"""Evidence: moments that equal their definitions, tests that equal scipy's, and what is only described."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gradlens.errors import ArgumentError
from gradlens.statistics.evidence import REASONS, VERDICTS, Evidence, Moments, flat, test_means

values = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))
relaxed = settings(deadline=None, max_examples=50)


def moments(rows, weights=None, sizes=None):
    """Moments of one parameter (or of several, by their sizes) after the rows of a matrix."""
    rows = torch.as_tensor(np.asarray(rows, float))
    sizes = sizes or [rows.shape[1]]
    result = Moments([torch.empty(n) for n in sizes])
    for i, row in enumerate(rows):
        result.update(list(row.split(sizes)), 1.0 if weights is None else weights[i])
    return result


def words(results):
    return [VERDICTS[v] for v in results.verdict], [REASONS[r] for r in results.reason]


@relaxed
@given(arrays.arrays(np.float64, st.tuples(st.integers(2, 12), st.integers(1, 6)), elements=values))
def test_moments_equal_their_definitions(x):
    """The running mean, squared deviations and sign counts are those of the whole matrix."""
    found = moments(x)
    np.testing.assert_allclose(found.mean[0], x.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.squares[0], ((x - x.mean(0)) ** 2).sum(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found.positive[0], (x > 0).sum(0))
    np.testing.assert_array_equal(found.negative[0], (x < 0).sum(0))


@relaxed
@given(arrays.arrays(np.float64, st.tuples(st.integers(5, 12), st.integers(1, 6)), elements=values))
def test_t_and_p_equal_scipys_one_sample_test(x):
    """With equal batches t and p are those of scipy.stats.ttest_1samp."""
    results = test_means(moments(x))
    for i, column in enumerate(x.T):
        if REASONS[results.reason[i]] in ("", "weak") and column.std() > 1e-9 * abs(column.mean()):
            expected = scipy.stats.ttest_1samp(column, 0)
            assert results.t[i] == pytest.approx(expected.statistic, rel=1e-7)
            assert results.p[i] == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-300)


@relaxed
@given(
    arrays.arrays(np.float64, (6, 3), elements=values),
    st.lists(st.integers(1, 64), min_size=6, max_size=6),
    st.floats(0.01, 100),
)
def test_unequal_batches_are_a_weighted_least_squares_fit(x, sizes, unit):
    """With batch sizes as weights, t is that of a constant fitted by weighted least squares, whatever the unit of size."""
    results = test_means(moments(x, [unit * n for n in sizes]))
    root = np.sqrt(np.asarray(sizes, float))
    for i, column in enumerate(x.T):
        if REASONS[results.reason[i]] not in ("", "weak"):
            continue
        mean = (root**2 * column).sum() / (root**2).sum()
        residual = ((root * (column - mean)) ** 2).sum() / 5
        if residual > 1e-12 * (root * column) @ (root * column):
            assert results.mean[i] == pytest.approx(mean, rel=1e-9, abs=1e-12)
            assert results.t[i] == pytest.approx(mean / math.sqrt(residual / (root**2).sum()), rel=1e-6, abs=1e-9)


def test_tiny_and_large_partials_neither_vanish_nor_overflow():
    """Partials of 1e-30 and of 1e30 have the t of the same numbers around 1, constant ones do not become noisy."""
    x = np.random.default_rng(0).normal(1, 1, (8, 1))
    results = test_means(moments(np.hstack([x, 1e-30 * x, 1e30 * x])))
    np.testing.assert_allclose(results.t, results.t[0], rtol=1e-12)


def test_verdicts_say_which_way_and_how_sure():
    """A clearly negative mean says increase, a positive one decrease, and noise is undecided for being weak."""
    x = np.random.default_rng(1).normal(size=(16, 3)) + [-5, 5, 0]
    results = test_means(moments(x))
    assert words(results) == (["increase", "decrease", "undecided"], ["", "", "weak"])
    np.testing.assert_allclose(results.agree, [1, 1, max((x[:, 2] > 0).mean(), (x[:, 2] < 0).mean())], atol=0.2)
    assert (results.p <= results.q).all()


def test_agreement_is_the_share_of_nonzero_gradients_with_the_sign_of_the_mean():
    """Zeros neither agree nor disagree."""
    x = [[1.0], [1], [1], [-1], [0], [0], [3], [2]]
    assert test_means(moments(x)).agree[0] == 5 / 6


def test_what_was_not_tested_says_why():
    """Always zero, sparse, constant and non-finite partials are named, and do not count among the tests."""
    random = np.random.default_rng(2)
    tested = random.normal(0.9, 1, (8, 50))
    sparse = np.zeros((8, 1))
    sparse[:4] = 100 + random.normal(size=(4, 1))
    five = np.zeros((8, 1))
    five[:5] = 1
    rest = np.hstack([np.zeros((8, 1)), sparse, np.full((8, 1), -0.1), five])
    broken = np.ones((8, 2))
    broken[3] = [np.nan, np.inf]
    alone, together = test_means(moments(tested)), test_means(moments(np.hstack([rest, broken, tested]), sizes=[3, 3, 50]))
    verdict, reason = words(together)
    assert reason[:3] == ["always_zero", "sparse", "constant"]
    assert reason[3] in ("", "weak")  # five of eight are enough to be tested
    assert reason[4:6] == ["nonfinite", "nonfinite"]
    assert verdict[:3] == ["undecided", "undecided", "increase"]
    assert together.t[2] == -math.inf
    assert together.p[2] == together.q[2] == 0
    for column in (together.t, together.p, together.q):
        assert np.isnan(column[[0, 1, 4, 5]]).all()
    np.testing.assert_array_equal(together.p[6:], alone.p)
    np.testing.assert_allclose(together.q[6:], alone.q, rtol=0.2)  # one test more, not five


def test_few_gradients_ask_for_fewer_non_zero_ones():
    """With K = 3 a weight is sparse unless all three are non-zero."""
    assert words(test_means(moments([[1.0, 1], [9, 2], [-1, 0]])))[1] == ["weak", "sparse"]


def test_a_parameter_without_gradient_counts_as_zeros():
    """None is a gradient of zeros, also between others."""
    found = Moments([torch.empty(2)])
    for g in (None, torch.tensor([2.0, 4.0]), None, torch.tensor([2.0, -4.0])):
        found.update([g])
    assert found.mean[0].tolist() == [1, 0]
    assert found.squares[0].tolist() == [4, 32]


def test_only_the_chosen_entries_are_kept():
    """With indices the moments are those of the sampled entries."""
    found = Moments([torch.empty(2, 3), torch.empty(4)], [torch.tensor([1, 5]), None])
    found.update([torch.arange(6.0).reshape(2, 3), torch.ones(4)])
    assert found.mean[0].tolist() == [1, 5, 1, 1, 1, 1]
    assert [found.place(i) for i in range(2)] == [(0, slice(0, 2)), (0, slice(2, 6))]


def test_blocks_join_small_parameters_and_leave_large_ones_alone(monkeypatch):
    """However parameters are put together, the moments and the places of their weights are the same."""
    like = [torch.empty(n) for n in (3, 2, 7, 1, 0, 2)]
    gradients = [[torch.randn(t.shape, generator=torch.Generator().manual_seed(k)) for t in like] for k in range(6)]
    found = []
    for block, expected in ((1 << 20, 1), (5, 3), (1, 5)):
        monkeypatch.setattr("gradlens.statistics.evidence.BLOCK", block)
        moments = Moments(like)
        assert len(moments.mean) == expected
        for g in gradients:
            moments.update(g)
        found.append((torch.cat(moments.mean), torch.cat(moments.squares)))
        for i, t in enumerate(like):
            place, entries = moments.place(i)
            np.testing.assert_allclose(
                moments.mean[place][entries], torch.stack([g[i].double() for g in gradients]).mean(0), rtol=1e-12
            )
            assert entries.stop - entries.start == t.numel()
    for mean, squares in found[1:]:
        assert torch.equal(mean, found[0][0])
        assert torch.equal(squares, found[0][1])


def test_gradients_are_only_read():
    """A float64 gradient, which needs no cast, is not written into."""
    g = torch.randn(5, dtype=torch.float64)
    kept = g.clone()
    evidence = Evidence([g])
    for _ in range(3):
        evidence.update([g])
    evidence.step_done()
    assert torch.equal(g, kept)


def test_gradients_of_any_kind_are_read_as_what_they_are():
    """Narrow, transposed, sparse and complex gradients become float64 in row-major order."""
    dense = torch.tensor([[0.0, 2], [3, 0]])
    assert flat(dense.t().bfloat16()).tolist() == [0, 3, 2, 0]
    assert flat(dense.to_sparse()).tolist() == [0, 2, 3, 0]
    assert flat(torch.tensor([1 + 2j])).tolist() == [1, 2]
    assert flat(dense).dtype == torch.float64


@pytest.mark.parametrize("q", [0, 1, -0.1, "0.1"])
def test_levels_that_are_none_are_refused(q):
    """q is a share strictly between 0 and 1."""
    with pytest.raises(ArgumentError, match="between 0 and 1"):
        test_means(moments([[1.0], [2.0]]), q)


def test_one_gradient_is_no_evidence():
    """A spread needs two."""
    with pytest.raises(ArgumentError, match="at least 2 gradients"):
        test_means(moments([[1.0]]))


# --- over steps -------------------------------------------------------------------------------------------------------


def stream(steps, decay=0.9):
    """Evidence after steps of micro-batches, one weight."""
    result = Evidence([torch.empty(1)], decay=decay)
    for step in steps:
        for g in step:
            result.update([torch.tensor([float(g)])])
        result.step_done()
    return result


def test_verdicts_rest_on_the_backwards_of_the_last_step_alone():
    """Earlier steps, at other weights, are no part of a verdict; it can be read until the next step begins."""
    evidence = stream([[9, 8, 9, 7, 9], [-1, -2, -1, -2, -1.5]])
    expected = test_means(moments([[-1.0], [-2], [-1], [-2], [-1.5]]))
    found = evidence.verdicts()
    assert found.t == expected.t
    assert found.q == expected.q
    assert VERDICTS[found.verdict[0]] == "increase"
    evidence.update([torch.tensor([1.0])])
    assert evidence.verdicts() is None


def test_one_backward_a_step_gives_no_verdict():
    """Without accumulation there is no repeated measurement at fixed weights."""
    assert stream([[1], [2], [3]]).verdicts() is None


@relaxed
@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0]), min_size=1, max_size=30))
def test_the_record_over_steps_equals_its_definition(gradients):
    """Agreement, flips and GSNR are the exponentially weighted shares and moments of the steps."""
    evidence, decay = stream([[g] for g in gradients]), 0.9
    g = np.array(gradients)
    weights = decay ** np.arange(len(g))[::-1]
    found = evidence.over_time(0)
    nonzero = g != 0
    if nonzero.any():
        up = weights[g > 0].sum() / weights[nonzero].sum()
        assert found.agree[0] == pytest.approx(max(up, 1 - up), rel=1e-5)
    else:
        assert np.isnan(found.agree[0])
    moving, signs = weights[nonzero][1:], np.sign(g[nonzero])
    if len(moving):
        assert found.flips[0] == pytest.approx((moving * (signs[1:] != signs[:-1])).sum() / moving.sum(), abs=1e-5)
    else:
        assert np.isnan(found.flips[0])
    mean = np.average(g, weights=weights)
    variance = np.average((g - mean) ** 2, weights=weights)
    if variance > 1e-9:
        assert found.gsnr[0] == pytest.approx(mean**2 / variance, rel=1e-6, abs=1e-12)


def test_one_step_has_no_variance():
    """The ratio of signal to noise is empty before the second step, and not infinite; the sign is seen at once."""
    found = stream([[2]]).over_time(0)
    assert np.isnan(found.gsnr[0])
    assert found.agree[0] == 1
    assert stream([[2], [4]]).over_time(0).gsnr[0] == pytest.approx(9, rel=0.05)


def test_a_step_is_the_mean_of_its_backwards():
    """Over steps each counts once, by its mean gradient."""
    many, single = stream([[1, 3], [4, -10]]), stream([[2], [-3]])
    for name in ("agree", "flips", "gsnr"):
        np.testing.assert_array_equal(getattr(many.over_time(0), name), getattr(single.over_time(0), name))


def test_a_step_that_overflowed_leaves_the_record_as_it_was():
    """A non-finite gradient (a skipped step under a GradScaler) is no evidence of anything."""
    skipped, clean = stream([[1], [math.inf], [2], [math.nan], [-1]]), stream([[1], [2], [-1]])
    for name in ("agree", "flips", "gsnr"):
        np.testing.assert_array_equal(getattr(skipped.over_time(0), name), getattr(clean.over_time(0), name))


def test_ending_a_step_twice_or_without_backward_changes_nothing():
    """step_done() without new gradients is no step."""
    evidence = stream([[1], [2], [-1]])
    before = evidence.over_time(0)
    evidence.step_done()
    assert evidence.over_time(0).gsnr == before.gsnr
    fresh = Evidence([torch.empty(1)])
    fresh.step_done()
    assert np.isnan(fresh.over_time(0).gsnr[0])


def test_the_stated_bytes_are_those_held():
    """Memory is what BYTES says for each weight."""
    evidence = Evidence([torch.empty(1000)])
    evidence.update([torch.ones(1000)])
    evidence.step_done()
    held = [x for owner in (evidence.moments, *evidence._steps) for x in vars(owner).values()]
    tensors = [x for value in held for x in (value if isinstance(value, list) else [value]) if isinstance(x, torch.Tensor)]
    assert sum(x.numel() * x.element_size() for x in tensors if x.dim()) == 1000 * Evidence.BYTES


def test_a_decay_that_is_none_is_refused():
    """1 would never forget and 0 never remember."""
    with pytest.raises(ArgumentError, match="between 0 and 1"):
        Evidence([torch.empty(1)], decay=1.0)
