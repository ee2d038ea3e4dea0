"""What is asked of all parameters at once: whether anything about them differs."""

import gc

import pytest
import torch
from torch import nn

from gradlens.capture.attachment import Attachment
from gradlens.capture.routes import Layout


class Net(nn.Module):
    """Two modules of one kind, one with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2, bias=False)


def fresh():
    return nn.Parameter(torch.ones(2))


def write(net):
    net.first._parameters["bias"] = fresh()


def drop(net):
    net.first._parameters["bias"] = None


def delete(net):
    del net.first._parameters["bias"]


def rename(net):
    net.third._parameters["scale"] = net.third._parameters.pop("weight")


def hand_on(net):
    """The last of one module's becomes the first of the next one's, under the same name."""
    bias, second = net.first._parameters.pop("bias"), net.second._parameters
    rest = dict(second)
    second.clear()
    second.update({"bias": bias, **rest})


def exchange(net):
    net.first._parameters, net.second._parameters = net.second._parameters, net.first._parameters


def copy(net):
    net.first._parameters = dict(net.first._parameters)


def lose(net):
    del net.third
    gc.collect()


CHANGES = [write, drop, delete, rename, hand_on, exchange, copy, lose]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_written_past_registration_is_seen_at_once(change):
    """Whatever becomes of a module's dictionary of parameters, in which it may have others that are not watched."""
    net = Net()
    layout = Layout(attachment := Attachment(net, ["*.bias", "third.*"]), attachment.tensors())
    assert layout.there()
    change(net)
    assert not layout.there()


def test_what_is_trained_stays_where_it_is():
    """Other numbers, gradients and shapes are no other place."""
    net = Net()
    layout = Layout(attachment := Attachment(net), attachment.tensors())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    net.first.weight.data = torch.zeros(4, 4)
    assert layout.there()
    assert not layout.same()


@pytest.mark.parametrize("target", [{"w": torch.ones(2, requires_grad=True)}, {"net": Net(), "w": fresh()}])
def test_a_tensor_of_no_module_is_nowhere(target):
    """Its place cannot be asked for: what it is part of goes the general way."""
    layout = Layout(attachment := Attachment(target), attachment.tensors())
    assert not layout.there()
