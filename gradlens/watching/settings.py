"""What `watch` may be given: each argument as it is meant, or an error that says what was given and what to give."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradlens.capture.attachment import Attachment
from gradlens.errors import ArgumentError, ArgumentTypeError, GradlensWarning, choice
from gradlens.records import Finding, Stage
from gradlens.unwrapping import unwrap_optimizer
from gradlens.watching import process_group
from gradlens.writers.base import Writer

FEATURES = ("updates", "flips", "evidence")
ON_FINDING = ("record", "warn", "raise")


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


def optimizers_of(given: Any) -> list[torch.optim.Optimizer]:
    """The optimizers, unwrapped, in order."""
    if given is None:
        return []
    listed = list(given) if isinstance(given, list | tuple | set | frozenset) else [given]
    result = [unwrap_optimizer(optimizer) for optimizer in listed]
    for optimizer, original in zip(result, listed, strict=True):
        if not isinstance(optimizer, torch.optim.Optimizer):
            hint = "; the model comes first: watch(model, optimizer)" if isinstance(original, torch.nn.Module) else ""
            raise ArgumentTypeError(
                f"optimizer is a torch.optim.Optimizer, or a list of them, not {type(original).__name__}{hint}"
            )
    return result


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
        return value.detach().reshape(()).clone()
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"observe({name}=...) takes a number or a tensor of one, not {value!r}") from None


def warn_of_strangers(optimizers: Sequence[torch.optim.Optimizer], attachment: Attachment) -> None:
    """An optimizer that moves nothing of the model is a mistake that the user should hear of."""
    mine = {id(t) for slot in attachment.slots if (t := slot.tensor()) is not None}
    parts = attachment.target().values()
    mine |= {id(p) for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters()}
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        strange = [p for p in held if id(p) not in mine]
        if strange:
            shapes = ", ".join(str(tuple(p.shape)) for p in strange[:3])
            warnings.warn(
                GradlensWarning(
                    f"{len(strange)} of the {len(held)} parameters of {type(optimizer).__name__} are not the model's "
                    f"(shapes {shapes}{', ...' if len(strange) > 3 else ''}); was it made for another model, or before the "
                    "model's parameters were replaced?"
                ),
                stacklevel=4,
            )
