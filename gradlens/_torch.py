"""Every private of torch that gradlens' live half uses, once, with what it is for.

A private may change with any release of torch. What is listed here is all that has to be looked at then: `PRIVATES` has each
with its purpose, and a test looks every one of them up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo import compiled_autograd, trace_rules
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.amp.grad_scaler import GradScaler, OptState
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointFunction

__all__ = [
    "modes_are_active",
    "traced",
    "CHECKPOINT_BACKWARD",
    "ENGINE_RUN",
    "FUNCTION_APPLY",
    "OPTIMIZER_STEP",
    "PRIVATES",
    "SCALER_STEP",
    "OptState",
    "Private",
    "UninitializedTensorMixin",
    "asks_torch_functions",
    "current_task",
    "disable_current_modes",
    "executes",
    "in_compiled_autograd",
    "is_transformed",
    "leave_to_python",
    "local_part",
    "queue_callback",
    "set_asks_torch_functions",
    "unseen",
]


@dataclass(frozen=True)
class Private:
    """Something of torch without a promise: where it is, and what gradlens needs it for."""

    path: str  #: as one would import it
    purpose: str
    make: Callable[[], Any] | None = None  #: for an attribute of instances: makes one

    def find(self) -> Any:
        """The thing itself; an AttributeError or ImportError where torch has it no more."""
        module, _, attributes = self.path.partition(":")
        found = import_module(module) if self.make is None else self.make()
        for name in attributes.split("."):
            found = getattr(found, name)
        return found


PRIVATES = (
    Private("torch._C:_current_graph_task_id", "which engine run a hook is called by"),
    Private("torch._C:_will_engine_execute_node", "whether a run on a device's thread is torch.autograd.grad"),
    Private("torch.autograd:Variable._execution_engine.queue_callback", "to be called when a backward ends"),
    Private("torch.autograd.graph:_engine_run_backward.__code__", "finds engine runs, nested ones too, on the stack"),
    Private("torch.autograd:_engine_run_backward", "`gradlens run` hears there of a backward before it begins"),
    Private("torch.optim.optimizer:Optimizer._patch_step_function", "`gradlens run` hears there of an optimizer"),
    Private("torch.optim.optimizer:_global_optimizer_pre_hooks", "a lens that is made in such a hook still sees that step"),
    Private("torch._C._dynamo.eval_frame:set_code_exec_strategy", "keeps hooks of `gradlens run` from torch.compile"),
    Private("torch.autograd.function:BackwardCFunction.apply.__code__", "finds a backward inside a custom function"),
    Private("torch._dynamo.compiled_autograd:in_compiled_autograd_region", "callbacks are dropped there"),
    Private("torch._dynamo.trace_rules:add", "keeps torch.compile from compiling gradlens"),
    Private("torch._C._dynamo.eval_frame:get_eval_frame_callback", "whether torch.compile traces what is called now"),
    Private("torch.optim.optimizer:Optimizer.profile_hook_step", "finds the steps of optimizers on the stack"),
    Private("torch.amp.grad_scaler:OptState.STEPPED", "tells a step that the scaler skipped"),
    Private("torch:_per_optimizer_states", "tells a step that the scaler skipped", lambda: GradScaler("cpu")),
    Private("torch:_scale", "the loss scale without a device sync", lambda: GradScaler("cpu")),
    Private("torch.nn.parameter:UninitializedTensorMixin", "a lazy parameter has no shape yet"),
    Private("torch:_backward_hooks", "leaves a parameter's hooks as they were", lambda: torch.zeros(1)),
    Private("torch:_post_accumulate_grad_hooks", "the same of hooks after accumulation", lambda: torch.zeros(1)),
    Private("torch:_version", "rises when a gradient is written", lambda: torch.zeros(1)),
    Private("torch:_parameters", "finds what is at a place in the model now", torch.nn.Identity),
    Private("torch:_modules", "walks a model without its wrappers' names", torch.nn.Identity),
    Private("torch.utils._python_dispatch:_disable_current_modes", "a user's modes do not see our computing"),
    Private("torch._C:_len_torch_dispatch_stack", "whether there are such modes"),
    Private("torch._ops:_len_torch_dispatch_stack_pre_dispatch", "the same, of modes that come before autograd"),
    Private("torch._C._functorch:is_functorch_wrapped_tensor", "what a vmap or grad transform runs on is not read"),
    Private("torch._C:_is_tracing", "what torch.jit.trace runs is not read"),
    Private("torch._dynamo.eval_frame:OptimizedModule", "a compiled model, whose modules get no forward hooks"),
    Private("torch.nn:Module._compiled_call_impl", "the same of a model compiled in place"),
    Private("torch._C:_get_torch_function_state", "whether torch functions are asked in this thread"),
    Private("torch._C:_set_torch_function_state", "puts that back after an interrupt"),
    Private("torch._C:_TorchFunctionState.ALL_DISABLED", "a user's function modes do not see our questions"),
    Private("torch.utils.checkpoint:CheckpointFunction.backward.__code__", "tells what a reentrant checkpoint runs again"),
    Private("torch.utils.checkpoint:_checkpoint_without_reentrant_generator", "the same of others, by its `recompute_fn`"),
    Private("torch.nn:_forward_hooks.__dict__", "keeps forward hooks out of copies and pickles", torch.nn.Identity),
    Private("torch:grad_fn.metadata", "what belongs to a node of the graph", lambda: torch.ones(1, requires_grad=True) * 1),
    Private("torch.distributed.tensor:DTensor._local_tensor", "what is here of a distributed tensor, without an operation"),
)

current_task: Callable[[], int] = torch._C._current_graph_task_id
#: Has a function called at the end of the engine run that is under way.
queue_callback: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback  # type: ignore[attr-defined]
disable_current_modes = _disable_current_modes

#: Whether operations ask `__torch_function__` of subclasses and of modes, in this thread; and to set it back.
asks_torch_functions: Callable[[], Any] = torch._C._get_torch_function_state  # type: ignore[attr-defined]
set_asks_torch_functions: Callable[[Any], None] = torch._C._set_torch_function_state  # type: ignore[attr-defined]
_ASKS_NOBODY = torch._C._TorchFunctionState.ALL_DISABLED  # type: ignore[attr-defined]

Result = TypeVar("Result")

#: Code objects by which frames are recognised.
ENGINE_RUN = _engine_run_backward.__code__
CHECKPOINT_BACKWARD = CheckpointFunction.backward.__code__
FUNCTION_APPLY = BackwardCFunction.apply.__code__
OPTIMIZER_STEP = Optimizer.profile_hook_step(lambda self: None).__code__
SCALER_STEP = GradScaler.step.__code__


def modes_are_active() -> bool:
    """Whether `disable_current_modes` has something to do."""
    return bool(torch._C._len_torch_dispatch_stack() or _len_torch_dispatch_stack_pre_dispatch())


def unseen(call: Callable[..., Result], *args: Any) -> Result:
    """Call it while no mode and no subclass of the user's sees an operation, or a question to a tensor.

    What a `with` puts back stays as it is where Ctrl-C falls between its body and its end; one of two blocks that enclose
    each other always comes.
    """
    asked = asks_torch_functions()
    try:
        try:
            set_asks_torch_functions(_ASKS_NOBODY)
            if not modes_are_active():
                return call(*args)
            with disable_current_modes():
                return call(*args)
        finally:
            set_asks_torch_functions(asked)
    finally:
        set_asks_torch_functions(asked)


def in_compiled_autograd() -> bool:
    """Whether compiled autograd runs the backward."""
    return bool(getattr(compiled_autograd, "in_compiled_autograd_region", False))


def executes(leaf: Tensor) -> bool:
    """Whether the run under way writes the leaf's `.grad`, where no stack shows it: `autograd.grad` captures there."""
    with torch.enable_grad():
        node = torch.autograd.graph.get_gradient_edge(leaf).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return False


#: Whether a tensor stands for others inside `torch.func.vmap`, `grad` or the like.
is_transformed: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor

#: What Dynamo would be given of a call that is made now; None where it traces nothing.
traced: Callable[[], Any] = get_eval_frame_callback


def local_part(tensor: Tensor) -> Tensor:
    """The local part of a distributed tensor; any other as it is.

    An operation on the distributed tensor itself may be a collective: a rank alone would wait for the others for ever.
    """
    local = getattr(tensor, "_local_tensor", None)
    return tensor if local is None else local


@functools.cache
def leave_to_python() -> None:
    """Dynamo neither traces nor compiles this package, from now on."""
    trace_rules.add("gradlens")
