"""Mistakes that show in the graph of a loss, as data: a chain of operations, and the words for it.

A `Pattern` is a chain from the loss's side down, such as `LogSoftmax <- Softmax`. Operations that only lay out a tensor may
stand between its links. `when` asks for more than names. `PATTERNS` is all of them; `audit` gives what a graph has.

What needs numbers of tensors (a square root of 0) is found where the graph was read before its backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gradlens.facts import LAYOUT, PASSING, Graph, Leaf, Operation
from gradlens.records import Finding, Severity

Chain = tuple[int, ...]  #: positions in a graph, the first nearest to the loss

ELEMENTWISE = frozenset({"MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"})
REDUCTIONS = frozenset({"Mean", "Sum", "Nansum", "Norm", "LinalgVectorNorm", "Neg"})
NLL = frozenset({"NllLoss", "NllLoss2D", "NllLossNd"})
CLAMPS = frozenset({"Relu", "Clamp", "ClampMin", "ClampMax", "Hardtanh", "Threshold", "Hardsigmoid"})
NORMS = frozenset({"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"})
SUMMED = 2  #: the number of `reduction="sum"`; 1 is the mean, 0 none
#: A clamp of logits that lets through less than this is more than a guard against overflow.
WIDE = 5.0


def _always(_graph: Graph, _chain: Chain) -> bool:
    return True


@dataclass(frozen=True)
class Pattern:
    """A chain of operations, the one nearest to the loss first, and what to say of it."""

    rule: str
    chain: tuple[frozenset[str], ...]
    seen: str  #: `{0}`, `{1}`: the operations; `{shape}`: of the last; `{dim}`: of the first; `{layer}`: what it came from
    causes: tuple[str, ...]
    remedy: str
    severity: Severity = Severity.WARNING
    when: Callable[[Graph, Chain], bool] = _always
    through: frozenset[str] = LAYOUT  #: what may stand between the links

    def matches(self, graph: Graph) -> Iterator[Chain]:
        """Where the graph has the chain."""
        for at, op in enumerate(graph.operations):
            if op.name in self.chain[0]:
                for chain in _extended(graph, (at,), self.chain[1:], self.through):
                    if self.when(graph, chain):
                        yield chain

    def finding(self, graph: Graph, chain: Chain) -> Finding:
        """In words."""
        ops = [graph.operations[at] for at in chain]
        words = {
            "shape": list(ops[-1].shape or ()),
            "dim": ops[0].saved.get("dim", "?"),
            "layer": _layer(graph, chain[-1]),
            "edge": ops[0].saved.get("edge", 0),
            "of": ops[0].saved.get("of", 0),
            "row": ops[0].saved.get("row", -1),
            "loss": f"{graph.loss:.3g}" if graph.loss is not None else "?",
            "most": f"{_at_most(graph, chain):.3g}",
        }
        return Finding(
            rule=self.rule,
            step=graph.step,
            severity=self.severity,
            seen=self.seen.format(*[op.name for op in ops], **words),
            causes=self.causes,
            remedy=self.remedy,
        )


def _extended(graph: Graph, chain: Chain, rest: tuple[frozenset[str], ...], through: frozenset[str]) -> Iterator[Chain]:
    if not rest:
        yield chain
        return
    for at in graph.sources(chain[-1], through):
        if graph.operations[at].name in rest[0]:
            yield from _extended(graph, (*chain, at), rest[1:], through)


def _layer(graph: Graph, at: int) -> str:
    """The layer that an operation came from, in words."""
    for i in (at, *graph.sources(at, PASSING)):
        if graph.layer_of(i):
            return f", right behind {_owner(graph, i)!r}"
    return ""


# --- conditions -----------------------------------------------------------------------------------------------------


def _size(op: Operation) -> int:
    """The size of the dimension that an operation works over; 0 where that is not known."""
    dim = op.saved.get("dim")
    if op.shape is None or not isinstance(dim, int) or not op.shape:
        return 0
    dim = dim - 2**64 if dim >= 2**63 else dim  # a negative number that torch shows unsigned
    return op.shape[dim] if -len(op.shape) <= dim < len(op.shape) else 0


def _narrow(graph: Graph, chain: Chain) -> bool:
    """Whether the clamp cuts logits that a model may well want to give."""
    saved = graph.operations[chain[-1]].saved
    low, high = (
        saved.get("min", saved.get("min_val")),
        saved.get("max", saved.get("max_val")),
    )
    if low is None and high is None:
        return True
    return (isinstance(low, int | float) and low > -WIDE) or (isinstance(high, int | float) and high < WIDE)


def _over_batch(graph: Graph, chain: Chain) -> bool:
    """Whether a (log-)softmax runs over the first axis of several."""
    op = graph.operations[chain[-1]]
    return op.saved.get("dim") == 0 and op.shape is not None and len(op.shape) > 1


def _over_batch_of_layer(graph: Graph, chain: Chain) -> bool:
    return _over_batch(graph, chain) and any(graph.is_layer(at) for at in graph.sources(chain[-1]))


def _wrong_axis(graph: Graph, chain: Chain) -> bool:
    """Whether the classes of nll_loss are another axis than that which log_softmax made add up to 1."""
    direct = [at for at in graph.operations[chain[0]].inputs if at >= 0]
    op = graph.operations[chain[-1]]
    shape = graph.operations[direct[0]].shape if direct else None
    if shape is None or op.shape is None or len(shape) < 2 or len(op.shape) < 2 or op.saved.get("dim") == 0:
        return False
    return _size(op) not in (0, shape[1])


def _single(graph: Graph, chain: Chain) -> bool:
    """Whether it runs over one entry, near the loss."""
    op = graph.operations[chain[-1]]
    if _size(op) != 1:
        return False
    return op.name == "LogSoftmax" or any(graph.is_layer(at) for at in graph.sources(chain[-1]))


def _is_loss(graph: Graph, chain: Chain) -> bool:
    """Whether what the first operation made is reduced to a loss, and nothing else is done with it."""
    users = [graph.operations[at].name for at in graph.users(chain[0])]
    return all(name in REDUCTIONS or name == "Neg" for name in users)


def _no_log(graph: Graph, chain: Chain) -> bool:
    return graph.operations[chain[-1]].name in ("Softmax", "Sigmoid", "Relu") or graph.is_layer(chain[-1])


def _grows(graph: Graph, chain: Chain) -> bool:
    """Whether a prediction of n entries and a target of n became n x n differences."""
    first, last = graph.operations[chain[0]], graph.operations[chain[-1]]
    expand = last.name == "Expand"
    below = last.saved.get("self_sym_sizes") if expand else last.shape
    above = last.shape if expand else first.shape
    return (
        _square(above, below) and (expand or not _made_room(graph, chain[-1])) and sum(at >= 0 for at in first.inputs) == 1
    )


def _square(above: object, below: object) -> bool:
    if not isinstance(above, tuple) or not isinstance(below, tuple) or not below or not above:
        return False
    n = max(below)
    return n > 1 and _product(below) == n and _product(above) == n * n and above[-1] == n and above[-2:] == (n, n)


def _spreads(graph: Graph, chain: Chain) -> bool:
    """Whether a loss function repeated the prediction to fit the target, without making n x n of n."""
    last = graph.operations[chain[-1]]
    below = last.saved.get("self_sym_sizes")
    return (
        isinstance(below, tuple)
        and last.shape is not None
        and last.numel > _product(below)
        and not _square(last.shape, below)
    )


def _made_room(graph: Graph, at: int) -> bool:
    """Whether the user made room for it: an unsqueeze or a view right before."""
    return graph.operations[at].name in ("Unsqueeze", "View", "Reshape", "Expand")


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _at_edge(graph: Graph, chain: Chain) -> bool:
    op = graph.operations[chain[0]]
    if op.name == "Pow":
        exponent = op.saved.get("exponent")
        if not isinstance(exponent, int | float) or exponent >= 1 or exponent == 0:
            return False
    return bool(op.saved.get("edge"))


def _masked(graph: Graph, chain: Chain) -> bool:
    return bool(graph.operations[chain[0]].saved.get("edge"))


def _one_example(graph: Graph, chain: Chain) -> bool:
    """Batch normalisation in training mode over one example; instance normalisation is made of it, and repeats its scale."""
    op = graph.operations[chain[0]]
    own = [at for at in op.inputs[1:] if at >= 0 and graph.operations[at].leaf is not None]
    return op.saved.get("training") is True and bool(own) and op.shape is not None and op.shape[0] == 1


def _summed(graph: Graph, chain: Chain) -> bool:
    return graph.operations[chain[0]].saved.get("reduction") == SUMMED and not _divided(graph, chain[0])


def _unreduced(graph: Graph, chain: Chain) -> bool:
    return graph.operations[chain[-1]].saved.get("reduction") == 0 and not _divided(graph, chain[0])


def _divided(graph: Graph, at: int) -> bool:
    """Whether what this operation gives is divided, multiplied or averaged before it is the loss: a sum of tokens, say."""
    users = [user for user, op in enumerate(graph.operations) if at in op.inputs and user != at]
    return any(graph.operations[user].name in ("Div", "Mul", "Mean") or _divided(graph, user) for user in users)


def _leaf_target(graph: Graph, chain: Chain) -> bool:
    """Whether the second argument of a loss is a leaf of its own, that is in no model."""
    inputs = graph.operations[chain[0]].inputs
    return len(inputs) > 1 and inputs[1] == chain[-1] and graph.operations[chain[-1]].leaf == ""


def _bootstrapped(graph: Graph, chain: Chain) -> bool:
    """Whether the target of a loss is r + c * max(...) of a model, and lets the gradient through.

    Both sides must need a gradient, and the target's side have a maximum, or a choice of one, that is scaled and shifted.
    """
    inputs = graph.operations[chain[0]].inputs
    if len(inputs) < 2 or inputs[0] < 0 or inputs[1] < 0:
        return False
    sides = []
    for side in inputs[:2]:
        seen: list[str] = []
        at = side
        while at >= 0 and len(seen) < 8:
            op = graph.operations[at]
            seen.append(op.name)
            if graph.is_layer(at):
                break
            at = next((j for j in op.inputs if j >= 0), -1)
        sides.append(seen)
    return any("Add" in seen and "Mul" in seen and {"Max", "Amax", "Gather", "Select"} & set(seen) for seen in sides)


#: How far two values can be apart that both lie in the range of an operation.
_SPAN = {"Sigmoid": 1.0, "Hardsigmoid": 1.0, "Softmax": 1.0, "Tanh": 2.0}


def _at_most(graph: Graph, chain: Chain) -> float:
    """What a loss of such outputs can be, for targets in their range; infinite for other operations."""
    first, last = graph.operations[chain[0]], graph.operations[chain[-1]]
    entries = last.numel if first.saved.get("reduction") == SUMMED else 1
    return _SPAN.get(last.name, math.inf) ** 2 * entries


def _out_of_range(graph: Graph, chain: Chain) -> bool:
    """Whether the loss is larger than any target in the output's range could make it."""
    first, differ = graph.operations[chain[0]], graph.operations[chain[-2]]
    above = {graph.operations[at].name for at in graph.above(chain[0]) - {chain[0]}}
    if graph.loss is None or above - {"Mean"} or sum(at >= 0 for at in differ.inputs) != 1:
        return False
    if first.name == "Pow" and first.saved.get("exponent") != 2:
        return False
    return math.isfinite(graph.loss) and graph.loss > _at_most(graph, chain)


def _divisor(graph: Graph, chain: Chain) -> bool:
    """Whether the second operation is what a logarithm is taken of, or what is divided by."""
    op = graph.operations[chain[0]]
    return op.name != "Div" or (len(op.inputs) > 1 and op.inputs[1] == chain[-1])


# --- the table ------------------------------------------------------------------------------------------------------


def _any(*names: str) -> frozenset[str]:
    return frozenset(names)


PATTERNS: tuple[Pattern, ...] = (
    Pattern(
        "softmax-twice",
        (_any("LogSoftmax", "Logsumexp"), _any("Softmax")),
        "the loss takes log_softmax of a softmax ({0} <- {1}, of shape {shape}{layer}): logits between 0 and 1 cannot say "
        "that a class is certain, and the gradient is small",
        ("a softmax before cross_entropy, which has its own: nn.Softmax at the end of the model",),
        "remove the softmax from the model: F.cross_entropy takes logits",
    ),
    Pattern(
        "softmax-twice",
        (_any("BinaryCrossEntropyWithLogits"), _any("Softmax", "LogSoftmax")),
        "the loss is binary_cross_entropy_with_logits of a {1}, which are no logits ({0} <- {1}, of shape {shape}{layer})",
        ("a softmax before a loss that has its own sigmoid",),
        "give the loss the layer's output as it is; for classes that exclude each other F.cross_entropy",
    ),
    Pattern(
        "sigmoid-twice",
        (_any("BinaryCrossEntropyWithLogits"), _any("Sigmoid", "LogSigmoid")),
        "the loss is binary_cross_entropy_with_logits of a sigmoid ({0} <- {1}, of shape {shape}{layer}): its sigmoid is "
        "taken "
        "twice, and no probability below 0.5 can be said",
        ("a sigmoid before a loss that has its own: nn.Sigmoid at the end of the model",),
        "remove the sigmoid from the model, or use F.binary_cross_entropy, which takes probabilities",
    ),
    Pattern(
        "sigmoid-twice",
        (_any("LogSigmoid", "Softplus"), _any("Sigmoid")),
        "the loss is log(sigmoid) of a sigmoid ({0} <- {1}, of shape {shape}{layer}): it is taken twice",
        ("a sigmoid at the end of the model, before a loss on logits",),
        "remove the sigmoid from the model",
        when=_is_loss,
        through=LAYOUT | {"Neg"},
    ),
    Pattern(
        "sigmoid-twice",
        (_any("LogSoftmax", "Logsumexp"), _any("Sigmoid", "Tanh")),
        "the loss takes log_softmax of a {1} (of shape {shape}{layer}): logits so narrow cannot say that a class is certain",
        ("a sigmoid or tanh before cross_entropy, which has its own softmax",),
        "give F.cross_entropy the layer's output as it is",
    ),
    Pattern(
        "no-log",
        (NLL, _any("Softmax", "Sigmoid", "Relu", "Addmm", "Mm", "Convolution")),
        "nll_loss gets the output of {1} (of shape {shape}{layer}), and takes log-probabilities: the loss has no lower "
        "bound, "
        "or hardly any gradient",
        ("a softmax without a log before nll_loss, or logits: nll_loss is cross_entropy without its log_softmax",),
        "F.cross_entropy(logits, target), or F.nll_loss(F.log_softmax(logits, dim=1), target)",
        when=_no_log,
    ),
    Pattern(
        "clamped-logits",
        (_any("BinaryCrossEntropyWithLogits", "LogSoftmax", "LogSigmoid"), CLAMPS),
        "{1} is the last operation before the loss on logits ({0} <- {1}, of shape {shape}{layer}): what it cuts off gets "
        "no "
        "gradient, and a logit below its limit cannot be said",
        ("a ReLU or another clamp on the model's output, before a loss that takes logits",),
        "remove the activation behind the last layer",
        when=_narrow,
    ),
    Pattern(
        "softmax-over-batch",
        (NLL, _any("LogSoftmax")),
        "log_softmax runs over axis 0 of {shape}, the batch{layer}: the examples' probabilities add up to 1, not the "
        "classes'",
        ("log_softmax(dim=0), or a softmax without dim on a tensor of another shape than meant",),
        "log_softmax(dim=1), or F.cross_entropy, which knows where the classes are",
        when=_over_batch,
    ),
    Pattern(
        "softmax-over-batch",
        (_any("Log", "BinaryCrossEntropy", "MseLoss", "L1Loss", "SmoothL1Loss", *NLL), _any("Softmax")),
        "softmax runs over axis 0 of {shape}, the batch{layer}: the examples' probabilities add up to 1, not the classes'",
        ("softmax(dim=0), or a softmax without dim",),
        "softmax(dim=1); better F.cross_entropy on the logits",
        when=_over_batch_of_layer,
    ),
    Pattern(
        "softmax-wrong-axis",
        (NLL, _any("LogSoftmax")),
        "log_softmax runs over axis {dim} of {shape}{layer}, and nll_loss takes another axis for the classes",
        ("log_softmax(dim=...) over the time or the place axis, or a view() that mixes axes",),
        "log_softmax over the classes (dim=-1) before flattening, or F.cross_entropy on logits of shape [n, classes]",
        when=_wrong_axis,
    ),
    Pattern(
        "softmax-of-one",
        (_any("LogSoftmax", "Softmax"),),
        "a softmax runs over one entry (shape {shape}{layer}): it is 1 whatever the model says, and passes no gradient",
        ("a softmax or cross_entropy on a model with one output: a binary question",),
        "F.binary_cross_entropy_with_logits with one output, or two outputs for cross_entropy",
        when=_single,
    ),
    Pattern(
        "broadcast",
        (_any("Sub", "Add", "Rsub", "Mul", "Div", *ELEMENTWISE), _any("Expand")),
        "prediction and target do not have the same shape: they are broadcast against each other to {shape} before "
        "{0}{layer}, "
        "so that every prediction is compared with every target",
        ("a prediction of shape [n, 1] and a target of shape [n], or the other way round",),
        "give both the same shape: target[:, None], or prediction.squeeze(1)",
        when=_grows,
    ),
    Pattern(
        "broadcast",
        (_any("Sub", "Rsub"), frozenset({"Addmm", "Mm", "Squeeze", "Select", "Slice", "Sigmoid", "Tanh", "Relu", "Add"})),
        "prediction (of shape {shape}{layer}) and target do not have the same shape: their difference is broadcast, so that "
        "every prediction is compared with every target",
        ("a prediction of shape [n, 1] and a target of shape [n], or the other way round",),
        "give both the same shape: target[:, None], or prediction.squeeze(1)",
        when=_grows,
    ),
    Pattern(
        "broadcast",
        (ELEMENTWISE, _any("Expand")),
        "the prediction is broadcast to the target's shape {shape} before {0}{layer}: they do not have the same shape",
        ("a target with more axes or entries than the prediction has",),
        "give both the same shape, or expand the prediction yourself where it is meant",
        when=_spreads,
        severity=Severity.INFO,
    ),
    Pattern(
        "edge",
        (
            _any(
                "Sqrt", "Log", "Log2", "Log10", "Log1P", "Acos", "Asin", "Atanh", "Reciprocal", "Rsqrt", "Div", "Pow", "Exp"
            ),
        ),
        "{0} stands where its derivative does not exist: {edge} of its {of} entries, the first in row {row} of the batch "
        "(sqrt, norm or log at 0, 0/0, arccos at 1){layer}",
        ("a square root, a logarithm or a division whose input reached 0, or an arccos whose input reached 1",),
        "add a small number inside, as in (x + 1e-8).sqrt(), or clamp: x.clamp(-1 + 1e-6, 1 - 1e-6)",
        severity=Severity.ERROR,
        when=_at_edge,
    ),
    Pattern(
        "masked-row",
        (_any("Softmax", "LogSoftmax"),),
        "a softmax of shape {shape} has NaN in row {row} of the batch ({edge} of {of} entries): every entry of a row was "
        "masked "
        "with -inf, or its input is not finite",
        ("a softmax row that is all masked: an empty sequence, or padding that nothing may attend to",),
        "mask with a large negative number, leave such rows out, or let each position attend to itself",
        severity=Severity.ERROR,
        when=_masked,
    ),
    Pattern(
        "batchnorm-of-one",
        (NORMS,),
        "batch normalisation in training mode runs over one example (shape {shape}): it takes that example's own statistics "
        "for the batch's",
        ("a batch of one example", "a last batch that is smaller: DataLoader(drop_last=True)"),
        "larger batches; or GroupNorm, InstanceNorm or LayerNorm, which do not depend on the batch",
        when=_one_example,
    ),
    Pattern(
        "target-with-gradient",
        (_any("MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"), _any("Leaf")),
        "the target of {0} is a tensor that requires a gradient (shape {shape}), and is in no model",
        ("a target made with requires_grad=True",),
        "target.detach(), or make it without requires_grad",
        when=_leaf_target,
    ),
    Pattern(
        "target-with-gradient",
        (_any("MseLoss", "SmoothL1Loss", "HuberLoss"),),
        "both sides of {0} need a gradient, and one of them is a maximum or a choice of the model's own outputs, scaled and "
        "shifted: a bootstrapped target that is not detached",
        ("a target r + gamma * max Q(s') that the gradient passes through",),
        "compute the target under torch.no_grad(), or detach() it",
        when=_bootstrapped,
    ),
    *(
        Pattern(
            "out-of-range",
            (*chain, _any(*_SPAN)),
            f"the loss compares an output that has ends with targets beyond them ({{0}} <- {{{len(chain)}}}{{layer}}): for "
            "targets within it is {most} at most, and it is {loss}",
            ("targets that were not scaled to the range of the output: pixels of 0 to 255 for a sigmoid of 0 to 1",),
            "scale the targets to the output's range, or leave the last layer without a sigmoid or tanh",
            when=_out_of_range,
        )
        for chain in ((_any("MseLoss", "SmoothL1Loss", "HuberLoss"),), (_any("Pow", "Abs"), _any("Sub")))
    ),
    Pattern(
        "edge",
        (_any("Log", "Log2", "Log10", "Div"), _any("Relu")),
        "{0} of a ReLU of shape {shape}{layer}, which is 0 for many inputs: the result or its derivative is infinite",
        ("a ReLU before a logarithm or below a division, where something above 0 is needed",),
        "softplus(x) + 1e-6 or exp(x) instead of the ReLU",
        severity=Severity.INFO,
        when=_divisor,
    ),
    Pattern(
        "summed-loss",
        (_any("MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", *NLL),),
        '{0} adds up over the batch (reduction="sum"): the gradient grows with the batch',
        ('reduction="sum" with a learning rate for means',),
        "divide by the number of examples, or by the learning rate it needs",
        severity=Severity.INFO,
        when=_summed,
    ),
    Pattern(
        "summed-loss",
        (
            _any("Sum"),
            _any("MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", *NLL),
        ),
        '{1} is not reduced (reduction="none") and then summed: the gradient grows with the batch and the outputs',
        ("loss.sum() where loss.mean() is meant",),
        "divide by the number of examples",
        severity=Severity.INFO,
        when=_unreduced,
    ),
)

#: Operations whose derivative is infinite or does not exist somewhere, in the words of a user.
SINGULAR = {
    "Sqrt": "sqrt at 0",
    "Rsqrt": "rsqrt at 0",
    "Log": "log of 0",
    "Log2": "log of 0",
    "Log10": "log of 0",
    "Log1P": "log1p at -1",
    "Acos": "arccos at 1",
    "Asin": "arcsin at 1",
    "Atanh": "arctanh at 1",
    "Reciprocal": "1/x at 0",
    "Div": "a division by 0",
    "Pow": "a power below 1 at 0",
    "Norm": "a norm at 0",
    "LinalgVectorNorm": "a norm at 0",
    "Std": "std of a constant",
    "Exp": "exp that overflows",
    "Softmax": "a softmax row that is all masked",
}


def singular(graph: Graph) -> tuple[str, ...]:
    """Which operations of a graph can have a derivative that is not finite, those nearest to the loss first."""
    words = []
    for op in graph.operations:
        exponent = op.saved.get("exponent")
        if op.name == "Pow" and not (isinstance(exponent, int | float) and exponent < 1):
            continue
        if op.name == "Div" and (len(op.inputs) < 2 or op.inputs[1] < 0):
            continue  # by a number, or by what needs no gradient
        if op.name in SINGULAR and SINGULAR[op.name] not in words and op.name not in ("Exp", "Softmax"):
            words.append(SINGULAR[op.name])
    return tuple(words)


def masking(graph: Graph) -> tuple[str, ...]:
    """Operations whose result is NaN where all of a row is masked, in the words of a user."""
    fused = any(op.name.startswith("ScaledDotProduct") for op in graph.operations)
    return (SINGULAR["Softmax"],) if fused or any(op.name == "Softmax" for op in graph.operations) else ()


def born(graph: Graph) -> tuple[str, str] | None:
    """Between which two layers NaN or infinity came up in the forward pass, `(finite input, input that is not)`.

    Of a graph that was read while a loss was not finite. The first is "" where the model's first layer got it already; None
    where no layer is known to have got it.
    """
    looked = [at for at, op in enumerate(graph.operations) if "nonfinite" in op.saved and graph.layer_of(at)]
    spoilt = [at for at in looked if graph.operations[at].saved["nonfinite"]]
    if not spoilt:
        return None
    first = spoilt[-1]  # the farthest from the loss
    clean = [at for at in looked if at in graph.below(first) and at != first]
    return (_owner(graph, min(clean)) if clean else "", _owner(graph, first))


def _owner(graph: Graph, at: int) -> str:
    name = graph.layer_of(at)[0]
    return name.rpartition(".")[0] or name


def matched(graph: Graph) -> list[Finding]:
    """What the patterns find, each rule once."""
    found: dict[str, Finding] = {}
    for pattern in PATTERNS:
        if pattern.rule in found:
            continue
        for chain in pattern.matches(graph):
            found[pattern.rule] = pattern.finding(graph, chain)
            break
    return list(found.values())


def reach(graph: Graph, parameters: int) -> list[Finding]:
    """What the graph says of parameters: those it does not reach, and those that nobody has."""
    found = []
    if parameters and not graph.leaves and not graph.compiled:
        found.append(cut(graph.step, empty=not graph.operations))
    within = [leaf for leaf in graph.strange if leaf.within and leaf.still]
    beyond = [leaf for leaf in graph.strange if not leaf.within and leaf.still]
    if within:
        found.append(_unregistered(graph, within, Severity.WARNING))
    elif beyond:
        found.append(_unregistered(graph, beyond, Severity.INFO))
    return found


def cut(step: int, *, empty: bool = True, steps: int = 0) -> Finding:
    """The finding on a loss that depends on no parameter of the model."""
    how = (
        f"at each of the last {steps} observed steps" if steps else "its graph is empty" if empty else "its graph has others"
    )
    return Finding(
        rule="cut",
        step=step,
        severity=Severity.ERROR,
        seen=f"the loss is cut from the model: it depends on none of its parameters, {how}",
        causes=(
            "the loss was detached or re-created: loss.detach(), loss.item(), torch.tensor(loss), .data, numpy",
            "the model's output was detached before the loss, as a GAN's fake.detach() in the generator's own step",
            "the forward pass ran under torch.no_grad() or inference_mode()",
            "another model than the watched one was trained",
        ),
        remedy="compute the loss from the model's output with torch operations alone, and call backward() on that very "
        "tensor",
    )


def _unregistered(graph: Graph, leaves: list[Leaf], severity: Severity) -> Finding:
    shapes = ", ".join(str(list(leaf.shape)) for leaf in leaves[:4]) + (", ..." if len(leaves) > 4 else "")
    causes: tuple[str, ...] = (
        "layers kept in a Python list or dict, which are not registered: nn.ModuleList and nn.ModuleDict register them",
        "a module made inside forward(), or a part that was not given to watch()",
    )
    if severity == Severity.INFO:
        causes = ("a network that only measures (a loss network, a critic) and is not frozen", *causes)
    return Finding(
        rule="unregistered",
        step=graph.step,
        severity=severity,
        seen=f"the loss depends on {len(leaves)} parameters (of shapes {shapes}) that are no parameters of the model and "
        f"in no "
        "optimizer, and that do not change: they are not trained",
        causes=causes,
        remedy="self.layers = nn.ModuleList([...]), and make the optimizer afterwards; freeze what is not to learn",
        value=float(len(leaves)),
    )


def audit(graph: Graph, parameters: int = 0) -> list[Finding]:
    """All that a graph says, the worst first."""
    found = [*reach(graph, parameters), *matched(graph)]
    return sorted(found, key=lambda finding: -finding.severity.rank)
