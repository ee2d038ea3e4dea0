"""The walk over a loss's graph: what it reads, what it leaves alone, and where it stops."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradlens.capture import features
from gradlens.capture.graph import LIMIT, plain_name, walk
from gradlens.facts import Graph


def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def named(module):
    return {id(p): name for name, p in module.named_parameters()}


def test_operations_come_in_the_order_of_their_distance_from_the_loss():
    """The loss's own operation is the first, and each input is behind the operation that takes it."""
    net = model()
    graph = walk(F.cross_entropy(net(torch.randn(5, 4)), torch.zeros(5, dtype=torch.long)), named(net))
    assert [op.name for op in graph.operations[:3]] == ["NllLoss", "LogSoftmax", "Addmm"]
    assert all(j == -1 or j > i for i, op in enumerate(graph.operations[:3]) for j in op.inputs)
    assert sorted(graph.leaves) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_shapes_and_saved_numbers_are_read_and_tensors_are_not():
    """An operation has the shape of what it made, and its saved numbers."""
    net = model()
    graph = walk(net(torch.randn(5, 4)).log_softmax(1).sum(), named(net))
    (softmax,) = [op for op in graph.operations if op.name == "LogSoftmax"]
    assert softmax.shape == (5, 3)
    assert softmax.saved == {"dim": 1}


def test_the_graph_can_be_read_inside_its_own_backward():
    """In a hook, when the tensors near the loss are freed, names, edges and numbers are the same."""
    net = model()
    loss = F.cross_entropy(net(torch.randn(5, 4)), torch.zeros(5, dtype=torch.long))
    before, seen = walk(loss, named(net)), []
    net[0].bias.register_post_accumulate_grad_hook(lambda _: seen.append(walk(loss, named(net))))
    loss.backward()
    assert seen[0].operations == before.operations


def test_a_walk_changes_nothing():
    """Gradients after a walk with values are bit for bit those without."""
    net, x = model(), torch.randn(5, 4)
    gradients = []
    for look in (False, True):
        net.zero_grad()
        loss = (net(x).square().sum(1) + 1e-3).sqrt().mean()
        if look:
            walk(loss, named(net), values=True)
        loss.backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(map(torch.equal, *gradients))


def test_values_are_facts_on_tensors_that_are_still_there():
    """Before backward the extremes are known; after it they are not, and nothing is raised."""
    w = torch.tensor([0.0, 4.0], requires_grad=True)
    loss = w.sqrt().sum()
    facts = walk(loss, values=True).operations[1].saved
    assert (facts["edge"], facts["row"], facts["of"]) == (1, 0, 2)
    loss.backward()
    assert "edge" not in walk(loss, values=True).operations[1].saved


def test_what_a_checkpoint_has_packed_is_left_alone():
    """Its saved tensors may be unpacked once, by backward: a walk with values does not touch them."""
    layer = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    loss = checkpoint(lambda h: layer(h).exp().sqrt(), x, use_reentrant=False).sum()
    graph = walk(loss, named(layer), values=True)
    assert [op.saved.get("edge") for op in graph.operations if op.name == "Sqrt"] == [None]
    assert features.last_layer(loss) is not None
    assert features.features_of(features.last_layer(loss)) is None
    loss.backward()
    assert layer.weight.grad is not None


def test_the_walk_is_bounded():
    """A graph with more operations than the limit is cut, and says so."""
    x = torch.ones(1, requires_grad=True)
    y = x
    for _ in range(50):
        y = y * 1.5
    graph = walk(y.sum(), limit=20)
    assert graph.truncated
    assert len(graph.operations) == 20
    assert not walk(y.sum(), limit=LIMIT).truncated


def test_a_root_without_a_graph():
    """A detached loss has an empty graph; a leaf is a graph of one leaf."""
    assert walk(torch.tensor(1.0)).operations == ()
    leaf = torch.tensor(1.0, requires_grad=True)
    assert [op.leaf for op in walk(leaf, {id(leaf): "w"}).operations] == ["w"]


def test_leaves_are_handed_on_with_their_position():
    """`leaf` is called with each leaf, also those that have no name."""
    net, extra, found = model(), nn.Parameter(torch.ones(3)), {}
    graph = walk((net(torch.randn(5, 4)) * extra).sum(), named(net), leaf=found.__setitem__)
    assert any(tensor is extra for tensor in found.values())
    assert all(graph.operations[at].leaf is not None for at in found)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("LogSoftmaxBackward0", "LogSoftmax"),
        ("DivBackward12", "Div"),
        ("torch::autograd::CopySlices", "torch::autograd::CopySlices"),
    ],
)
def test_names_lose_backward_and_its_number(name, plain):
    """`LogSoftmaxBackward0` is `LogSoftmax`."""

    class Node:
        def name(self):
            return name

    assert plain_name(Node()) == plain


def test_sources_pass_over_what_only_lays_out():
    """A view between two operations does not hide one from the other."""
    x = torch.randn(6, requires_grad=True)
    graph = walk(x.exp().view(2, 3).T.log().sum())
    log = next(i for i, op in enumerate(graph.operations) if op.name == "Log")
    assert [graph.operations[i].name for i in graph.sources(log)] == ["Exp"]
    exp = next(i for i, op in enumerate(graph.operations) if op.name == "Exp")
    assert [graph.operations[i].name for i in graph.users(exp)] == ["Log"]


def test_a_layer_is_a_product_with_a_leaf():
    """A linear layer and a convolution are layers; a product of two activations is not."""
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten(), nn.Linear(12, 4))
    made = net(torch.randn(5, 2, 4))
    graph = walk((made @ made.T).sum(), named(net))
    layers = {graph.operations[i].name: graph.layer_of(i) for i in range(len(graph.operations)) if graph.is_layer(i)}
    assert layers == {"Addmm": ("2.bias", "2.weight"), "Convolution": ("0.weight", "0.bias")}


def test_the_path_from_the_loss_is_the_shortest():
    """From the loss down to an operation, both included."""
    x = torch.randn(3, requires_grad=True)
    graph = walk(x.exp().log().sum())
    at = next(i for i, op in enumerate(graph.operations) if op.name == "Exp")
    assert graph.path(at) == ("Sum", "Log", "Exp")


def test_an_empty_graph_answers_every_question():
    """No operation, no leaf, nothing compiled."""
    graph = Graph()
    assert (graph.leaves, graph.compiled, graph.consumers) == ((), False, ())


@pytest.mark.slow
def test_a_compiled_graph_says_so():
    """One operation stands for all that was compiled."""
    net = torch.compile(model(), backend="aot_eager")
    graph = walk(net(torch.randn(5, 4)).sum())
    assert graph.compiled
