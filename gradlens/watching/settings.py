"""What `watch` may be given: each argument as it is meant, or an error that says what was given and what to give."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradlens import findings
from gradlens._torch import local_part
from gradlens.capture.attachment import Attachment
from gradlens.capture.optimizers import may_move
from gradlens.capture.sharding import piece
from gradlens.errors import ArgumentError, ArgumentTypeError, GradlensWarning, choice
from gradlens.records import Finding, Severity, Stage
from gradlens.schedules import Schedule, as_schedule
from gradlens.selection import Select
from gradlens.statistics.memory import parse_bytes
from gradlens.unwrapping import unwrap_optimizer
from gradlens.watching import process_group
from gradlens.writers.base import Writer

BUFFERED = ("updates", "flips", "evidence")  #: features whose buffers are as large as the weights
FEATURES = (*BUFFERED, "activations")
ON_FINDING = ("record", "warn", "raise")


@dataclass(frozen=True, eq=False)
class LensSettings:
    """What a lens was asked for: each argument of `watch` as it is meant, checked once. `of` is the way to make one."""

    optimizers: tuple[torch.optim.Optimizer, ...]  #: unwrapped; the last ends the step
    wrapped: tuple[bool, ...]  #: of each, whether what was around it may move weights itself
    run: Path | None
    writers: tuple[Writer, ...]
    schedule: Schedule
    select: Select
    stages: frozenset[str]
    scaler: Any
    features: frozenset[str]
    memory: int  #: bytes
    rules: tuple[Any, ...]
    on_finding: str | Callable[[Finding], None]
    budget: float | None
    first_step: int
    keep: str | Iterable[str] | None
    local: bool  #: over ranks: a backward's own gradient is this rank's alone

    @classmethod
    def of(
        cls,
        *,
        optimizer: Any,
        run: str | os.PathLike[str] | None,
        writers: Iterable[Writer],
        schedule: int | Schedule,
        select: Select,
        stage: str | Iterable[str] | None,
        scaler: Any,
        features: str | Iterable[str],
        memory: int | str,
        rules: Iterable[Any],
        on_finding: str | Callable[[Finding], None],
        budget: float | None,
        first_step: int,
        keep: str | Iterable[str] | None,
    ) -> LensSettings:
        """The arguments of `watch`; a GradlensError where one cannot be meant."""
        check_on_finding(on_finding)
        check_budget(budget)
        check_first_step(first_step)
        check_scaler(scaler)
        optimizers, wrapped = optimizers_of(optimizer)
        return cls(
            optimizers=tuple(optimizers),
            wrapped=tuple(wrapped),
            run=None if run is None else Path(run),
            writers=tuple(writers_of(writers)),
            schedule=as_schedule(schedule),
            select=select,
            stages=stages_of(stage),
            scaler=scaler,
            features=features_of(features),
            memory=parse_bytes(memory),
            rules=tuple(rules_of(rules)),
            on_finding=on_finding,
            budget=budget,
            first_step=first_step,
            keep=keep,
            local=process_group.count() > 1,
        )

    @property
    def possible(self) -> frozenset[str]:
        """The features that these stages allow: evidence is about what each backward brought."""
        return self.features if Stage.BACKWARD in self.stages else self.features - {"evidence"}


def check_stage(stage: str | None) -> None:
    """Raise unless it is one of the stages, or None."""
    if stage is not None and stage not in list(Stage):
        raise choice("stage", str(stage), list(Stage))


def stages_of(given: str | Iterable[str] | None) -> frozenset[str]:
    """The stages to read."""
    if given is None:
        return frozenset({"reduced", "used"} if process_group.count() > 1 else {"backward", "used"})
    words = _words("stage", given, list(Stage))
    if not words:
        raise ArgumentError(f"stage is empty; name one or several of {', '.join(repr(str(stage)) for stage in Stage)}")
    return words


def features_of(given: str | Iterable[str]) -> frozenset[str]:
    """The features that need buffers."""
    return _words("features", given, FEATURES)


def _words(what: str, given: str | Iterable[str], allowed: Sequence[str]) -> frozenset[str]:
    words = [given] if isinstance(given, str) else list(given)
    for word in words:
        if word not in list(allowed):
            raise choice(what, str(word), allowed)
    return frozenset(str(word) for word in words)


def check_on_finding(given: str | Callable[[Finding], None]) -> None:
    """Raise unless it says what to do with a finding."""
    if not callable(given) and given not in ON_FINDING:
        raise choice("on_finding", str(given), ON_FINDING)


def check_budget(given: float | None) -> None:
    """Raise unless it is a share of the time, or None."""
    if given is not None and not 0 < given <= 1:
        raise ArgumentError(f"budget is a share of the training time between 0 and 1, such as 0.01, not {given!r}")


def check_first_step(given: int) -> None:
    """Raise unless it is the number of a step."""
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise ArgumentError(f"first_step is the number of a step, 0 or more, not {given!r}")


def check_scaler(given: Any) -> None:
    """Raise unless it is a scaler of torch's, or None."""
    if given is not None and not isinstance(given, torch.amp.GradScaler):
        raise ArgumentTypeError(f"scaler is a torch.amp.GradScaler, not {type(given).__name__}")


def optimizers_of(given: Any) -> tuple[list[torch.optim.Optimizer], list[bool]]:
    """The optimizers, unwrapped, in order; and of each, whether what was around it may move weights itself."""
    if given is None:
        return [], []
    listed = list(given) if isinstance(given, list | tuple | set | frozenset) else [given]
    result = [unwrap_optimizer(optimizer) for optimizer in listed]
    for optimizer, original in zip(result, listed, strict=True):
        if not isinstance(optimizer, torch.optim.Optimizer):
            hint = "; the model comes first: watch(model, optimizer)" if isinstance(original, torch.nn.Module) else ""
            raise ArgumentTypeError(
                f"optimizer is a torch.optim.Optimizer, or a list of them, not {type(original).__name__}{hint}"
            )
        if not hasattr(type(optimizer).step, "hooked") or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            raise ArgumentError(
                f"{type(optimizer).__name__} never ran Optimizer.__init__, so torch tells nobody of its steps; call "
                "super().__init__(params, defaults) in its __init__, or leave it out of watch() and call lens.step() after "
                "each of its steps"
            )
    return result, [o is not original and may_move(original) for o, original in zip(result, listed, strict=True)]


def writers_of(given: Iterable[Writer]) -> list[Writer]:
    """The writers that the user adds."""
    result = list(given)
    for writer in result:
        lacking = [call for call in ("write", "flush", "close") if not callable(getattr(writer, call, None))]
        if lacking:
            raise ArgumentTypeError(
                f"a writer has write(record), flush() and close(); {type(writer).__name__} lacks {lacking[0]}()"
            )
    return result


def rules_of(given: Iterable[Any]) -> list[Any]:
    """The rules."""
    result = list(given)
    for rule in result:
        if not callable(rule) or isinstance(rule, type):
            raise ArgumentTypeError(
                f"a rule is a callable history -> findings (an instance, if it is a class), not {rule!r}"
            )
    return result


def number_of(name: str, value: Any) -> float | Tensor:
    """A value to observe: a number, or a tensor of one that is not waited for."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ArgumentError(f"observe({name}=...) takes one number, not a tensor of shape {tuple(value.shape)}")
        if piece(value):
            raise ArgumentError(
                f"observe({name}=...) got a distributed tensor of which each rank has a part ({value.placements}); give "  # type: ignore[attr-defined]
                f"{name}.full_tensor() on every rank, or the number of this rank"
            )
        return local_part(value).detach().reshape(()).clone()
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"observe({name}=...) takes a number or a tensor of one, not {value!r}") from None


def foreign_parameters(optimizers: Sequence[torch.optim.Optimizer], attachment: Attachment, step: int) -> list[Finding]:
    """An optimizer that moves what is not in the model is a mistake, or a limit, that the user should hear of."""
    watched = {id(t) for slot in attachment.slots if (t := slot.tensor()) is not None}
    parts = attachment.target().values()
    mine = watched | {id(p) for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters()}
    held = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    covered = watched <= {id(p) for each in held for p in each}
    found = []
    for optimizer, moved in zip(optimizers, held, strict=True):
        foreign = [p for p in moved if id(p) not in mine]
        if foreign:
            shapes = ", ".join(str(tuple(p.shape)) for p in foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            kind, copies = type(optimizer).__name__, _are_copies(foreign, attachment)
            finding = findings.foreign_parameters(
                step, kind, len(foreign), len(moved), shapes, covered=covered, copies=copies
            )
            found.append(finding)
            if finding.severity is Severity.WARNING:
                warnings.warn(GradlensWarning(f"{finding.seen}. {finding.remedy}"), stacklevel=4)
    return found


def _are_copies(foreign: Sequence[torch.Tensor], attachment: Attachment) -> bool:
    """Whether they have the shapes of the model's parameters, each as often, and another type: master weights have."""
    own = [t for slot in attachment.slots if (t := slot.tensor()) is not None]
    shapes = sorted(tuple(p.shape) for p in foreign) == sorted(tuple(p.shape) for p in own)
    return shapes and not {p.dtype for p in foreign} & {p.dtype for p in own}
