"""Probes on sharded models: a clear sentence on every rank, and no trace, wherever Ctrl-C comes; on replicas they work."""

import random
import signal
import sys

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradlens

pytestmark = pytest.mark.distributed

MOMENTS = 40  #: for each of the probes


def net():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    return nn.Sequential(trunk, nn.Linear(6, 6), trunk[1], nn.Linear(6, 2))


def x():
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def loss(model, batch):
    return model(batch).square().mean()


PROBES = {
    "survey": lambda m: gradlens.survey(m, loss, list(x().split(1))),
    "check_partials": lambda m: gradlens.check_partials(m, lambda v: loss(v, x())),
    "check_symmetry": lambda m: gradlens.check_symmetry(m, lambda v: loss(v, x()), k=1),
    "curvature": lambda m: gradlens.curvature(m, lambda v: loss(v, x()), samples=8),
    "hessian_product": lambda m: gradlens.hessian_product(m, lambda v: loss(v, x()), {"3.bias": torch.ones(2)}),
    "mixed_partials": lambda m: gradlens.mixed_partials(m, lambda v: loss(v, x()), "3.bias"),
}


def trace(model):
    """What a probe must leave: attributes by identity, the local shards bit for bit, random states."""
    dicts = [(k, v) for module in model.modules() for k, v in vars(module).items() if isinstance(v, dict)]
    held = [(k, [(name, id(item)) for name, item in v.items()]) for k, v in dicts]
    parts = [getattr(t, "to_local", lambda t=t: t)() for p in model.parameters() for t in (p, p.grad) if t is not None]
    bits = [(part.dtype, part.detach().reshape(-1).view(torch.uint8).tolist()) for part in parts]
    ids = [(id(p), id(p.grad)) for p in model.parameters()]
    return held, ids, bits, torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.is_grad_enabled()


class Interrupt:
    """Sends SIGINT at the n-th line or bytecode."""

    def __init__(self, at):
        self.at, self.seen = at, 0

    def __call__(self, frame, event, arg):
        frame.f_trace_opcodes = True
        self.seen += 1
        if self.seen == self.at:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return self


def stopped(model, probe, at):
    stop = Interrupt(at)
    sys.settrace(stop)
    try:
        PROBES[probe](model)
    except KeyboardInterrupt:
        said = "interrupted"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "answered"
    finally:
        sys.settrace(None)
    return said, stop.seen


def sharded():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = net()
    fully_shard(model[1])
    fully_shard(model)
    loss(model, x()).backward()
    before, rng = trace(model), random.Random(0)
    found = {}
    for probe in PROBES:
        stopped(model, probe, 0)  # what is imported or set up at the first use is no part of it
        said, events = stopped(model, probe, 0)
        found[probe] = said, trace(model) == before
        clean = [(stopped(model, probe, rng.randrange(1, events))[0], trace(model) == before) for _ in range(MOMENTS)]
        found[probe] += (sum(said == "interrupted" for said, _ in clean), all(same for _, same in clean))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    return found, loss(model, x()).item()


def replicated():
    model = DistributedDataParallel(net())
    bare = net()
    loss(model, x()).backward()
    return {
        "survey": (
            gradlens.survey(model, loss, list(x().split(1))).results.mean.tolist(),
            gradlens.survey(bare, loss, list(x().split(1))).results.mean.tolist(),
        ),
        "check_partials": (gradlens.check_partials(model, lambda v: loss(v, x())).ok, True),
        "check_symmetry": (gradlens.check_symmetry(model, lambda v: loss(v, x()), k=1).ok, True),
        "names": (
            list(gradlens.check_partials(model, lambda v: loss(v, x())).parameters.names),
            [name for name, _ in bare.named_parameters()],
        ),
    }


def teacher():
    """An unsharded model whose loss closes over a sharded one."""
    guide, student = net(), net()
    fully_shard(guide)

    def distilled(m, batch):
        with torch.no_grad():
            target = guide(batch)
        return (m(batch) - target).square().mean() + m(batch).square().mean()

    guide(x())  # FSDP2 sets itself up, and leaves the root's weights gathered
    before = trace(guide)
    found = gradlens.survey(student, distilled, list(x().split(1)))
    return found.coverage >= 0, trace(guide) == before


def test_a_sharded_model_is_refused_with_what_to_do(launched):
    """Every probe says on each rank that the parameter is sharded, changes nothing, and training goes on alike."""
    results = launched(sharded)
    for found, _ in results:
        for probe, (said, same, *_) in found.items():
            assert "is sharded (a DTensor); probe the model before it is sharded" in said, (probe, said)
            assert same, probe
    assert results[0][1] == results[1][1]


def test_an_interrupt_at_any_moment_leaves_no_trace_on_shards(launched):
    """Wherever Ctrl-C comes in a probe of an FSDP2 model, on each rank."""
    for found, _ in launched(sharded):
        for probe, (_, _, interrupted, same) in found.items():
            assert interrupted > MOMENTS / 2, found
            assert same, probe


def test_replicas_are_probed_like_the_model_itself(launched):
    """`DistributedDataParallel` is looked through: the same numbers and names on each rank."""
    for found in launched(replicated):
        for probe, (wrapped, bare) in found.items():
            assert wrapped == bare, probe


def test_a_loss_may_close_over_a_sharded_model(launched):
    """A sharded teacher is used as it is, and left as it was."""
    assert launched(teacher) == [(True, True)] * 2
