"""Ways through the graph of a loss."""

from hypothesis import given
from hypothesis import strategies as st

from gradlens.facts import Graph, Operation


@st.composite
def graphs(draw):
    """Operations that take what later ones made, some of them layers with a weight, some inputs from outside (-1)."""
    count = draw(st.integers(1, 8))
    operations = []
    for at in range(count):
        inputs = draw(st.lists(st.sampled_from([-1, *range(at + 1, count)]), max_size=3))
        operations.append(Operation(draw(st.sampled_from(["Addmm", "Relu", "View"])), tuple(inputs), (2, 2)))
    leaf = Operation("AccumulateGrad", (), (2, 2), leaf="w")
    with_weight = [
        Operation(op.name, (*op.inputs, count), op.shape) if op.name == "Addmm" and draw(st.booleans()) else op
        for op in operations
    ]
    return Graph((*with_weight, leaf))


@given(graphs())
def test_below_and_above_are_each_others_inverse(graph):
    """One operation is below another if and only if that one is above it; each is both of itself."""
    everything = range(len(graph.operations))
    for one in everything:
        assert one in graph.below(one)
        for other in everything:
            assert (other in graph.below(one)) == (one in graph.above(other))


@given(graphs())
def test_the_last_layers_below_hide_those_before_them(graph):
    """They are layers below; a layer is its own last; through an operation that is none they are those of its inputs."""
    for at, operation in enumerate(graph.operations):
        found = graph.layers_below(at)
        assert found <= {i for i in graph.below(at) if graph.is_layer(i)}
        if graph.is_layer(at):
            assert found == {at}
        else:
            assert found == set().union(*(graph.layers_below(i) for i in operation.inputs if i >= 0))


def test_neighbours_are_found_past_what_only_lays_out():
    """In both directions, and each once."""
    graph = Graph(
        (
            Operation("MseLoss", (1, 1), ()),
            Operation("View", (2,), (2, 2)),
            Operation("Transpose", (3,), (2, 2)),
            Operation("Relu", (-1,), (2, 2)),
        )
    )
    assert list(graph.sources(0)) == [3]
    assert list(graph.users(3)) == [0]
