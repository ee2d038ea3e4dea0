"""Models that change while they are watched."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.capture.helpers import grads, same


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))


def train(model, optimizer, steps=1):
    for _ in range(steps):
        model.zero_grad()
        model(torch.ones(4, 3, dtype=next(model.parameters()).dtype)).pow(2).sum().backward()
        optimizer.step()


@contextlib.contextmanager
def swapping():
    """Torch swaps tensors in `Module.to()` and `load_state_dict` instead of setting their data."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


class Wrapped(torch.Tensor):
    """A wrapper subclass, such as quantisation libraries make: `Module.to()` swaps it."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=requires_grad)

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors, meta, size, stride):
        return Wrapped(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, call, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        result = call(*plain[0], **plain[1])
        if call in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            return Wrapped(result)
        return result


class LoRA(nn.Module):
    """A frozen layer and a trained correction of low rank."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(3, 1, bias=False), nn.Linear(1, 3, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def assigned(model):
    model.load_state_dict({n: torch.ones_like(p) / 3 for n, p in model.state_dict().items()}, assign=True)


def swapped(model):
    with swapping():
        model.double()


def loaded_by_swapping(model):
    with swapping():
        model.load_state_dict({n: torch.ones_like(p) / 3 for n, p in model.state_dict().items()})


def past_registration(model):
    model[0]._parameters["weight"] = nn.Parameter(torch.ones(3, 3))


def injected(model):
    model[0] = LoRA(model[0])


def resized(model):
    model[2].weight.data, model[2].bias.data = torch.ones(4, 3), torch.ones(4)
    model.zero_grad()


#: What happens to the model, and whether every parameter is read in the very next backward.
CHANGES = {
    "assign=True": (assigned, True),
    "weight_norm, old": (lambda m: nn.utils.weight_norm(m[0]), True),
    "weight_norm": (lambda m: parametrizations.weight_norm(m[0]), True),
    "spectral_norm": (lambda m: parametrizations.spectral_norm(m[0]), True),
    "orthogonal": (lambda m: parametrizations.orthogonal(m[0]), True),
    "LoRA": (injected, True),
    "double": (lambda m: m.double(), True),
    "double, swapping": (swapped, False),
    "load_state_dict, swapping": (loaded_by_swapping, False),
    "past torch's registration": (past_registration, False),
    "another shape": (resized, True),
    "pruned": (lambda m: prune.l1_unstructured(m[0], "weight", amount=0.5), True),
}


@pytest.mark.trap(11, 12)
@pytest.mark.situation(
    "LoRA, `load_state_dict(assign=True)`, weight_norm, spectral_norm, orthogonal, pruning, `.double()`, another shape",
    stages={"backward": "yes", "used": "yes"},
)
@pytest.mark.situation(
    "swap mode; parameters written past torch's registration",
    stages={"backward": "marked: read again from the next step, or after 16 where torch tells nobody", "used": "yes"},
    note="a parameter that was swapped keeps its identity and loses its hooks; that is noticed where `.grad` changed",
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_read_again(watched, change):
    """The next backward has every parameter, or the step says which are uncaptured; then all are read again."""
    apply, at_once = CHANGES[change]
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    bench = watched(model, optimizer)
    train(model, optimizer, steps=2)
    apply(model)
    optimizer.add_param_group({"params": [p for p in model.parameters() if id(p) not in ids(optimizer)]})
    train(model, optimizer)
    if at_once:
        same(bench.sink.merged(2, 0, "backward"), grads(model))
    same(bench.sink.merged(2, 0, "used"), grads(model))
    if change.endswith("swapping"):
        assert set(bench.sink.notes(2, 0, "used").values()) == {"uncaptured"}
    train(model, optimizer, steps=1 if change != "past torch's registration" else 16)
    last = bench.capture.step.number - 1
    same(bench.sink.merged(last, 0, "backward"), grads(model))
    same(bench.sink.merged(last, 0, "used"), grads(model))
    assert "uncaptured" not in bench.sink.notes(last, 0, "used").values()


def ids(optimizer):
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.trap(11)
def test_a_parameter_with_the_id_of_one_that_was_freed(watched):
    """An id that is used again does not pass for the parameter that had our hooks."""
    model = net()
    bench = watched(model)
    before, ones = id(model[0].weight), torch.ones(3, 3)
    for _ in range(1000):
        del model[0]._parameters["weight"]
        model[0]._parameters["weight"] = nn.Parameter(ones)
        if id(model[0].weight) == before:
            break
    else:
        pytest.skip("the memory was not used again")
    model(torch.ones(4, 3)).pow(2).sum().backward()
    same(bench.sink.merged(0, 0, "backward"), grads(model))


@pytest.mark.trap(13)
@pytest.mark.situation("wrapper subclasses, which `.to()` swaps", stages={"backward": "yes", "used": "yes"})
def test_a_wrapper_subclass_can_be_converted(watched):
    """`.to()` works on a watched parameter of a wrapper subclass, and capture recovers at the next step."""
    model = net()
    model[0].weight = nn.Parameter(Wrapped(model[0].weight.detach()))
    optimizer = torch.optim.SGD([model[0].bias, *model[2].parameters()], 0.01)
    bench = watched(model, optimizer)
    train(model, optimizer)
    assert "0.weight" in bench.sink.merged(0, 0, "backward")
    model.double()
    assert model[0].weight.inner.dtype == torch.float64
    train(model, optimizer, steps=2)
    assert "0.weight" in bench.sink.merged(2, 0, "backward")


@pytest.mark.situation("pruning", stages={"backward": "yes: exactly 0 where masked"})
def test_pruned_entries_are_zeros(watched):
    """Masked entries get a partial of exactly 0, under the name that pruning gives; `prune.remove` keeps the hooks."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    bench = watched(model, optimizer)
    prune.random_unstructured(model[0], "weight", amount=4)
    train(model, optimizer)
    masked = model[0].weight_mask == 0
    assert masked.sum() == 4
    assert (bench.sink.merged(0, 0, "backward")["0.weight_orig"][masked] == 0).all()
    prune.remove(model[0], "weight")
    train(model, optimizer)
    same(bench.sink.merged(1, 0, "backward"), grads(model))


@pytest.mark.situation("parametrizations", stages={"backward": "yes: under the name `parametrizations.weight.original`"})
def test_parametrizations_change_names(watched):
    """A parametrised weight is reported by its new name, and by the old one once that is removed."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    bench = watched(model, optimizer)
    parametrize.register_parametrization(model[0], "weight", nn.Softplus(), unsafe=True)
    train(model, optimizer)
    assert "0.parametrizations.weight.original" in bench.sink.merged(0, 0, "backward")
    parametrize.remove_parametrizations(model[0], "weight")
    train(model, optimizer)
    same(bench.sink.merged(1, 0, "backward"), grads(model))


@pytest.mark.trap(39)
@pytest.mark.situation("lazy modules", stages={"backward": "yes: once another parameter is reached before", "used": "yes"})
def test_lazy_parameters_are_read_once_they_are_there(watched):
    """Uninitialised parameters are watched as soon as a forward has made them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    bench = watched(model, optimizer)
    train(model, optimizer)
    for stage in ("backward", "used"):
        same(bench.sink.merged(0, 0, stage), grads(model))


@pytest.mark.trap(39)
@pytest.mark.situation("a model of lazy modules only", stages={"backward": "marked: from the second step", "used": "yes"})
def test_a_wholly_lazy_model_is_read_from_its_second_step(watched):
    """With no hook on anything the first step shows the gradients as uncaptured; the second is as any."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(2))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    bench = watched(model, optimizer)
    train(model, optimizer)
    same(bench.sink.merged(0, 0, "used"), grads(model))
    assert set(bench.sink.notes(0, 0, "used").values()) == {"uncaptured"}
    train(model, optimizer)
    same(bench.sink.merged(1, 0, "backward"), grads(model))


@pytest.mark.trap(10)
@pytest.mark.situation("freezing schedules", stages={"backward": "yes", "used": "yes: `frozen` while frozen"})
def test_freezing_schedules(watched):
    """Layers are unfrozen from the top down, and frozen again: each step reads exactly those that train."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model[0].requires_grad_(False)
    bench = watched(model, optimizer)
    for step, trained in enumerate([{"2"}, {"0", "2"}, {"2"}, {"0"}, {"0", "2"}]):
        for name in ("0", "2"):
            model[int(name)].requires_grad_(name in trained)
        train(model, optimizer)
        names = {f"{layer}.{leaf}" for layer in trained for leaf in ("weight", "bias")}
        assert set(bench.sink.merged(step, 0, "used")) == names, step
        notes = bench.sink.notes(step, 0, "used")
        assert {n for n, note in notes.items() if note == "frozen"} == {n for n, _ in model.named_parameters()} - names
        assert set(bench.sink.merged(step, 0, "backward")) == names, step


@pytest.mark.situation(
    "a parameter that is added, and reached before any other",
    stages={"backward": "marked: `uncaptured` in its first backward, the numbers are right; then yes"},
)
def test_a_growing_parameter_list(watched):
    """ParameterList.append is noticed in the first backward, be it by its `.grad` alone."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([torch.ones(3)])

        def forward(self):
            return sum(w.pow(2).sum() for w in self.weights)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    for step in range(3):
        model.zero_grad()
        model().backward()
        optimizer.step()
        assert set(bench.sink.merged(step, 0, "backward")) == {f"weights.{i}" for i in range(step + 1)}
        notes = bench.sink.notes(step, 0, "backward")
        assert {n for n, note in notes.items() if note} <= {f"weights.{step}"}
        assert {note for note in notes.values() if note} <= {"uncaptured"}
        model.weights.append(nn.Parameter(torch.ones(2)))


@pytest.mark.situation(
    "a module that is deleted between backward and the step",
    stages={"backward": "yes", "used": "no: its rows end"},
)
def test_a_deleted_module(watched):
    """What is gone when the optimizer steps has no `used` row; those of its backward keep the shape that it had."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 2)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    model["b"](model["a"](torch.ones(4, 3))).pow(2).sum().backward()
    shapes = bench.capture.attachment.parameters.shapes
    del model["b"]
    optimizer.step()
    assert bench.sink.notes(0, 0, "used")["b.weight"] == "elsewhere"
    assert set(bench.sink.merged(0, 0, "used")) == {"a.weight", "a.bias"}
    bench.capture.attachment.refresh()
    assert bench.capture.attachment.parameters.shapes == shapes
    model.zero_grad()
    model["a"](torch.ones(4, 3)).pow(2).sum().backward()
    assert bench.capture.attachment.parameters.names == ("a.weight", "a.bias")
    same(bench.sink.merged(1, 0, "backward"), grads(model))


@pytest.mark.situation("a model that `jit.script` has compiled", stages={"backward": "yes", "used": "yes"})
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model(watched):
    """The parameters of a scripted module are in no dictionary of Python's."""
    model = torch.jit.script(net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    train(model, optimizer, steps=2)
    for stage in ("backward", "used"):
        same(bench.sink.merged(1, 0, stage), grads(model))
