"""Which step each backward and each optimizer's call is part of: numbers written down by hand, beside what the lens has."""

import math
import random

import pytest
import torch
from torch import nn

import gradlens
from tests.capture.helpers import Rewriting


def norm(tensor):
    return tensor.double().norm().item()


def parts(count):
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(3, 3) for _ in range(count))


class Rewrites(Rewriting):
    """Leaves no gradient as it was given."""

    def move(self, p):
        if p.grad is not None:
            given = p.grad.clone()
            if self.way == "zeroed":
                p.grad.zero_()
            elif self.way == "removed":
                p.grad = None
            else:
                p.grad.data.add_(p.data)
            p.add_(given, alpha=-0.05)


class Shrinks(torch.optim.Optimizer):
    """Moves the weights once more when the optimizer inside it has stepped."""

    def __init__(self, base):
        super().__init__([p for group in base.param_groups for p in group["params"]], {"lr": 1.0})
        self.base = base

    @torch.no_grad()
    def step(self, closure=None):
        self.base.step(closure)
        for p in self.param_groups[0]["params"]:
            p.mul_(0.97)


KINDS = [
    lambda ps: torch.optim.SGD(ps, 0.05),
    lambda ps: torch.optim.SGD(ps, 0.02, momentum=0.9, weight_decay=0.1),
    lambda ps: torch.optim.AdamW(ps, 0.01),
    lambda ps: torch.optim.LBFGS(ps, 0.1, max_iter=3),
    *(lambda ps, way=way: Rewrites(ps, way) for way in ("zeroed", "removed", "through data")),
    lambda ps: Shrinks(torch.optim.SGD(ps, 0.05)),
    lambda ps: Shrinks(Shrinks(torch.optim.Adam(ps, 0.01))),
]


class Book:
    """A training of several parts, and what a person would write down beside it."""

    def __init__(self, model, optimizers, wraps=False):
        self.model, self.optimizers = model, optimizers
        if wraps:  # an object with a `step` that holds an optimizer may move weights itself
            vars(self).update({f"optimizer_{i}": optimizer for i, optimizer in enumerate(optimizers)})
        self.backwards = {name: [] for name, _ in model.named_parameters()}
        self.used = {name: [] for name in self.backwards}

    def loss(self, reached):
        x = torch.randn(2, 3)
        return sum(self.model[i](x).pow(2).mean() for i in reached)

    def backward(self, reached):
        loss, named = self.loss(reached), dict(self.model.named_parameters())
        own = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        for name, g in zip(named, own, strict=True):
            self.backwards[name].append(0.0 if g is None else norm(g))
        loss.backward()
        return loss

    def step(self, which, reached=None, clip=False):
        """One call, with a closure where it says what that reaches."""
        named = {name: p for name, p in self.model.named_parameters() if name.startswith(f"{which}.")}
        before = {name: p.detach().double().clone() for name, p in named.items()}
        given = {name: None if p.grad is None else p.grad.double().clone() for name, p in named.items()}

        def closure():
            self.model.zero_grad()
            loss = self.backward(reached)
            if clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
            given.update({name: p.grad.double().clone() for name, p in named.items()})
            return loss

        self.optimizers[which].step(*([] if reached is None else [closure]))
        for name, p in named.items():
            dw, g = p.detach().double() - before[name], given[name]
            self.used[name].append((g, dw))

    def check(self, history):
        for name in self.backwards:
            rows = history[history["parameter"] == name].sort_values(["step", "backward"], kind="stable")
            backwards, used = rows[rows["stage"] == "backward"], rows[rows["stage"] == "used"]
            assert list(backwards["l2"]) == pytest.approx(self.backwards[name], rel=1e-5)
            assert not used.duplicated(["step", "backward"]).any()
            assert len(used) == len(self.used[name])
            for row, (g, dw) in zip(used.to_dict("records"), self.used[name], strict=True):
                assert row["update_l2"] == pytest.approx(norm(dw), rel=1e-4)
                if g is not None and row["status"] != "absent":  # absent: what is in `.grad` is of an earlier step
                    assert row["l2"] == pytest.approx(norm(g), rel=1e-5)
                    known = not math.isnan(row["used_dot_dw"])
                    assert not known or row["used_dot_dw"] == pytest.approx((g * dw).sum().item(), rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("seed", range(24))
def test_every_call_of_an_optimizer_is_one_row_of_what_it_did(seed):
    """Whatever is called in whatever order, each call has a row a parameter, with that call's gradient and move."""
    draw = random.Random(seed)
    model = parts(seed % 3 + 1)
    numbers = range(len(model))
    optimizers = [draw.choice(KINDS)(list(part.parameters())) for part in model]
    listed = draw.sample(optimizers, len(optimizers))
    book = Book(model, optimizers, wraps=draw.random() < 0.5)
    features = draw.choice([("updates",), ("updates", "flips")])
    with gradlens.watch(model, listed, features=features, rules=()) as lens:
        for _ in range(draw.randint(8, 30)):
            reached = [i for i in numbers if draw.random() < 0.8] or [0]
            which, kind = draw.choice(numbers), draw.random()
            if kind < 0.4:
                if draw.random() < 0.7:
                    model.zero_grad(set_to_none=draw.random() < 0.8)
                book.backward(reached)
                if draw.random() < 0.2:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            elif kind < 0.6 or isinstance(optimizers[which], torch.optim.LBFGS):
                book.step(which, sorted({which, *reached}), clip=draw.random() < 0.3)
            elif book.backwards["0.weight"]:
                book.step(which)
    book.check(lens.history())


def steps(lens, stage="used"):
    history = lens.history()
    rows = history[(history["stage"] == stage) & history["parameter"].str.endswith("weight")]
    return list(zip(rows["parameter"].str[0], rows["step"], rows["backward"], strict=True))


def sgd(model):
    return [torch.optim.SGD(part.parameters(), 0.05) for part in model]


def test_a_second_call_on_the_same_gradients_is_a_step_of_its_own():
    """The first call is of the step whose backward it consumed, the clock's too, though it comes after the second."""
    model = parts(2)
    book = Book(model, sgd(model))
    with gradlens.watch(model, book.optimizers, rules=()) as lens:
        for _ in range(2):
            model.zero_grad()
            book.backward([0, 1])
            book.step(0)
            book.step(0)
            book.step(0)
            book.step(1)
    assert sorted(steps(lens)) == [("0", n, 0) for n in range(6)] + [("1", 0, 0), ("1", 3, 0)]
    assert steps(lens, "backward") == [("0", 0, 0), ("1", 0, 0), ("0", 3, 0), ("1", 3, 0)]


@pytest.mark.parametrize("listed", [(0, 1), (1, 0)])
def test_a_closures_backward_opens_the_step_that_its_optimizer_is_part_of(listed):
    """An optimizer with a closure consumes what that computes, never what the step before has left."""
    model = parts(2)
    book = Book(model, sgd(model))
    with gradlens.watch(model, [book.optimizers[i] for i in listed], rules=()) as lens:
        for which in (0, 1, 1, 0, 0, 1):
            book.step(which, [0, 1])
    assert {row[1:] for row in steps(lens)} == {row[1:] for row in steps(lens, "backward")}
    book.check(lens.history())


def test_many_calls_without_a_backward_hold_no_tables():
    """An optimizer that steps on, with no backward ever again, leaves nothing behind in memory."""
    model = parts(2)
    book = Book(model, sgd(model))
    with gradlens.watch(model, book.optimizers, rules=()) as lens:
        book.backward([0, 1])
        for _ in range(100):
            book.optimizers[0].step()
            assert len(lens._tables.open.tables) < 20
    assert len(steps(lens)) == 100
