"""What is known of a training beside its gradients: the graph of a loss, the optimizer's settings, the modules' mode.

All of it is frozen, on the host, and free of torch. The live half takes it down (`capture/graph.py`, `capture/settings.py`),
rules and the graph audit read it.

A `Graph` lists operations, the loss's own first. An operation is named as autograd names it, without `Backward0`, and stands
for its forward: `LogSoftmax` of shape `[64, 10]`. What it needs from the forward pass is in `saved`: numbers always
(`dim`, `training`, `exponent`), and facts on tensors (`result_min`) where those were still there when the graph was read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gradlens.activations import Activations


def words(text: str) -> frozenset[str]:
    """The words of a text, as names of operations."""
    return frozenset(text.split())


#: Operations that change how a tensor is laid out and none of its numbers.
LAYOUT = words(
    "View Reshape ReshapeAlias UnsafeView Squeeze Unsqueeze Permute Transpose T Clone ToCopy Alias Contiguous Flatten "
    "Unflatten AsStrided Detach Identity Unbind Movedim Swapaxes MT"
)
#: The same, and those that take part of a tensor or repeat it.
PASSING = LAYOUT | words("Slice Select Narrow Split SplitWithSizes Index IndexSelect Gather Expand Chunk Cat Stack")
#: Operations with weights of their own.
LAYERS = words("Addmm Mm Bmm Baddbmm Addbmm Linear Convolution MkldnnConvolution CudnnConvolution Embedding")


@dataclass(frozen=True)
class Operation:
    """One operation of a graph: what made a tensor that needs a gradient."""

    name: str
    inputs: tuple[int, ...] = ()  #: positions in the graph; -1 for an input that needs no gradient
    shape: tuple[int, ...] | None = None  #: of what it made
    saved: Mapping[str, Any] = field(default_factory=dict)
    leaf: str | None = None  #: of a leaf: the parameter's name, "" if it has none that is known

    @property
    def numel(self) -> int:
        """How many entries it made; -1 where its shape is not known."""
        if self.shape is None:
            return -1
        result = 1
        for size in self.shape:
            result *= size
        return result


@dataclass(frozen=True)
class Leaf:
    """An `nn.Parameter` that the loss depends on and that neither the model nor the optimizer has."""

    shape: tuple[int, ...]
    within: bool  #: a parameter of the model comes between it and the loss
    still: bool = True  #: it did not change between two looks, or there was one look only


#: From an operation to those next to it, on one side.
Neighbours = Callable[[int], Sequence[int]]


@dataclass(frozen=True, eq=False)
class Graph:
    """The graph of one loss, the loss's own operation first."""

    operations: tuple[Operation, ...] = ()
    step: int = 0
    backward: int = 0
    loss: float | None = None
    strange: tuple[Leaf, ...] = ()
    unreached: tuple[str, ...] = ()  #: parameters that need a gradient and that the loss does not depend on
    outside: tuple[str, ...] = ()  #: parameters that it reaches and the optimizers do not have
    left: float = float("nan")  #: of the parameters that it reaches and an optimizer has, the share whose `.grad` was not 0
    values: bool = False  #: read before its backward: facts on tensors are there
    truncated: bool = False  #: there are more operations than were looked at
    forward: str = ""  #: where the user's code computed the loss, where that is known

    @property
    def compiled(self) -> bool:
        """Whether a part of it was compiled: one operation stands for many."""
        return any(op.name.startswith("CompiledFunction") for op in self.operations)

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """By operation, those that take what it made."""
        result: list[list[int]] = [[] for _ in self.operations]
        for i, op in enumerate(self.operations):
            for j in op.inputs:
                if j >= 0:
                    result[j].append(i)
        return tuple(map(tuple, result))

    @cached_property
    def leaves(self) -> tuple[str, ...]:
        """The parameters that it reaches, those with a name."""
        return tuple(op.leaf for op in self.operations if op.leaf)

    def sources(self, at: int, through: frozenset[str] = LAYOUT) -> Iterator[int]:
        """Where the inputs of an operation come from, past those that only lay out."""
        return self._next(at, self._inputs, through)

    def users(self, at: int, through: frozenset[str] = LAYOUT) -> Iterator[int]:
        """Who takes what an operation made, past those that only lay out."""
        return self._next(at, self.consumers.__getitem__, through)

    def below(self, at: int) -> set[int]:
        """Everything that an operation was computed from, itself included."""
        return self._reached(at, self._inputs)

    def above(self, at: int) -> set[int]:
        """Everything that was computed from an operation, itself included."""
        return self._reached(at, self.consumers.__getitem__)

    def layers_below(self, at: int) -> set[int]:
        """The last layers that an operation was computed from, itself included, without those before them."""
        found = self._reached(at, lambda i: () if self.is_layer(i) else self._inputs(i))
        return {i for i in found if self.is_layer(i)}

    def is_layer(self, at: int) -> bool:
        """Whether it is a layer: a product with a leaf."""
        return self.operations[at].name in LAYERS and any(leaf is not None for leaf in self._leaves_at(at))

    def layer_of(self, at: int) -> tuple[str, ...]:
        """The names of the parameters of a layer."""
        return tuple(name for name in self._leaves_at(at) if name)

    def _leaves_at(self, at: int) -> list[str | None]:
        """The leaf that each input of an operation is, or lays out; None for one that is no leaf."""
        direct = self._inputs(at)
        within = [j for i in direct if self.operations[i].name in LAYOUT for j in self._inputs(i)]
        return [self.operations[j].leaf for j in (*direct, *within)]

    def _inputs(self, at: int) -> list[int]:
        return [j for j in self.operations[at].inputs if j >= 0]

    def _next(self, at: int, neighbours: Neighbours, through: frozenset[str]) -> Iterator[int]:
        """The neighbours of an operation, depth first; in the place of one `through` which to look, its own."""
        seen, waiting = {at}, list(neighbours(at))
        while waiting:
            i = waiting.pop(0)
            if i in seen:
                continue
            seen.add(i)
            if self.operations[i].name in through:
                waiting = [*neighbours(i), *waiting]
            else:
                yield i

    def _reached(self, at: int, neighbours: Neighbours) -> set[int]:
        """The operation, its neighbours, and theirs."""
        seen, waiting = set[int](), [at]
        while waiting:
            i = waiting.pop()
            if i not in seen:
                seen.add(i)
                waiting += neighbours(i)
        return seen

    def path(self, at: int) -> tuple[str, ...]:
        """The operations from the loss down to this one, the shortest way."""
        before: dict[int, int] = {0: -1}
        waiting = [0]
        while waiting and at not in before:
            i = waiting.pop(0)
            for j in self.operations[i].inputs:
                if j >= 0 and j not in before:
                    before[j] = i
                    waiting.append(j)
        names: list[str] = []
        while at in before and at >= 0:
            names.append(self.operations[at].name)
            at = before[at]
        return tuple(reversed(names))


@dataclass(frozen=True)
class Group:
    """One group of an optimizer's parameters."""

    lr: float
    weight_decay: float = 0.0
    eps: float | None = None
    momentum: float | None = None
    parameters: tuple[str, ...] = ()  #: those of the model, by name
    strange: tuple[tuple[int, ...], ...] = ()  #: the shapes of those that are not the model's
    dtypes: tuple[str, ...] = ()  #: of its parameters, each once


@dataclass(frozen=True)
class Settings:
    """What an optimizer was set to from a step on."""

    step: int
    optimizer: str  #: the class
    index: int  #: which of the watched ones
    groups: tuple[Group, ...]
    decoupled: bool = False  #: whether its weight decay does not pass through the gradient

    @property
    def adaptive(self) -> bool:
        """Whether it divides each partial by the size of those before, as Adam and RMSprop do: those have an eps."""
        return bool(self.groups) and all(group.eps is not None for group in self.groups)

    @property
    def lr(self) -> float:
        """The largest learning rate."""
        return max((group.lr for group in self.groups), default=0.0)


@dataclass(frozen=True)
class Modes:
    """Which modules are in which mode, from a step on."""

    step: int
    training: bool  #: of the whole model
    evaluated: tuple[str, ...] = ()  #: modules in evaluation mode that behave otherwise in training: dropout, BatchNorm
    dropout: tuple[str, ...] = ()  #: dropout modules with a share above 0
    normalised: tuple[str, ...] = ()  #: batch normalisations
    types: Mapping[str, str] = field(default_factory=dict)  #: by parameter, the type of the module that owns it
    strange: int = 0


@dataclass(frozen=True)
class Features:
    """What a layer got in one batch, read while backward had not come to it: how much it differs from example to example."""

    step: int
    backward: int
    layer: str  #: the parameters of the layer, or the operation
    spread: float  #: the median over features of the standard deviation over the batch, beside their rms
    rms: float
    dead: float  #: the share of features that are 0 for every example
    output_spread: float = float("nan")  #: of what the layer made of it


#: What crosses from the training thread to the rules, beside tables.
Fact = Graph | Settings | Modes | Features | Activations
