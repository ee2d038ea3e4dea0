"""Names, and hooks put on and taken off parameters.

A `Slot` is a place in the model where a parameter lives: a weak reference to the module that owns it and its name there. It
never refers to the parameter itself, weakly or strongly: a strong reference from a hook would keep the model alive for ever,
and a weak one breaks `Module.to()` where torch swaps tensors. So a parameter may be replaced, unfrozen or swapped, and the
slot still finds it; `Attachment.hook_all()` then puts the hooks on what is there now. Swapping leaves a parameter's identity
and its dictionaries of hooks as they were and disconnects them, which only a gradient that came without a hook reveals: then
`Slot.rehook()` starts over with new dictionaries.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, methodcaller
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from gradlens._torch import UninitializedTensorMixin
from gradlens.capture import sharding
from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.records import Parameters
from gradlens.selection import Select, check, predicate
from gradlens.unwrapping import is_wrapper

Target = nn.Module | Mapping[str, nn.Module | Tensor]


class Slot:
    """Where one parameter lives, and the hooks that are on it."""

    __slots__ = (
        "_hooks",
        "_kept",
        "_leaf",
        "_owner",
        "_restore",
        "_shard",
        "_tensor",
        "flat_slice",
        "handles",
        "hooked",
        "name",
        "place",
        "read_in_hook",
    )

    def __init__(self, name: str, owner: nn.Module | None, leaf: str, tensor: Tensor) -> None:
        self.name = name
        self._leaf = leaf
        self._owner = None if owner is None else weakref.ref(owner)
        self._tensor = weakref.ref(tensor) if owner is None else None
        self.handles: list[Any] = []
        self.hooked = 0  # the id of the tensor that has our hooks, 0 for none
        self.read_in_hook = False  # its gradient was gone by the end of a pass once: it is read inside the hook from then on
        self._restore: tuple[bool, bool] = (False, False)
        self._hooks: Callable[[], Any] = lambda: None  # the dictionary that has our hook, while its tensor lives
        self._kept: tuple[Any, Any, Any] | None = None  # both dictionaries and the post hook, while they are off
        self._shard: weakref.ref[Any] | None = None
        self.place: _Place | None = None  # what was there when something last was
        self.flat_slice: sharding.FlatSlice | None = None  # FSDP1 has flattened it, and lets no hook on it fire

    def follow(self, shard: Any) -> None:
        """The parameter is sharded by FSDP2, whose record of it knows the shard when the module shows the whole."""
        self._shard = None if shard is None else weakref.ref(shard)

    def tensor(self) -> Tensor | None:
        """The parameter that is there now; None when it was deleted."""
        if self._owner is None:
            return self._tensor() if self._tensor is not None else None
        owner = self._owner()
        try:
            tensor = None if owner is None else owner._parameters[self._leaf]  # a scripted module's have no get()
        except KeyError:
            return None
        if tensor is None or (self._shard is None and self.flat_slice is None):
            return tensor
        if self.flat_slice is not None:
            return self.flat_slice.tensor()
        shard = None if self._shard is None else self._shard()
        return tensor if shard is None else shard.sharded_param  # type: ignore[no-any-return]

    @property
    def direct(self) -> bool:
        """Whether it is a module's parameter as the module shows it."""
        return self._owner is not None and self._shard is None and self.flat_slice is None

    def gradient(self) -> Tensor | None:
        """The parameter's `.grad`, or None if it needs no gradient."""
        tensor = self.tensor()
        if tensor is None or not tensor.requires_grad:
            return None
        return tensor.grad if self.flat_slice is None else self.flat_slice.gradient()

    def extent(self, tensor: Tensor) -> tuple[tuple[int, ...], str]:
        """The shape of the whole parameter, and which entries of it this tensor has, as `Parameters.pieces` wants it."""
        if isinstance(tensor, UninitializedTensorMixin):
            return (), ""
        if self.flat_slice is not None and tensor.numel() == len(self.flat_slice):  # it is whole within summon_full_params
            return self.flat_slice.shape, self.flat_slice.piece
        return sharding.extent(tensor)

    def is_at(self, owner: nn.Module, leaf: str) -> bool:
        """Whether it is this place."""
        return self._leaf == leaf and self._owner is not None and self._owner() is owner

    def attach(self, tensor: Tensor, on_gradient: Callable | None, on_accumulated: Callable) -> None:
        """Put both hooks on the tensor."""
        self._kept = None
        self._restore = (_only_ours(tensor._backward_hooks), _only_ours(tensor._post_accumulate_grad_hooks))
        if not tensor._post_accumulate_grad_hooks:
            tensor._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        if not tensor._backward_hooks:
            tensor._backward_hooks = None  # an empty one may be disconnected
        self.handles = [tensor.register_post_accumulate_grad_hook(on_accumulated)]
        self._hooks = weakref.ref(tensor._post_accumulate_grad_hooks)
        if on_gradient is not None:
            self.handles.append(tensor.register_hook(on_gradient))
        self.hooked = id(tensor)

    def attach_again(self, tensor: Tensor) -> bool:
        """Put the hooks on that were taken off together, a tenth of the work; False where that does not do.

        The dictionaries go with the tensor: that one of them is alive says that the tensor is.
        """
        kept, self._kept = self._kept, None
        free = tensor._backward_hooks is None and tensor._post_accumulate_grad_hooks is None
        if kept is None or not free or type(tensor) not in PLAIN:
            return False
        own, accumulated, hook = kept
        accumulated[self.handles[0].id] = hook
        tensor._backward_hooks, tensor._post_accumulate_grad_hooks = own, accumulated
        self._restore, self._hooks, self.hooked = (True, True), weakref.ref(accumulated), id(tensor)
        return True

    def detach(self) -> None:
        """Take them off and leave the hook dictionaries as they were."""
        tensor = self.tensor()
        if tensor is not None and id(tensor) == self.hooked and self._detach_together(tensor):
            return
        for handle in self.handles:
            handle.remove()
        if tensor is not None and id(tensor) == self.hooked:
            if self._restore[0] and not tensor._backward_hooks and tensor.is_leaf:
                tensor._backward_hooks = None
            if self._restore[1] and not tensor._post_accumulate_grad_hooks:
                tensor._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        self.handles, self.hooked, self._kept = [], 0, None

    def _detach_together(self, tensor: Tensor) -> bool:
        """Take both dictionaries off, where they are ours alone. torch goes on to call the second one, so it is emptied."""
        own, accumulated = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
        if self._restore != (True, True) or len(self.handles) != 2 or type(tensor) not in PLAIN or not tensor.is_leaf:
            return False
        if not own or not accumulated or len(own) != 1 or len(accumulated) != 1 or accumulated is not self._hooks():
            return False
        if self.handles[0].id not in accumulated or self.handles[1].id not in own:
            return False
        self._kept, self.hooked = (own, accumulated, accumulated.pop(self.handles[0].id)), 0
        tensor._backward_hooks = tensor._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        return True

    def is_hooked(self, tensor: Tensor) -> bool:
        """Whether our hooks are on this tensor: an id alone may be that of another, which was freed."""
        return self.hooked == id(tensor) and self._hooks() is not None

    def rehook(self) -> None:
        """Its gradient came and no hook of ours fired: take them off, so that they are put on again.

        Not where a user's hooks are there too: those that are disconnected stay so.
        """
        tensor = self.tensor()
        if tensor is not None and self.hooked == id(tensor) and not self.shared(tensor):
            self.detach()
            self.handles, self._kept = [], None

    def shared(self, tensor: Tensor) -> bool:
        """Whether somebody else also hooked it: then `.grad` may not be this pass's own gradient when the pass ends."""
        accumulated, own = tensor._post_accumulate_grad_hooks, tensor._backward_hooks
        return bool(
            (accumulated and len(accumulated) > 1 and _foreign(accumulated)) or (own and len(own) > 1 and _foreign(own))
        )


def _only_ours(hooks: Mapping[int, Callable] | None) -> bool:
    """Whether there was no dictionary, or another lens made it."""
    return hooks is None or (bool(hooks) and not _foreign(hooks))


def _foreign(hooks: Mapping[int, Callable]) -> bool:
    return not all(hasattr(hook, "gradlens") for hook in hooks.values())


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """`(name, owner, leaf, tensor)` of every parameter, wrappers' prefixes stripped, in the order of `named_parameters`."""
    seen: set[int] = set()

    def visit(owner: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
        if id(owner) in seen:
            return
        seen.add(id(owner))
        for leaf, tensor in owner._parameters.items():
            if tensor is not None:
                yield path + leaf, owner, leaf, tensor
        for child, inner in owner._modules.items():
            if inner is not None:
                yield from visit(inner, path if is_wrapper(owner, child) else f"{path}{child}.")

    yield from visit(module, prefix)


def parts(target: Target) -> dict[str, nn.Module | Tensor]:
    """The modules and tensors of a target by prefix; a clear error for anything else."""
    if isinstance(target, nn.Module):
        return {"": target}
    if isinstance(target, torch.optim.Optimizer):
        raise ArgumentTypeError(
            f"watch() got the optimizer {type(target).__name__} as its first argument; the model comes first: "
            "watch(model, optimizer)"
        )
    if not isinstance(target, Mapping):
        raise ArgumentTypeError(
            "watch() takes a torch.nn.Module, or a mapping of names to modules and tensors such as {'G': g, 'D': d}, "
            f"not {type(target).__name__}"
        )
    for name, part in target.items():
        if not isinstance(name, str) or not isinstance(part, nn.Module | Tensor):
            raise ArgumentTypeError(f"watch() takes names and modules or tensors, not {name!r}: {type(part).__name__}")
        if isinstance(part, Tensor) and not part.is_leaf:
            raise ArgumentError(f"tensor {name!r} is computed from others, so it gets no gradient of its own; watch a leaf")
    return dict(target)


def locate(part: nn.Module | Tensor, name: str) -> Iterator[tuple[str, nn.Module | None, str, Tensor]]:
    """The places of the parameters of one part of the target."""
    if isinstance(part, Tensor):
        yield name, None, "", part
    else:
        yield from walk(part, f"{name}." if name else "")


class Anchor:
    """A part of the target, held weakly, and what is in it.

    A container may be made in the call of `watch` and end with it: `watch(nn.ModuleDict({"G": g, "D": d}))`. What is in it
    is watched under the same names. Parameters are held so, weakly, only of a list or dictionary of parameters that is a
    part itself: a weak reference keeps torch from swapping a parameter.
    """

    def __init__(self, name: str, part: nn.Module | Tensor, seen: set[int] | None = None) -> None:
        listed = seen is None and isinstance(part, nn.ParameterList | nn.ParameterDict)
        seen = set() if seen is None else seen
        seen.add(id(part))
        self._name, self._part = name, weakref.ref(part)
        self._within: list[Anchor] = []
        for child, inner in part._modules.items() if isinstance(part, nn.Module) else ():
            if inner is not None and id(inner) not in seen:
                path = name if is_wrapper(part, child) else f"{name}.{child}" if name else child  # type: ignore[arg-type]
                self._within.append(Anchor(path, inner, seen))
        for leaf, parameter in part._parameters.items() if listed and isinstance(part, nn.Module) else ():
            if parameter is not None:
                self._within.append(Anchor(f"{name}.{leaf}" if name else leaf, parameter, seen))

    def alive(self) -> Iterator[tuple[str, nn.Module | Tensor]]:
        """The part by its name; where it is gone, those within it that are left."""
        part = self._part()
        if part is not None:
            yield self._name, part
            return
        for inner in self._within:
            yield from inner.alive()

    def everything(self) -> Iterator[nn.Module | Tensor]:
        """The part and all within it."""
        part = self._part()
        if part is not None:
            yield part
        for inner in self._within:
            yield from inner.everything()


def contents(modules: Sequence[nn.Module | None]) -> tuple[list[Any], ...] | None:
    """What modules have, by identity and name: parameters and modules; None where one is gone, or does not tell."""
    if None in modules:
        return None
    held: Any = [*map(attrgetter("_parameters"), modules), *map(attrgetter("_modules"), modules)]
    if not set(map(type, held)) <= {dict, OrderedDict}:
        return None  # a scripted module's
    values = itertools.chain.from_iterable(map(methodcaller("values"), held))
    return list(map(id, values)), list(itertools.chain.from_iterable(held)), list(map(len, held))


#: Tensors without a placement or a shape to come.
PLAIN = {Tensor, nn.Parameter}
FACTS = (attrgetter("shape"), attrgetter("dtype"), attrgetter("device"))
_Place = tuple[tuple[int, ...], str, torch.dtype, torch.device]


class SlotCache:
    """While no code of the user's runs, what is at the slots is looked up once. A class, 0.4 us cheaper than a generator."""

    def __init__(self) -> None:
        self.depth = 0
        self.seen: dict[Slot, Tensor | None] | None = None

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.depth -= 1
        if not self.depth:
            self.seen = None


class Attachment:
    """The slots of a target, in model order, and the hooks on them."""

    def __init__(self, target: Target, select: Select = None) -> None:
        given = parts(target)
        self._anchors = [Anchor(name, part) for name, part in given.items()]
        self._chosen = predicate(select)
        found = {name: tensor for key, part in given.items() for name, _, _, tensor in locate(part, key)}
        if not any(tensor.requires_grad for tensor in found.values()):
            raise ArgumentError(_untrainable(found))
        check(select, found)
        self.slots: list[Slot] = []
        self.aliases: dict[str, str] = {}  # a tied parameter's other names -> the name it is reported by
        self.ignored = frozenset[Slot]()  # beside what FSDP2 shards: it averages no gradient of these
        self.flat = self._cut = False  # FSDP1 has made one parameter of several, or shows pieces of it
        self.parameters = Parameters((), (), ())
        self.rows: dict[Slot, int] = {}  # the row of each slot
        self.lost = False  # a parameter was deleted since the last scan
        self._layout: list[_Place | None] = []
        self._columns: list[list[Any]] = []  # the same of a model of plain tensors, quicker to compare
        self._listed: list[Slot] | None = None
        self._direct = False  # each slot is a plain parameter of a module
        self.cache = SlotCache()  # `with attachment.cache:`, under the lock of `Gradients`
        self._named = not callable(select)  # what is chosen depends on names alone
        self._modules: list[weakref.ref[nn.Module]] = []
        self._contents: tuple[list[Any], ...] | None = None  # of the modules, at the last scan; None where they do not tell
        self.rescan()
        self.refresh()
        if not any((t := slot.tensor()) is not None and t.requires_grad for slot in self.slots):
            raise ArgumentError(f"select={select!r} leaves only parameters that do not require a gradient; loosen it")

    def target(self) -> dict[str, nn.Module | Tensor]:
        """The parts of the target that are alive."""
        return {name: part for anchor in self._anchors for name, part in anchor.alive()}

    def everything(self) -> Iterator[nn.Module | Tensor]:
        """The parts of the target with all that is in them, as it was at the start: when all are gone, so is the target."""
        for anchor in self._anchors:
            yield from anchor.everything()

    def tensors(self) -> list[Tensor | None]:
        """What is at the slots now."""
        return list(self._seen().values()) if self.cache.depth else self._looked_up()

    @property
    def owners(self) -> tuple[list[Any], list[str]] | None:
        """Weak references to the modules that own the slots, and the names there; None where something is elsewhere."""
        if not self._direct:
            return None
        return [slot._owner for slot in self.slots], [slot._leaf for slot in self.slots]

    @property
    def columns(self) -> list[list[Any]]:
        """`FACTS` of all tensors at the last `refresh`, of a model of plain ones: the same object until one changes."""
        return self._columns

    def at(self, slots: Iterable[Slot]) -> list[Tensor | None]:
        """What is at these slots now."""
        return list(map(self._seen().get, slots)) if self.cache.depth else [slot.tensor() for slot in slots]

    def _seen(self) -> dict[Slot, Tensor | None]:
        seen = self.cache.seen
        if seen is None:
            seen = self.cache.seen = dict(zip(self.slots, self._looked_up(), strict=True))
        return seen

    def _looked_up(self) -> list[Tensor | None]:
        if self._direct:
            with contextlib.suppress(AttributeError, KeyError):  # a module or a parameter is gone
                return [slot._owner()._parameters[slot._leaf] for slot in self.slots]  # type: ignore[misc, union-attr]
        return [slot.tensor() for slot in self.slots]

    @property
    def plain(self) -> bool:
        """Whether every slot is a module's own parameter, whole."""
        return self._direct and not self._cut and not self.flat

    def refresh(self) -> Parameters:
        """Names, shapes and dtypes as they are now: the same object until one of them, or a device, changes."""
        tensors: Any = self.tensors()
        columns = []
        if set(map(type, tensors)) <= PLAIN and not self._cut:
            columns = [list(map(attribute, tensors)) for attribute in FACTS]
            if columns == self._columns and self.slots is self._listed:
                return self.parameters
        self._columns = columns
        self.lost = any(tensor is None for tensor in tensors)
        for slot, t in zip(self.slots, tensors, strict=True):
            if t is not None:
                slot.place = (*slot.extent(t), t.dtype, t.device)
        layout = [slot.place for slot in self.slots]
        if layout != self._layout or self.slots is not self._listed:
            self._layout, self._listed = layout, self.slots
            self.parameters = Parameters(
                tuple(slot.name for slot in self.slots),
                tuple(() if at is None else tuple(at[0]) for at in layout),
                tuple("" if at is None else str(at[2]).removeprefix("torch.") for at in layout),
                tuple("" if at is None else at[1] for at in layout) if any(at and at[1] for at in layout) else (),
            )
        return self.parameters

    def _same_contents(self) -> bool:
        """Whether every module has what it had at the last scan, under the same names; asked of all in a few calls."""
        return self._contents is not None and self._contents == contents([ref() for ref in self._modules])

    def _note_contents(self) -> None:
        """Remember what the modules have, where that alone says which parameters there are."""
        modules = [m for part in self.target().values() if isinstance(part, nn.Module) for m in part.modules()]
        whole = self._direct and self._named and not self.flat and not self._cut and not self.ignored
        self._modules = list(map(weakref.ref, modules)) if whole else []
        self._contents = contents(modules) if whole else None

    def rescan(self, *, sure: bool = True) -> bool:
        """Look for parameters that came, went or were renamed; True when any did. Slots that stay keep their hooks.

        Not `sure`: a look at the modules' contents comes first, and often says that nothing did.
        """
        if not sure and self._same_contents():
            return False
        self.cache.seen = None
        old = {slot.name: slot for slot in self.slots}
        fresh: list[Slot] = []
        by_id: dict[int, str] = {}
        self.aliases, flat, plain = {}, False, set[Slot]()
        for key, part in self.target().items():
            shards, slices = sharding.shards(part), sharding.flat_slices(part)
            for name, owner, leaf, shown in locate(part, key):
                shard, flat_slice = shards.get((id(owner), leaf)), slices.get((id(owner), leaf))
                tensor = shown if shard is None else shard.sharded_param
                if flat_slice is not None:
                    tensor = flat_slice.tensor()
                if id(tensor) in by_id:
                    self.aliases[name] = by_id[id(tensor)]
                elif self._chosen(name, tensor):
                    by_id[id(tensor)] = name
                    slot = old.get(name)
                    same = slot is not None and slot._leaf == leaf and (owner is None or slot._owner == weakref.ref(owner))
                    fresh.append(slot if slot is not None and same else Slot(name, owner, leaf, tensor))
                    fresh[-1].follow(shard)
                    fresh[-1].flat_slice = flat_slice
                    flat |= sharding.flat(tensor)
                    if shard is None and not hasattr(tensor, "placements"):
                        plain.add(fresh[-1])
        self.ignored = frozenset(plain if any(slot._shard is not None for slot in fresh) else ())
        self._direct = all(slot.direct for slot in fresh)
        self.flat, self._cut = flat, any(slot.flat_slice is not None for slot in fresh)
        changed = [id(slot) for slot in fresh] != [id(slot) for slot in self.slots]
        if changed:
            kept = {id(slot) for slot in fresh}
            for slot in self.slots:
                if id(slot) not in kept:
                    slot.detach()
            self.slots, self.rows = fresh, {slot: row for row, slot in enumerate(fresh)}
        self._note_contents()
        return changed

    def alive(self) -> bool:
        """Whether any part of the target still exists."""
        return bool(self.target())

    def unhooked(self) -> list[int]:
        """The slots whose parameter requires a gradient and lacks our hooks."""
        return [
            i
            for i, (slot, t) in enumerate(zip(self.slots, self.tensors(), strict=True))
            if t is not None
            and (slot.hooked != id(t) or slot._hooks() is None)  # `slot.is_hooked`, a call less
            and t.requires_grad
            and t.is_leaf
        ]

    def hook_all(self, make: Callable[[Slot], tuple[Callable | None, Callable]]) -> list[int]:
        """Put hooks where they are missing; `make(slot)` gives the two. Returns the slots that were newly hooked."""
        missing = self.unhooked()
        for i in missing:
            slot = self.slots[i]
            tensor = slot.tensor()
            if tensor is None or (not slot.hooked and slot.attach_again(tensor)):
                continue
            if not isinstance(tensor, UninitializedTensorMixin):
                slot.detach()
                slot.attach(tensor, *make(slot))
        return missing

    def registered(
        self, owner: nn.Module, leaf: str, tensor: Any, make: Callable[[Slot], tuple[Callable | None, Callable]]
    ) -> None:
        """This tensor is about to take the place of another: it gets its hooks at once, before any backward."""
        if not isinstance(tensor, Tensor) or isinstance(tensor, UninitializedTensorMixin):
            return
        for slot in self.slots:
            if slot.is_at(owner, leaf) and tensor.requires_grad and tensor.is_leaf:
                slot.detach()
                slot.attach(tensor, *make(slot))

    def unhook_all(self) -> None:
        """Take every hook off."""
        for slot in self.slots:
            if slot.hooked:
                slot.detach()


def _untrainable(found: Mapping[str, Tensor]) -> str:
    if not found:
        return "this model has no parameters at all, so there is no partial derivative to watch"
    few = ", ".join(list(found)[:3])
    return (
        f"none of the {len(found)} parameters ({few}{', ...' if len(found) > 3 else ''}) requires a gradient, so backward() "
        "computes no partials; call requires_grad_(True) on those you train, before watch()"
    )
