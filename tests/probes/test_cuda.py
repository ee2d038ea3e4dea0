"""On a GPU the probes give what they give on the CPU, and leave its random state alone."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradlens.probes.curvature import curvature
from gradlens.probes.finite_difference import check_partials
from gradlens.probes.mixed_partials import mixed_partials
from gradlens.probes.nudge import nudge
from gradlens.probes.survey import survey
from gradlens.probes.symmetry import check_symmetry

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def made(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double().to(device)
    random = torch.Generator().manual_seed(0)
    return model, [torch.randn(16, 4, generator=random, dtype=torch.float64).to(device) for _ in range(12)]


def loss(model, batch):
    return (model(batch) - batch.sum(1, keepdim=True)).square().mean()


def test_probes_agree_with_the_cpu():
    """Surveys, nudges, curvature and mixed partials are those of the CPU to rounding."""
    (here, ours), (there, theirs) = made("cpu"), made("cuda")
    a, b = survey(here, loss, ours), survey(there, loss, theirs)
    np.testing.assert_allclose(a.results.t, b.results.t, rtol=1e-6)
    np.testing.assert_array_equal(a.results.verdict, b.results.verdict)
    np.testing.assert_array_equal(survey(there, loss, theirs, sample=10).results.t, b.results.t[survey_places(b, 10)])
    assert nudge(here, loss, a, ours).actual == pytest.approx(nudge(there, loss, b, theirs).actual, rel=1e-6)
    np.testing.assert_allclose(
        mixed_partials(here, lambda m: loss(m, ours[0])),
        mixed_partials(there, lambda m: loss(m, theirs[0])),
        rtol=1e-6,
        atol=1e-12,
    )
    tops = [curvature(m, lambda m, x=x: loss(m, x)).top for m, x in ((here, ours[0]), (there, theirs[0]))]
    assert tops[0] == pytest.approx(tops[1], rel=1e-4)


def survey_places(whole, n):
    from gradlens.probes.per_weight import sampled

    index = sampled([int(np.prod(shape)) for shape in whole.parameters.shapes], n)
    return np.concatenate([whole.bounds[i][0] + at for i, at in enumerate(index)])


@pytest.mark.parametrize("run", [lambda m, x: m(x), lambda m, x: checkpoint(m, x, use_reentrant=False)])
def test_checks_pass_and_the_random_state_is_kept(run):
    """float32 models with dropout are checked in float64, checkpointed or not, and CUDA's random state stays."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1)).cuda()
    x = torch.randn(16, 4, device="cuda")
    before = torch.cuda.get_rng_state()
    found = check_partials(model, lambda m: run(m, x).square().mean())
    assert found.ok, str(found)
    assert found.narrow == ()
    assert check_symmetry(model, lambda m: m(x).pow(4).mean()).ok
    assert torch.equal(torch.cuda.get_rng_state(), before)
