"""The shipped cases: every illness is found by its rule in a real training, and health is left alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradlens
from gradlens.errors import ArgumentError
from gradlens.records import Finding, Severity, Snapshot
from gradlens.testing import CLASSES, ILL, Case, RecordingWriter, healthy, wrong_backward
from gradlens.writers.base import Writer

STEPS = 60

#: Parameters of each case that are well, and that no finding may name.
WELL = {
    "vanishing": {"18.weight", "20.weight", "22.weight"},
    "exploding": {"0.bias"},
    "dead_relu": {"last.bias"},
    "absent_branch": {"first.weight", "hidden.weight", "last.weight", "first.bias", "hidden.bias", "last.bias"},
    "nonfinite": set(),
}


def watched(case, steps=STEPS, **options):
    """The case trained under a lens: its findings, the lens closed."""
    with gradlens.watch(case.model, case.optimizer, **options) as lens:
        case.train(steps)
    return lens.findings()


def named(findings):
    """All parameters that they are about."""
    return {name for finding in findings for name in (finding.parameters or (finding.parameter,))}


# --- illness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ILL, ids=lambda make: make.__name__)
def test_an_illness_is_found_by_its_rule_and_named_at_its_parameters(make):
    """The case's rule names the case's parameters and none that is well; other rules speak of the whole model only."""
    case = make()
    every = watched(case)
    findings = [finding for finding in every if finding.rule == case.rule]
    assert findings
    assert all(finding.parameter is None for finding in every if finding.rule != case.rule)
    assert named(findings) >= set(case.parameters)
    assert not named(findings) & WELL[make.__name__]
    assert all(finding.causes and finding.remedy for finding in findings)
    assert all(finding.severity != Severity.INFO for finding in findings)


def test_the_first_nonfinite_gradient_is_the_culprit():
    """At the poisoned step only the parameter before the norm is named; the others follow a step later, with that cause."""
    findings = watched(ILL[-1]())
    assert (findings[0].step, findings[0].parameter) == (5, "first.weight")
    assert {finding.parameter for finding in findings if finding.step == 5} == {"first.weight"}
    later = [finding for finding in findings if finding.step == 6]
    assert later
    assert all("first.weight" in finding.causes[0] for finding in later)


def test_the_culprit_of_dead_layers_is_the_last_of_them():
    """The layers before a shut one are dead as well: each finding says which to look at."""
    case = next(make for make in ILL if make.__name__ == "dead_relu")()
    dead = [finding for finding in watched(case) if finding.rule == case.rule]
    assert dead
    assert all("look at 'hidden' first" in finding.remedy for finding in dead)


def test_a_wrong_backward_is_seen_by_no_rule_but_by_check_partials():
    """One gradient's numbers look well; finite differences tell, and name the parameters before the mistake."""
    case = wrong_backward()
    assert watched(case, 20) == []
    data = case.batch(0)
    check = gradlens.check_partials(case.model, lambda model: case.loss(model, data), k=16)
    assert not check.ok


# --- health ---------------------------------------------------------------------------------------------------------


def bars(step, size=32):
    """Noisy pictures, `[size, 1, 12, 12]`, with a bright bar in the row of the class."""
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(CLASSES, (size,), generator=generator)
    x = 0.5 * torch.randn(size, 1, 12, 12, generator=generator)
    x[torch.arange(size), 0, 3 * y] += 1.0
    return x, y


def tokens(step, size=16, length=12):
    """Counting modulo 11 from a random start by a random stride: all but the last token, and all but the first."""
    generator = torch.Generator().manual_seed(step)
    start, stride = (torch.randint(1, 11, (size, 1), generator=generator) for _ in range(2))
    sequence = (start + stride * torch.arange(length + 1)) % 11
    return sequence[:, :-1], sequence[:, 1:]


def next_token(model, data):
    """The cross entropy of the next token."""
    x, y = data
    return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def classify(model, data):
    return functional.cross_entropy(model(data[0]), data[1])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.gru = nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, 11)

    def forward(self, x):
        return self.head(self.gru(self.embedding(x))[0])


class Transformer(nn.Module):
    """Two causal blocks with learnt positions."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 32)
        self.position = nn.Parameter(0.02 * torch.randn(12, 32))
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True),
            num_layers=2,
            norm=nn.LayerNorm(32),
            enable_nested_tensor=False,
        )
        self.head = nn.Linear(32, 11)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.blocks(self.embedding(x) + self.position, mask=mask, is_causal=True))


def convnet():
    """Convolutions with normalisation, whose biases before it have no gradient to speak of, under momentum."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 9, CLASSES),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    return Case(model, optimizer, classify, batch=bars)


def recurrent():
    """A recurrent net of which each batch uses some words only."""
    model = Recurrent()
    return Case(model, torch.optim.Adam(model.parameters(), lr=5e-3), next_token, batch=tokens)


def transformer():
    """Young attention, whose queries and keys have small gradients."""
    model = Transformer()
    return Case(model, torch.optim.AdamW(model.parameters(), lr=2e-3), next_token, batch=tokens)


@pytest.mark.parametrize("make", [healthy, convnet, recurrent, transformer], ids=lambda make: make.__name__)
def test_a_healthy_training_has_no_findings(make):
    """A model that learns gets no warning and no error in its first steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        case = make()
        with gradlens.watch(case.model, case.optimizer) as lens:
            losses = case.train(STEPS)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), "it must learn, else it is no proof"
    assert [str(finding) for finding in lens.findings() if finding.severity != Severity.INFO] == []


# --- cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*ILL, healthy, wrong_backward], ids=lambda make: make.__name__)
def test_a_case_is_made_the_same_each_time(make):
    """Two calls give equal weights and equal batches, and the global random state is as it was."""
    state = torch.random.get_rng_state()
    one, two = make(), make()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    for a, b in zip(one.batches(3, first=4), two.batches(3, first=4), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_training_can_be_cut_in_two():
    """Training ten steps and then ten more is training twenty."""
    whole, cut = healthy(), healthy()
    assert whole.train(20) == cut.train(10) + cut.train(10, first=10)


# --- the recording writer -------------------------------------------------------------------------------------------


def test_a_recording_writer_keeps_what_a_training_wrote():
    """It is a writer: it gets each snapshot and each finding once, in order, is flushed, and closed once."""
    writer, case = RecordingWriter(), ILL[3]()
    assert isinstance(writer, Writer)
    with gradlens.watch(case.model, case.optimizer, writers=[writer]) as lens:
        case.train(12)
        lens.flush()
        assert writer.calls["flush"] >= 1
    assert [(s.step, s.stage) for s in writer.snapshots] == [(k, stage) for k in range(12) for stage in ("backward", "used")]
    assert writer.findings == lens.findings()
    assert writer.findings
    assert all(isinstance(record, Snapshot | Finding) for record in writer.records)
    assert len(writer.records) == len(writer.snapshots) + len(writer.findings) == writer.calls["write"]
    assert writer.calls["close"] == 1


@pytest.mark.parametrize("on", ["write", "flush", "close"])
def test_a_recording_writer_fails_where_it_is_told(on):
    """The call that is named raises once it was called so often, and the others do not."""
    writer = RecordingWriter(OSError("disk full"), on=on, after=2)
    for call in ("write", "flush", "close"):
        act = getattr(writer, call)
        arguments = ["a record"] if call == "write" else []
        act(*arguments)
        act(*arguments)
        if call == on:
            with pytest.raises(OSError, match="disk full"):
                act(*arguments)
        else:
            act(*arguments)
    assert writer.calls == {"write": 3, "flush": 3, "close": 3}
    assert len(writer.records) == (2 if on == "write" else 3)


def test_a_recording_writer_knows_what_a_writer_is_asked():
    """A call that no writer has is an error that names those there are."""
    with pytest.raises(ArgumentError, match="write, flush, close"):
        RecordingWriter(OSError(), on="open")
