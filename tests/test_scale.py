"""What is held does not grow with the weights, and how often the kernel is called does not grow with the parameters."""

import gc

import pytest
import torch

import gradlens
from gradlens import kernels
from gradlens.kernels import prepared


def trained(parameters, weights, **arguments):
    """A lens over a model that made three steps, and the model."""
    model = torch.nn.ParameterList([torch.randn(weights) for _ in range(parameters)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lens = gradlens.watch(model, optimizer, **arguments)
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.square().sum() for p in model).backward()
        optimizer.step()
    lens.flush()
    return lens, model


def held():
    """Bytes of all tensors that Python knows, by where they are."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided and tensor.is_cpu]
    # Of other tests there may be tensors without a memory, whose storage has no pointer to give.
    return {storage._cdata: storage.nbytes() for storage in storages}


def extra(weights, features):
    """Bytes of the tensors that a lens over eight parameters of so many weights holds after three steps."""
    before = held()
    lens, model = trained(8, weights, features=features)
    own = {t.untyped_storage()._cdata for p in model for t in (p, p.grad)}
    more = sum(size for place, size in held().items() if place not in own and before.get(place) != size)
    lens.close()
    return more


def test_without_features_nothing_is_held_that_grows_with_the_weights():
    """A hundred times the weights take not a byte more; with a feature they do."""
    assert extra(100_000, ()) == extra(1000, ()) < 10**6
    assert extra(100_000, ("flips",)) >= 8 * 100_000 * 4


@pytest.fixture
def calls(monkeypatch):
    """The names of what reads tensors, as it is called: the kernels, and calls of them that were prepared."""
    result = []

    def count(owner, name):
        honest = getattr(owner, name)

        def counted(*given, **more):
            depth.append(name)
            if len(depth) == 1:  # a prepared call may rest on a kernel
                result.append(name)
            try:
                return honest(*given, **more)
            finally:
                depth.pop()

        monkeypatch.setattr(owner, name, counted)

    depth = []
    for name in ("summarize", "compare", "sample"):
        count(kernels, name)
    for owner in (prepared.NativePrepared, prepared.GeneralPrepared):
        for name in ("read", "unchanged", "compare"):
            count(owner, name)
    return result


@pytest.mark.parametrize(("features", "most"), [((), 7), (("updates", "flips"), 11)])
def test_the_kernel_is_called_as_often_for_many_parameters_as_for_few(features, most, calls):
    """A step is a reading, a question whether it was written over, and a comparison; the first step takes more."""
    counts = []
    for parameters in (3, 300):
        calls.clear()
        trained(parameters, 5, features=features)[0].close()
        counts.append(list(calls))
    assert counts[0] == counts[1]
    assert 3 <= len(counts[0]) <= most
