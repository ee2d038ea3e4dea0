"""Each probe on the kinds of models people train: its answers are right, agree with each other, and leave no trace."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gradlens

from .helpers import trace


class Words(nn.Module):
    """A transformer over words, whose output shares the weights of its embedding."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed, self.out = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        if tied:
            self.out.weight = self.embed.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(6))

    def forward(self, x):
        return self.out(self.block(self.embed(x), src_mask=self.mask, is_causal=True))


class Recurrent(nn.Module):
    """An embedding with sparse gradients and a recurrent layer."""

    def __init__(self, kind):
        super().__init__()
        self.embed, self.rnn, self.out = nn.Embedding(12, 6, sparse=True), kind(6, 7, batch_first=True), nn.Linear(7, 12)

    def forward(self, x):
        return self.out(self.rnn(self.embed(x))[0])


class Adapted(nn.Module):
    """A frozen layer with a low-rank change beside it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(5, 3).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        return self.base(x) + x @ self.down @ self.up


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(*size, dtype=torch.complex64) for size in ((5, 4), (4, 3)))

    def forward(self, x):
        return self.second(self.first(x.to(torch.complex64))).abs()


def dense(dtype=torch.float32):
    return nn.Sequential(nn.Linear(5, 8), nn.GroupNorm(2, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)


def images():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Dropout(0.2), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


MODELS = {
    "dense": dense,
    "bfloat16": lambda: dense(torch.bfloat16),
    "float16": lambda: dense(torch.float16),
    "float64": lambda: dense(torch.float64),
    "complex": Complex,
    "images": images,
    "words": Words,
    "words, not tied": lambda: Words(tied=False),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "RNN": lambda: Recurrent(nn.RNN),
    "GRU": lambda: Recurrent(nn.GRU),
    "adapted": Adapted,
    "compiled": lambda: torch.compile(dense(), backend="eager"),
    "replicated": dense,
}


def made(name, k=9):
    """A model that can learn, k batches for it, and its loss."""
    torch.manual_seed(0)
    model = MODELS[name]()
    random = torch.Generator().manual_seed(0)
    if isinstance(model, Words | Recurrent):
        batches = [torch.randint(0, 12, (8, 7), generator=random) // 2 for _ in range(k)]
        return model, batches, lambda m, b: F.cross_entropy(m(b[:, :-1]).flatten(0, 1), b[:, 1:].flatten())
    x = [torch.randn(16, 16 if name == "images" else 5, generator=random) for _ in range(k)]
    batches = [(part, part[:, :3].argmax(1)) for part in x]
    dtype = next(model.parameters()).dtype if name != "complex" else torch.float32
    return model, batches, lambda m, b: F.cross_entropy(m(b[0].to(dtype)).double(), b[1])


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*(nested|Complex).*")
@pytest.mark.parametrize("name", MODELS)
def test_the_probes_agree_on_it(name, request):
    """Partials are right, mixed ones equal, the mean over batches is the survey's, a nudge does what is predicted."""
    model, batches, loss = made(name)
    inner = getattr(model, "_orig_mod", model)
    if name == "replicated":
        request.getfixturevalue("group")
        model = DistributedDataParallel(inner)
    before = trace(inner)
    one = lambda m: loss(m, batches[0])  # noqa: E731

    checked = gradlens.check_partials(model, one, k=24)
    assert checked.ok, str(checked)
    assert checked.narrow == ()
    assert gradlens.check_symmetry(model, one, k=1).ok
    surveyed = gradlens.survey(model, loss, batches, 0.5)
    bent = gradlens.curvature(model, one, samples=2, lr=0.1)
    assert trace(inner) == before

    names = {n: p for n, p in inner.named_parameters() if p.requires_grad}
    assert surveyed.parameters.names == bent.parameters.names == tuple(names)
    assert len(surveyed) == sum(p.numel() * (2 if p.is_complex() else 1) for p in names.values())
    assert np.isfinite(surveyed.results.mean).all()
    assert np.isfinite([bent.top, bent.bottom, bent.residual]).all()
    assert surveyed.coverage > 0, str(surveyed)

    inner.eval()  # without dropout the same loss is seen twice
    found = gradlens.survey(model, loss, batches, 0.5)
    size = 1e-2 if "16" in name else 1e-4
    moved = gradlens.nudge(model, loss, found, batches, size)
    assert moved.predicted < 0
    off = 0.35 if "16" in name else 0.05
    assert abs(moved.actual - moved.predicted) < off * abs(moved.predicted) + 2 * moved.rounding, str(moved)


@pytest.mark.filterwarnings("ignore:.*(nested|Complex).*")
@pytest.mark.parametrize("name", ["dense", "complex", "images", "words", "LSTM", "adapted"])
def test_its_survey_is_the_mean_of_plain_backwards(name):
    """The partials of a survey are those that loss.backward() would leave, batch for batch."""
    model, batches, loss = made(name)
    model.eval()
    found = gradlens.survey(model, loss, batches, 0.5)
    total = 0.0
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        parts = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters() if p.requires_grad]
        parts = [torch.view_as_real(g) if g.is_complex() else g for g in parts]
        total = total + torch.cat([g.reshape(-1).double() for g in parts]) / len(batches)
    np.testing.assert_allclose(found.results.mean, total, rtol=1e-9, atol=1e-15)
