"""Run any loss in float64, whatever its weights, inputs and constants are stored in.

A central difference divides the rounding error of the loss by a small step: in float32 that leaves two digits, in
float64 nine. Casting the weights is not enough, since inputs, targets and constants that the loss holds on to stay narrow
and operations refuse to mix. So a `TorchFunctionMode` widens what each operation is given.

- A narrow tensor that is written into (`x.add_(1)`, `out=x`) gets a float64 tensor that stands for its storage from then on,
  views of it included; the tensor itself stays as it is.
- An operation that does not exist in float64 is computed in the precision that it has, and named in `coarse`.
- What else gives back less than float64 is named in `narrow`: there the loss is less exact than it looks.

Where the first evaluation met nothing but inputs to widen, and no operation of these kinds, `inputs()` gives them. While
they hold float64 in their own places (`InPlace`), an evaluation needs no mode, which costs some microseconds an operation.

With `hold_cuts` the values that the first evaluation cuts off from its gradient (`detach()`, `.data`, `no_grad()`) are kept,
and given again in the evaluations that follow: what is differentiated then is the function that the author meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from gradlens._torch import is_transformed
from gradlens.errors import ProbeError

_WIDE = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}
#: These name no dtype in their arguments that could be widened.
_CASTS: dict[Callable, Callable] = {
    **dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double),
    Tensor.chalf: lambda x: x.to(torch.complex128),
}
_PLAIN = (int, float, bool, str, type(None), torch.Size, torch.device, slice)
_PLAIN_TYPES = frozenset(_PLAIN)
_TYPES = ("Double", "double", "Float", "Half", "BFloat16", "float32", "float64", "bfloat16", "dtype")
_COARSER = (torch.float32, torch.bfloat16, torch.float16)
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
CONSTANTS, CONSTANT_BYTES = 256, 1 << 28  #: inputs and targets whose float64 copies are kept


def is_narrow(x: object) -> bool:
    """Whether x is a real or complex floating tensor of less than float64."""
    return isinstance(x, Tensor) and x.dtype in _WIDE


def widen(x: Any) -> Any:
    """A narrow tensor in float64, a narrow dtype as the wide one, anything else as it is."""
    if isinstance(x, torch.dtype):
        return _WIDE.get(x, x)
    return x.to(_WIDE[x.dtype]) if is_narrow(x) else x


def grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor], create: bool, retain: bool
) -> list[Tensor | None]:
    """`torch.autograd.grad`, by the engine itself: the public function leaves the mode while backward runs.

    Checkpointed blocks compute their forward again during backward, and need the mode there too.
    """
    engine = torch.autograd.Variable._execution_engine
    return list(engine.run_backward(tuple(outputs), tuple(seeds), retain, create, tuple(inputs), True, False))


class Float64(TorchFunctionMode):
    """Within it, operations see float64; `narrow` names those whose results were not."""

    def __init__(self, hold_cuts: bool = False) -> None:
        super().__init__()
        self.narrow: set[str] = set()
        self.coarse: set[str] = set()
        self._cuts = Cuts() if hold_cuts else None
        self._written: dict[int, tuple[Tensor, Tensor]] = {}  # by storage: who has it, and what stands for it
        self._constants: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._ordinary: dict[Callable, bool] = {}  # neither a cast, nor an attribute, nor in place
        self._bytes = 0
        self._forward = True
        self._closed = False
        self._only_inputs = True  # nothing was met so far but inputs to widen

    def __enter__(self) -> Self:
        self._written.clear()
        self._forward = True
        if self._cuts is not None:
            self._cuts.begin()
        return super().__enter__()

    def backward_begins(self) -> None:
        """The loss is there: what runs without gradients from now on is the backward, and cuts nothing off."""
        self._forward = False

    def inputs(self, held: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]] | None:
        """The narrow tensors that were met, each with its like in float64, if to exchange these is all that is needed.

        All must be among those that the loss function holds: others live for one evaluation.
        """
        known = [(x, wide) for x, _, wide in self._constants.values()]
        simple = self._only_inputs and not self.narrow and self._cuts is None and not self._closed
        lasting = {id(x) for x in held if _exchangeable(x)}
        return known if simple and all(id(x) in lasting for x, _ in known) else None

    def closed(self) -> Self:
        """Let go of all tensors; the names stay. From now on it changes nothing, should it still be on the stack."""
        self._closed = True
        self._written.clear()
        self._constants.clear()
        self._cuts = None
        return self

    def __torch_function__(self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if self._closed:
            return func(*args, **(kwargs or {}))
        ordinary = self._ordinary.get(func)
        if ordinary is None:
            ordinary = self._ordinary[func] = _is_ordinary(func)
        if ordinary and not self._written and self._cuts is None and (given := self._wide_already(args)) is not None:
            if kwargs:
                named = None if "out" in kwargs else self._wide_already(kwargs.values())
                if named is None:
                    return self._computed(func, func.__name__, args, kwargs)
                kwargs = dict(zip(kwargs, named, strict=True))
            try:
                result = func(*given, **(kwargs or {}))
            except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                return self._coarser(func, func.__name__, given, kwargs or {}, error)
            if type(result) is Tensor and result.dtype not in _WIDE:
                return result
            return self._noted(func.__name__, result)
        return self._any(func, args, kwargs)

    def _wide_already(self, values: Any) -> list[Any] | None:
        """What a call is given where that is float64 tensors, inputs seen before and plain values, as nearly always."""
        given = []
        for value in values:
            kind = type(value)
            if kind is Tensor or kind is nn.Parameter:
                if value.dtype in _WIDE:
                    known = self._constants.get(id(value))
                    if known is None or known[0] is not value or value.is_inference() or known[1] != value._version:
                        return None
                    value = known[2]
            elif kind not in _PLAIN_TYPES:
                return None
            given.append(value)
        return given

    def _any(self, func: Callable, args: Sequence[Any], kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        if func in _CASTS:
            self._only_inputs = False
            result = _CASTS[func](self._given(args[0]))
        elif name == "__get__":  # x.dtype, x.shape, x.T: nothing is computed, so nothing need be copied
            given = (self._stands_for(args[0]), *args[1:]) if self._written and args else args
            result = func(*given, **(kwargs or {}))
            result = (
                widen(result) if isinstance(result, torch.dtype) else result
            )  # code compares those of inputs and weights
        else:
            result = self._computed(func, name, args, kwargs)
        if self._cuts is not None and self._forward and (name == "detach" or func == _DATA or not torch.is_grad_enabled()):
            return self._cuts.held(result)
        return result

    def _computed(self, func: Callable, name: str, args: Sequence[Any], kwargs: Any) -> Any:
        into = _in_place(name)
        if into and args:
            given = [self._target(args[0]), *map(self._wide, args[1:])]
        else:
            given = [*map(self._wide, args)]
        named = {key: self._wide(value) for key, value in kwargs.items()} if kwargs else {}
        if named.get("out") is not None:
            named["out"] = _each(kwargs["out"], self._target)
        try:
            result = func(*given, **named)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            result = self._coarser(func, name, given, named, error)
        return result if into else self._noted(name, result)

    def _noted(self, name: str, result: Any) -> Any:
        if result.dtype in _WIDE if isinstance(result, Tensor) else _any_narrow(result):
            self.narrow.add(name)
        return result

    def _coarser(self, func: Callable, name: str, args: Sequence[Any], kwargs: Any, error: Exception) -> Any:
        """The operation in less than float64, where it exists there only."""
        if isinstance(error, ProbeError) or not any(word in str(error) for word in _TYPES):
            raise error
        for dtype in _COARSER:
            try:
                fewer = tree_map_only((Tensor, torch.dtype), partial(_to, dtype), (tuple(args), kwargs))
                result = func(*fewer[0], **fewer[1])
            except (RuntimeError, TypeError, ValueError, NotImplementedError):
                continue
            self.coarse.add(name)
            self.narrow.add(name)
            return tree_map_only(Tensor, widen, result)
        raise error

    def _wide(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._given(value)
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, torch.dtype):
            self._only_inputs = self._only_inputs and value not in _WIDE
            return _WIDE.get(value, value)
        return tree_map_only((Tensor, torch.dtype), self._wide, value)

    def _given(self, x: Tensor) -> Tensor:
        if x.dtype not in _WIDE:
            return x
        if self._written and (there := self._stands_for(x)) is not x:
            return there
        if x.grad_fn is not None or x.requires_grad:
            if isinstance(x.grad_fn, torch.autograd.function.BackwardCFunction):
                # The result of a custom autograd.Function: applying one does not pass through the mode.
                self.narrow.add(type(x.grad_fn).__name__)
            self._only_inputs = False
            return x.to(_WIDE[x.dtype])
        return self._constant(x)

    def _constant(self, x: Tensor) -> Tensor:
        """Inputs and targets in float64: the same copy at each evaluation, while they stay as they are."""
        known = self._constants.get(id(x))
        version = 0 if x.is_inference() else x._version
        if known is not None and known[0] is x and known[1] == version:
            return known[2]
        wide = x.to(_WIDE[x.dtype])
        size = wide.numel() * wide.element_size()
        fits = len(self._constants) < CONSTANTS and self._bytes + size < CONSTANT_BYTES
        if fits and x.layout == torch.strided and not is_transformed(x) and not is_transformed(wide):
            self._constants[id(x)] = x, version, wide
            self._bytes += size
        else:
            self._only_inputs = False
        return wide

    def _stands_for(self, x: Any) -> Any:
        """The part of what stands for its storage; itself where nothing does."""
        if not isinstance(x, Tensor) or x.dtype not in _WIDE or x.layout != torch.strided or x.grad_fn is not None:
            return x
        owner, there = self._written.get(x.untyped_storage()._cdata, (None, None))
        if owner is None or there is None or owner.dtype != x.dtype:
            return x
        return there.as_strided(x.size(), x.stride(), x.storage_offset())

    def _target(self, x: Any) -> Any:
        """What an operation writes into in place of a narrow tensor."""
        if not is_narrow(x) or x.layout != torch.strided or x.grad_fn is not None or x.requires_grad:
            return self._wide(x) if not isinstance(x, Tensor) else x
        self._only_inputs = False
        storage = x.untyped_storage()._cdata
        if storage not in self._written:
            n = x.untyped_storage().nbytes() // x.element_size()
            whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage(), 0, (n,), (1,))
            self._written[storage] = x, whole.to(_WIDE[x.dtype])
        return self._stands_for(x)


def _exchangeable(x: Tensor) -> bool:
    """Whether it can hold other values for a while: a plain tensor that no graph, transform or mode has a hand in."""
    if type(x) is not Tensor or x.layout != torch.strided or x.is_inference() or x.requires_grad:
        return False
    return not is_transformed(x) and not x.is_conj() and not x.is_neg() and x.grad_fn is None and x.grad is None


class InPlace:
    """Inputs that hold their values in float64 for the time of an evaluation, by `x.data`; then what they held before.

    Identity, version and storage of a tensor are as before afterwards. Both ways may run any number of times.
    """

    def __init__(self, inputs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._inputs = [(x, x.data, wide) for x, wide in inputs]

    def swap_in(self) -> None:
        """The wide values."""
        for x, _, wide in self._inputs:
            x.data = wide

    def versions(self) -> list[int]:
        """They rise where an evaluation writes into an input: its wide values are spoilt then."""
        return [x._version for x, _, _ in self._inputs]

    def swap_out(self) -> None:
        """The tensors' own."""
        for x, own, _ in self._inputs:
            x.data = own


def _is_ordinary(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return bool(name) and name != "__get__" and name != "detach" and func not in _CASTS and not _in_place(name)


def _in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name.startswith("__i")


def _each(value: Any, call: Callable[[Any], Any]) -> Any:
    return type(value)(map(call, value)) if isinstance(value, tuple | list) else call(value)


def _any_narrow(result: Any) -> bool:
    return isinstance(result, tuple | list) and any(map(is_narrow, result))


def _to(dtype: torch.dtype, x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return dtype if x == torch.float64 else x
    return x.to(dtype) if x.dtype == torch.float64 else x


class Cuts:
    """The values that one evaluation cut off from its gradient, given again in those that follow, in the same order."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._at = -1  # of the next one to give; -1 while they are being kept

    def begin(self) -> None:
        """One more evaluation."""
        if self._values and self._at not in (-1, len(self._values)):
            raise ProbeError(
                "loss_fn cuts off other values than at its first call, so that they cannot be held as they were"
            )
        self._at = 0 if self._values else -1

    def held(self, result: Any) -> Any:
        """A value that is cut off: kept at first, then what was kept."""
        if not isinstance(result, Tensor):
            return result
        if self._at < 0:
            self._values.append(result.detach().clone())
            return result
        if self._at >= len(self._values) or self._values[self._at].shape != result.shape:
            raise ProbeError(
                "loss_fn cuts off other values than at its first call, so that they cannot be held as they were"
            )
        self._at += 1
        return self._values[self._at - 1].clone()
