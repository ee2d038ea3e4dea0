"""The graph of a loss as plain data: a bounded walk over `grad_fn`, which reads and changes nothing.

    loss.grad_fn -> operations, in the order of their distance from the loss

Names, edges, shapes and saved numbers can be read at any time while the loss lives, in a hook inside its backward too.
Saved tensors can be read until backward has come to their operation: those near the loss only before it starts. With
`values` the walk takes facts of those that are there (the smallest entry, whether some are NaN), which waits for a device.

One walk costs 1 to 2 us an operation. What a compiled graph hides, one operation named `CompiledFunction` stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradlens._torch import local_part
from gradlens.facts import Graph, Operation

#: Operations that a walk looks at, at most.
LIMIT = 20_000
#: Operations whose shapes and saved numbers are read, the nearest to the loss: a shape takes several us. Of farther ones the
#: mode of normalisations is read alone.
NEAR = 80

_ACCUMULATE = "torch::autograd::AccumulateGrad"
#: By the type of a node: the saved attributes that are no tensors.
_NUMBERS: dict[type, tuple[str, ...]] = {}
_PLAIN = (bool, int, float, str, tuple)
_FAR = frozenset({"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "BatchNorm", "Softmax", "LogSoftmax"})


def walk(
    root: Tensor,
    names: Mapping[int, str] | None = None,
    *,
    limit: int = LIMIT,
    near: int = NEAR,
    values: bool = False,
    leaf: Callable[[int, Tensor], None] | None = None,
) -> Graph:
    """The graph that made `root`.

    Args:
        root: The loss. Of a leaf, or of what was computed without a gradient, the graph is empty or one leaf.
        names: Parameters' names by `id`.
        limit: How many operations are looked at, at most.
        near: Of how many, from the loss on, the saved numbers are read.
        values: Whether facts are taken of saved tensors.
        leaf: Called with the position and the tensor of each leaf.
    """
    names = names or {}
    start: Any = root.grad_fn
    if start is None:
        if not root.requires_grad:
            return Graph()
        if leaf is not None:
            leaf(0, root)
        return Graph((Operation("Leaf", (), tuple(root.shape), {}, names.get(id(root), "")),))
    position, nodes, edges = {start: 0}, [start], []
    truncated = False
    for node in nodes:
        inputs = []
        for other, _ in node.next_functions:
            if other is None:
                inputs.append(-1)
                continue
            at = position.get(other)
            if at is None:
                if len(nodes) >= limit:
                    truncated = True
                    inputs.append(-1)
                    continue
                at = position[other] = len(nodes)
                nodes.append(other)
            inputs.append(at)
        edges.append(tuple(inputs))
    operations = tuple(
        _operation(node, inputs, names, i < near, values, i, leaf)
        for i, (node, inputs) in enumerate(zip(nodes, edges, strict=True))
    )
    return Graph(operations, truncated=truncated, values=values)


def plain_name(node: Any) -> str:
    """`LogSoftmax` of `LogSoftmaxBackward0`."""
    name = str(node.name())
    base, found, number = name.rpartition("Backward")
    return base if found and (not number or number.isdigit()) else name


def _operation(
    node: Any,
    inputs: tuple[int, ...],
    names: Mapping[int, str],
    close: bool,
    values: bool,
    at: int,
    leaf: Callable[[int, Tensor], None] | None,
) -> Operation:
    name = node.name()
    if name == _ACCUMULATE:
        variable = node.variable
        if leaf is not None:
            leaf(at, variable)
        return Operation("Leaf", (), tuple(variable.shape), {}, names.get(id(variable), ""))
    name = plain_name(node)
    saved = _saved(node) if close or name in _FAR else {}
    if values:
        saved.update(facts(node, name))
    return Operation(name, inputs, _shape(node) if close else None, saved)


def _shape(node: Any) -> tuple[int, ...] | None:
    try:
        made = node._input_metadata
        return tuple(int(size) for size in made[0].shape) if made else None
    except Exception:  # noqa: BLE001 - a private of torch, and shapes may be symbols
        return None


def _numbers(kind: type) -> tuple[str, ...]:
    """The saved attributes of a type of node that are no tensors: those without a raw form."""
    names = [name for name in dir(kind) if name.startswith("_saved_")]
    return tuple(name for name in names if not hasattr(kind, f"_raw{name}"))


def _saved(node: Any) -> dict[str, Any]:
    """The saved numbers of an operation."""
    kind = type(node)
    names = _NUMBERS.get(kind)
    if names is None:
        names = _NUMBERS[kind] = _numbers(kind)
    result = {}
    for name in names:
        try:
            value = getattr(node, name)
        except Exception:  # noqa: BLE001 - a type that Python has no view of
            continue
        if isinstance(value, _PLAIN):
            result[name[len("_saved_") :]] = value
    return result


def saved_tensor(node: Any, name: str) -> Tensor | None:
    """A tensor that an operation keeps for its backward; None where it is gone, was never kept, or was packed.

    What saved-tensor hooks packed (checkpointing, offloading) may be unpacked once: backward is the one to do that. A
    distributed tensor's numbers would take a collective.
    """
    try:
        if getattr(node, f"_raw_saved_{name}").unpack_hook is not None:
            return None
        value = getattr(node, f"_saved_{name}")
    except Exception:  # noqa: BLE001 - freed by backward, written over in place, or a type without such a name
        return None
    return value if isinstance(value, Tensor) and local_part(value) is value else None  # ranks need not all look


#: By operation: the saved tensor whose smallest, largest and non-finite entries decide.
_LOOKED_AT = {
    "Sqrt": "result",
    "Rsqrt": "result",
    "LinalgVectorNorm": "result",
    "Norm": "result",
    "Std": "result",
    "Cdist": "result",
    "EuclideanDist": "result",
    "Log": "self",
    "Log2": "self",
    "Log10": "self",
    "Log1P": "self",
    "Pow": "self",
    "Acos": "self",
    "Asin": "self",
    "Atanh": "self",
    "Reciprocal": "result",
    "Div": "other",
    "Softmax": "result",
    "LogSoftmax": "result",
    "Exp": "result",
    "Addmm": "mat1",
    "Mm": "self",
    "Convolution": "input",
    "NativeLayerNorm": "input",
    "NativeBatchNorm": "input",
}


def facts(node: Any, name: str) -> dict[str, Any]:
    """Of the tensors that decide whether an operation's derivative exists: extremes, and how many are not finite."""
    looked = _LOOKED_AT.get(name)
    if looked is None:
        return {}
    tensor = saved_tensor(node, looked)
    if tensor is None or not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return {}
    with torch.no_grad():
        flat = tensor.detach().reshape(-1)
        finite = torch.isfinite(flat)
        bad = int((~finite).sum())
        rest = flat[finite]
        low, high = (float(rest.min()), float(rest.max())) if rest.numel() else (math.nan, math.nan)
        result = {"nonfinite": bad, "low": low, "high": high, "of": flat.numel()}
        edge = _edge(name, tensor)
        if edge is not None:
            result["edge"] = int(edge.sum())
            rows = edge.reshape(edge.shape[0], -1).any(1) if edge.dim() else edge.reshape(1)
            result["row"] = int(rows.nonzero()[0]) if bool(rows.any()) else -1
        return result


def _edge(name: str, tensor: Tensor) -> Tensor | None:
    """Where the derivative of the operation does not exist or is infinite."""
    if name in ("Sqrt", "LinalgVectorNorm", "Norm", "Std", "Cdist", "EuclideanDist"):
        return (tensor == 0) | ~torch.isfinite(tensor)
    if name in ("Log", "Log2", "Log10"):
        return (tensor <= 0) | torch.isnan(tensor)
    if name == "Log1P":
        return (tensor <= -1) | torch.isnan(tensor)
    if name in ("Acos", "Asin", "Atanh"):
        return (tensor.abs() >= 1) | torch.isnan(tensor)
    if name in ("Reciprocal", "Rsqrt", "Exp"):
        return ~torch.isfinite(tensor)
    if name == "Div":
        return (tensor == 0) | ~torch.isfinite(tensor)
    if name in ("Softmax", "LogSoftmax"):
        return torch.isnan(tensor)
    if name == "Pow":
        return tensor == 0
    return None


def parameter_names(model: nn.Module | None) -> dict[int, str]:
    """The name of each parameter by `id`."""
    return {} if model is None else {id(p): name for name, p in model.named_parameters()}
