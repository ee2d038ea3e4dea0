"""What the graph of one loss says, before its backward: softmax taken twice, shapes broadcast, a loss that is cut off.

    print(gradlens.audit(loss, model, optimizer))

The graph is read and nothing is computed but extremes of tensors that it keeps, which waits for the device. The audit sees
one batch: what it does not find may still be wrong. What a compiled graph hides it says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradlens import markup
from gradlens.analysis import patterns
from gradlens.capture.graph import parameter_names, walk
from gradlens.capture.unregistered import within
from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.facts import Graph, Leaf
from gradlens.frames import to_frame
from gradlens.records import Finding, Severity

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Audit(markup.Shown):
    """What was found in the graph of one loss."""

    findings: tuple[Finding, ...]  #: the worst first
    graph: Graph
    parameters: int  #: how many the model has that need a gradient

    @property
    def ok(self) -> bool:
        """Whether there is no warning and no error."""
        return all(finding.severity == Severity.INFO for finding in self.findings)

    @property
    def frame(self) -> pd.DataFrame:
        """One row a finding."""
        return to_frame(list(self.findings))

    def __str__(self) -> str:
        graph = self.graph
        more = ", and more that were not looked at" if graph.truncated else ""
        lines = [f"the loss's graph: {len(graph.operations)} operations{more}; {self._reach()}"]
        lines.append(f"  from the loss: {' <- '.join(op.name for op in graph.operations[:1])}{_near(graph)}")
        if graph.compiled:
            lines.append("  a part of it is compiled: the operations inside are hidden, and only what is around was checked")
        if not graph.values and graph.operations:
            lines.append("  its backward has run: numbers inside the graph are gone; audit before loss.backward()")
        lines += [str(finding) for finding in self.findings] or ["nothing looks wrong in this graph"]
        return "\n".join(lines)

    def _reach(self) -> str:
        if not self.parameters:
            return "no model was given, so that which parameters it reaches was not checked"
        return f"it reaches {len(self.graph.leaves)} of the model's {self.parameters} parameters"


def _near(graph: Graph) -> str:
    path: list[str] = []
    at = 0
    while len(path) < 6:
        at = next((j for j in graph.operations[at].inputs if j >= 0), -1) if graph.operations else -1
        if at < 0:
            break
        path.append(graph.operations[at].name)
    return "".join(f" <- {name}" for name in path)


def audit(
    loss: Tensor,
    model: nn.Module | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
) -> Audit:
    """Read the graph of a loss for mistakes that show there.

    Args:
        loss: What `backward()` would be called on, before it is.
        model: Whose parameters the loss should reach.
        optimizer: One or several, which should have what the loss reaches.

    Raises:
        gradlens.errors.ArgumentTypeError: The loss is no tensor, the model no module.
        gradlens.errors.ArgumentError: The loss has more than one entry.
    """
    optimizers = _check(loss, model, optimizer)
    names = parameter_names(model)
    leaves: dict[int, Tensor] = {}
    graph = walk(loss, names, values=True, leaf=leaves.__setitem__)
    owned = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    needed = [] if model is None else [name for name, p in model.named_parameters() if p.requires_grad]
    strange = [
        Leaf(tuple(tensor.shape), within(graph, at))
        for at, tensor in leaves.items()
        if model is not None and isinstance(tensor, nn.Parameter) and id(tensor) not in names and id(tensor) not in owned
    ]
    reached = set(graph.leaves)
    ids = {name: key for key, name in names.items()}
    graph = replace(
        graph,
        loss=float(loss.detach()) if not loss.is_meta else None,
        strange=tuple(strange),
        unreached=tuple(name for name in needed if name not in reached),
        outside=tuple(name for name in graph.leaves if owned and ids[name] not in owned),
    )
    found = patterns.audit(graph, len(needed))
    return Audit((*found, *_parts(graph, len(needed)), *_mode(model)), graph, len(needed))


def _check(loss: Any, model: Any, optimizer: Any) -> list[Optimizer]:
    if not isinstance(loss, Tensor):
        raise ArgumentTypeError(
            f"audit() reads the graph of a tensor, the loss before its backward, not of {type(loss).__name__}; "
            "loss.item() has no graph any more"
        )
    if loss.numel() != 1:
        raise ArgumentError(f"audit() takes one number, not a tensor of shape {tuple(loss.shape)}; give loss.mean()")
    if model is not None and not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model is a torch.nn.Module, not {type(model).__name__}")
    optimizers = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise ArgumentTypeError(f"optimizer is a torch.optim.Optimizer, or a list of them, not {type(each).__name__}")
    return optimizers


def _parts(graph: Graph, parameters: int) -> list[Finding]:
    """Parameters that the loss does not reach, or that the optimizer does not have."""
    found = []
    if graph.unreached and len(graph.unreached) < parameters and not graph.compiled:
        found.append(
            _finding(
                "unreached",
                Severity.WARNING,
                f"the loss does not depend on {len(graph.unreached)} of the {parameters} parameters: "
                f"{_few(graph.unreached)}",
                ("a module whose output is not used, or is cut by detach(), .data, .item() or torch.no_grad()",),
                "use its output in the loss, or freeze it with requires_grad_(False)",
                graph.unreached,
            )
        )
    if graph.outside:
        found.append(
            _finding(
                "outside",
                Severity.WARNING,
                f"the loss depends on {len(graph.outside)} parameters that the optimizer does not have: "
                f"{_few(graph.outside)}",
                ("layers that were added, replaced or unfrozen after the optimizer was made",),
                "make the optimizer from model.parameters() after the model is complete; or freeze what is not to learn",
                graph.outside,
            )
        )
    return found


def _mode(model: nn.Module | None) -> list[Finding]:
    """Modules that behave otherwise in training, and are in evaluation mode."""
    if model is None or model.training:
        return []
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p)
    ]
    if not names:
        return []
    return [
        _finding(
            "eval-mode",
            Severity.WARNING,
            f"the model is in evaluation mode, and {len(names)} of its modules behave otherwise in training: {_few(names)}",
            ("model.eval() was called for validation, and model.train() not again",),
            "model.train() before the training loop, and after each validation",
            tuple(names),
        )
    ]


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")


def _finding(
    rule: str, severity: Severity, seen: str, causes: tuple[str, ...], remedy: str, names: tuple[str, ...]
) -> Finding:
    return Finding(
        rule=rule,
        step=0,
        severity=severity,
        seen=seen,
        causes=causes,
        remedy=remedy,
        parameter=names[0] if len(names) == 1 else None,
        parameters=names if len(names) > 1 else (),
    )
