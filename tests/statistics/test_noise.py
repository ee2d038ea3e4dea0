"""The noise scale from norms alone equals that of the stored gradients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens.errors import ArgumentError
from gradlens.statistics.noise import Noise, NoiseScale, estimate


def gradients(k, n, seed, signal=1.0):
    random = np.random.default_rng(seed)
    return signal * random.normal(size=n) + random.normal(size=(k, n))


@settings(deadline=None, max_examples=60)
@given(k=st.integers(2, 20), n=st.integers(1, 50), seed=st.integers(0, 999), scale=st.floats(1e-6, 1e6))
def test_norms_give_what_stored_gradients_give(k, n, seed, scale):
    """Trace and signal equal the sample covariance's trace and |mean|^2 minus its share, whatever the loss's scale."""
    g = scale * gradients(k, n, seed)
    trace = g.var(axis=0, ddof=1).sum()
    signal = (g.mean(0) ** 2).sum() - trace / k
    squares = (g**2).sum(1)
    for found in (
        estimate(squares, summed=(g.sum(0) ** 2).sum()),
        estimate(squares, averaged=(g.mean(0) ** 2).sum()),
    ):
        assert found.trace == pytest.approx(trace, rel=1e-6)
        assert found.signal == pytest.approx(signal, rel=1e-6, abs=1e-6 * trace)


def test_parameters_add_up():
    """Estimates for each parameter sum to that of the whole model."""
    g = gradients(5, 12, 0)
    parts = np.split(g, [3, 7], axis=1)
    each = estimate(np.stack([(p**2).sum(1) for p in parts], 1), summed=np.array([(p.sum(0) ** 2).sum() for p in parts]))
    whole = estimate((g**2).sum(1), summed=(g.sum(0) ** 2).sum())
    assert each.trace.sum() == pytest.approx(whole.trace)
    assert each.signal.sum() == pytest.approx(whole.signal)


def test_the_smoothed_ratio_approaches_the_true_noise_scale():
    """With |G|^2 = 2 and a noise trace of 50, single steps are all over the place and the smoothed scale is 25."""
    random = np.random.default_rng(0)
    mean = np.full(50, 0.2)
    scale = NoiseScale(decay=0.999)
    single = []
    for _ in range(4000):
        g = mean + random.normal(size=(4, 50))
        noise = estimate((g**2).sum(1), averaged=(g.mean(0) ** 2).sum())
        single.append(noise.signal)
        scale = scale.after(noise)
    assert np.mean(np.array(single) < 0) > 0.2
    assert scale.scale() == pytest.approx(25, rel=0.1)
    assert scale.scale(examples=32) == pytest.approx(32 * scale.scale())


def test_numerator_and_denominator_are_smoothed_apart():
    """The scale is the ratio of the decayed sums, not a decayed ratio."""
    scale = NoiseScale(decay=0.5).after(Noise(1.0, 4.0)).after(Noise(3.0, 2.0))
    assert scale.scale() == (0.25 * 4 + 0.5 * 2) / (0.25 * 1 + 0.5 * 3)
    assert scale.weight == 0.75


def test_one_micro_batch_tells_nothing():
    """K = 1 is empty, and leaves the smoothed values as they were."""
    alone = estimate([4.0], summed=4.0)
    assert np.isnan(alone.signal)
    assert np.isnan(alone.trace)
    before = NoiseScale().after(Noise(1.0, 2.0))
    assert before.after(alone) is before
    assert np.isnan(NoiseScale().scale())


def test_a_negative_signal_has_no_scale():
    """Where noise swamps the signal the scale is empty, not negative; other parameters keep theirs."""
    scale = NoiseScale().after(Noise(np.array([-1.0, 2.0]), np.array([3.0, 4.0]))).scale()
    assert np.isnan(scale[0])
    assert scale[1] == pytest.approx(2)


def test_bad_input_is_explained():
    """No gradients, both or neither of the common norms, and a decay that is none."""
    for arguments in ({}, {"summed": 1.0, "averaged": 1.0}):
        with pytest.raises(ArgumentError, match="either that of their sum or of their mean"):
            estimate([1.0, 2.0], **arguments)
    with pytest.raises(ArgumentError):
        estimate([], summed=1.0)
    with pytest.raises(ArgumentError, match=r"\[0, 1\)"):
        NoiseScale(decay=1.0)
