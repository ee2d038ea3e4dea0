"""What is inside a wrapper is found, whoever wrapped it."""

import pytest
import torch
from torch import nn

import gradlens
from gradlens.unwrapping import plain_name, unwrap_model, unwrap_optimizer


def sgd():
    return torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)


def test_optimizers_are_unwrapped():
    """A torch optimizer is itself; accelerate's wrapper, wrappers in wrappers and other objects give what is inside."""
    from accelerate import Accelerator

    plain = sgd()
    assert unwrap_optimizer(plain) is plain
    wrapped = Accelerator(cpu=True).prepare_optimizer(plain)
    assert wrapped is not plain
    assert unwrap_optimizer(wrapped) is plain
    assert unwrap_optimizer(type("Outer", (), {"optimizer": wrapped})()) is plain
    assert unwrap_optimizer(None) is None
    model = nn.Linear(1, 1)
    assert unwrap_optimizer(model) is model


def test_a_ring_of_wrappers_ends():
    """Two objects that claim to wrap each other are no endless loop."""
    a, b = type("A", (), {})(), type("B", (), {})()
    a.optimizer, b.optimizer = b, a
    assert unwrap_optimizer(a) in (a, b)


def test_models_are_unwrapped_and_names_are_plain():
    """Compiled and parallel wrappers leave no prefix; a submodule that is called `module` keeps its name."""
    inner = nn.Sequential(nn.Linear(2, 1))
    compiled = torch.compile(nn.DataParallel(inner), backend="eager")
    assert unwrap_model(compiled) is inner
    names = [name for name, _ in compiled.named_parameters()]
    assert [plain_name(compiled, name) for name in names] == ["0.weight", "0.bias"]
    holder = nn.Module()
    holder.module = nn.Linear(1, 1)
    assert [plain_name(holder, name) for name, _ in holder.named_parameters()] == ["module.weight", "module.bias"]


def test_names_have_no_prefix_of_fabric_and_opacus():
    """F29: `_forward_module` and `_module` are theirs; a model's own `_module` stays."""
    lightning = pytest.importorskip("lightning.fabric")
    net = nn.Sequential(nn.Linear(2, 2))
    wrapped = lightning.Fabric(accelerator="cpu").setup_module(net)
    assert [plain_name(wrapped, name) for name, _ in wrapped.named_parameters()] == ["0.weight", "0.bias"]
    for name, plain in (("GradSampleModule", "0.weight"), ("Own", "_module.0.weight")):
        outer = type(name, (nn.Module,), {})()
        outer._module = nn.Sequential(nn.Linear(2, 2))
        assert plain_name(outer, "_module.0.weight") == plain


def test_rows_have_the_names_of_the_model_within_fabric():
    """F29: under a lens, too."""
    lightning = pytest.importorskip("lightning.fabric")
    fabric = lightning.Fabric(accelerator="cpu")
    net = nn.Sequential(nn.Linear(2, 2))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.1))
    with gradlens.watch(model, optimizer) as lens:
        fabric.backward(model(torch.ones(3, 2)).sum())
        optimizer.step()
        assert lens.names() == ["0.weight", "0.bias"]
        assert lens.table()["parameter"].tolist() == lens.names()
