"""Leaves of a loss's graph that nobody has: parameters in neither the model nor an optimizer.

One look cannot tell a layer in a Python list from a part that another optimizer moves (a GAN's other half). Two can: what
somebody trains has another version at the second. No reference to a parameter is kept, only its `id` and version.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from gradlens.facts import Graph, Leaf


def within(graph: Graph, at: int) -> bool:
    """Whether a layer with parameters of the model comes between this leaf and the loss.

    What only measures (a perceptual loss, a critic) stands nearer to the loss than all of the model.
    """
    seen, waiting = {at}, [at]
    while waiting:
        i = waiting.pop()
        for user in graph.consumers[i]:
            if user in seen:
                continue
            seen.add(user)
            waiting.append(user)
            if i != at and _takes_leaf(graph, user, i):
                return True
    return False


def _takes_leaf(graph: Graph, user: int, but: int) -> bool:
    """Whether an operation takes a named leaf beside this input, directly or laid out."""
    for j in graph.operations[user].inputs:
        if j < 0 or j == but:
            continue
        if graph.operations[j].leaf:
            return True
        if any(graph.operations[k].leaf for k in graph.operations[j].inputs if k >= 0) and graph.operations[j].name == "T":
            return True
    return False


class Unregistered:
    """What was seen of leaves that nobody has, from look to look."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, int]] = {}  # by id: the version, and at which step that was

    def look(
        self, graph: Graph, leaves: Mapping[int, Tensor], known: Collection[int], step: int, patience: int = 3
    ) -> tuple[Leaf, ...]:
        """The strange leaves of a graph that did not change for `patience` steps.

        Args:
            graph: The graph.
            leaves: Its leaves by position.
            known: The ids of what the model and the optimizers have.
            step: The step.
            patience: Of how many steps two looks must be apart.
        """
        result, now = [], {}
        for at, tensor in leaves.items():
            if not isinstance(tensor, nn.Parameter) or id(tensor) in known or not tensor.requires_grad:
                continue
            before = self._seen.get(id(tensor))
            version = tensor._version
            now[id(tensor)] = before if before is not None and before[0] == version else (version, step)
            if before is not None and before[0] == version and step - before[1] >= patience:
                result.append(Leaf(tuple(tensor.shape), within(graph, at)))
        self._seen |= now
        return tuple(result)
