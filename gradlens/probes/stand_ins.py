"""Copies of all tensors that some modules hold, which stand in their places while a loss is evaluated.

Where a tensor is met twice, the same copy stands for it. A copy that was written into is copied again from the live tensor
before the next evaluation: its version counter says so, and, for writes through `.data` that no counter sees, a comparison
after the first evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from gradlens.errors import ProbeError
from gradlens.probes.untouched import ModuleState

Cast = Callable[[Tensor], Tensor]
CHUNK = 1 << 18  #: entries that are compared at once
SMALL, ALL_SMALL = 1 << 20, 1 << 24  #: bytes of a tensor in a closure, and of all of them, that are kept to be put back


class StandIns:
    """The places of all tensors of the modules, and what stands there during an evaluation.

    `weights`: by identity, which of the caller's weights stands for a parameter; `live`: those parameters, in that order.
    `plain`: tensors that are given to the loss by name. `outside`: tensors that it reaches by itself, which stay where they
    are and are written back.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        state: ModuleState,
        weights: Mapping[int, int],
        live: Sequence[Tensor],
        plain: Mapping[str, Tensor],
        outside: Mapping[str, Tensor],
        cast: Cast,
    ) -> None:
        self._cast = cast
        self._weights, self._live = weights, live
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: the live tensor, and its copy
        self._places: list[tuple[Any, Any, Tensor]] = []  # container, key, and the live tensor there
        self._tuples: list[tuple[Any, Any, tuple, tuple]] = []  # container, key, a tuple that holds tensors, and its like
        self._plain = dict(plain)
        self._current: Sequence[Tensor] = ()
        parameters = {id(module._parameters) for module in modules}
        inert = {id(module._modules) for module in modules}
        for container in state.mutable():
            if id(container) not in inert and not isinstance(container, set):
                self._visit(container, id(container) in parameters)
        for tensor in plain.values():
            self._copy(tensor)
        self._in_dicts = [place for place in self._places if isinstance(place[0], dict)]
        self._in_lists = [place for place in self._places if not isinstance(place[0], dict)]
        self._of_weights = [(c, key, weights[id(t)]) for c, key, t in self._places if id(t) in weights]
        self._complex = {i for i, tensor in enumerate(live) if tensor.is_complex()}
        self._of_copies = [(c, key, self._copies[id(t)][1]) for c, key, t in self._places if id(t) not in weights]
        self._versions: dict[int, int] = {}
        self._weight_versions: list[int] = []
        self._always: set[int] = set()  # what is written into past the counters
        self._restored: set[int] = set()  # weights that the forward writes into
        self._first = True
        self._born: list[tuple[Tensor, int]] = []
        self._outside = _Outside(outside, {id(t) for t, _ in self._copies.values()} | set(weights))

    @classmethod
    def none(cls) -> Self:
        """Of no modules."""
        return cls((), ModuleState(()), {}, (), {}, {}, lambda tensor: tensor)

    # --- building -----------------------------------------------------------------------------------------------------

    def _visit(self, container: Any, parameters: bool) -> None:
        for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
            if isinstance(value, Tensor) and (parameters or not isinstance(value, nn.Parameter)):
                if id(value) in self._weights or self._copy(value):
                    self._places.append((container, key, value))
            elif type(value) is tuple:
                like = self._like(value)
                if like is not value:
                    self._tuples.append((container, key, value, like))

    def _like(self, value: tuple) -> tuple:
        """A tuple with copies in the places of tensors; itself where it has none."""
        items = tuple(
            self._copies[id(item)][1]
            if isinstance(item, Tensor) and not isinstance(item, nn.Parameter) and self._copy(item)
            else self._like(item)
            if type(item) is tuple
            else item
            for item in value
        )
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items

    def _copy(self, tensor: Tensor) -> bool:
        """Make sure that there is a copy, where there can be one."""
        if id(tensor) in self._weights:
            return True
        if id(tensor) not in self._copies:
            if tensor.is_meta or hasattr(tensor, "to_local"):
                return False
            made = self._cast(tensor.detach())
            made = made.clone() if made.dtype == tensor.dtype else made  # a cast has copied it already
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            else:
                made.requires_grad_(tensor.requires_grad and tensor.is_leaf)
            self._copies[id(tensor)] = tensor, made
        return True

    # --- an evaluation ------------------------------------------------------------------------------------------------

    def swap_in(self, weights: Sequence[Tensor]) -> None:
        """Put the copies into the modules, and the caller's weights."""
        self._current = (
            [torch.view_as_complex(w) if i in self._complex else w for i, w in enumerate(weights)]
            if self._complex
            else weights
        )
        self._versions = {key: copy._version for key, (_, copy) in self._copies.items()} if self._copies else {}
        self._weight_versions = [w._version for w in weights]
        kept = range(len(weights)) if self._first and not self._at_live(weights) else self._restored
        self._backup = {i: weights[i].detach().clone() for i in kept}
        for container, key, i in self._of_weights:
            container[key] = self._current[i]
        for container, key, copy in self._of_copies:
            container[key] = copy
        for container, key, _, like in self._tuples:
            container[key] = like

    def born(self, weights: Sequence[Tensor]) -> None:
        """These are the weights while they have the live ones' entries: what is written into them shows by a comparison."""
        self._born = [(w, w._version) for w in weights]

    def _at_live(self, weights: Sequence[Tensor]) -> bool:
        return all(w is born and w._version == version for w, (born, version) in zip(weights, self._born, strict=True))

    def plain(self) -> dict[str, Tensor]:
        """What stands for the tensors that are given by name."""
        return {name: self._standing(tensor) for name, tensor in self._plain.items()}

    def _standing(self, tensor: Tensor) -> Tensor:
        i = self._weights.get(id(tensor))
        return self._copies[id(tensor)][1] if i is None else self._current[i]

    def swap_out(self) -> None:
        """Put the live tensors back; any number of times."""
        for container, key, tensor in self._in_dicts:
            container[key] = tensor
        for container, key, tensor in self._in_lists:
            if key < len(container):
                container[key] = tensor
        for container, key, value, _ in self._tuples:
            if isinstance(container, dict) or key < len(container):
                container[key] = value
        self._current = ()
        self._outside.put_back()

    def renew(self, weights: Sequence[Tensor], whole: bool = True) -> list[str]:
        """Undo what the evaluation wrote into the copies. Returns the names of what could not be put back.

        `whole` says that it was an evaluation: what the first one writes into past the counters is looked for.
        """
        for key, (tensor, copy) in self._copies.items():
            if whole and self._first and key not in self._always and not _same_entries(copy, tensor.detach()):
                if copy._version == self._versions.get(key):
                    self._always.add(key)
            elif key not in self._always and copy._version == self._versions.get(key, copy._version):
                continue
            with torch.no_grad():
                copy.detach().copy_(tensor.detach())
            copy.grad = None
        self._renew_weights(weights, whole)
        self._first, self._backup = self._first and not whole, {}
        return self._outside.lost()

    def _renew_weights(self, weights: Sequence[Tensor], whole: bool) -> None:
        for i, w in enumerate(weights):
            w.grad = None
            written = w._version != self._weight_versions[i]
            if i in self._restored:
                with torch.no_grad():
                    w.copy_(self._backup[i])
            elif self._first and (written or (whole and not _same_entries(w, self._backup.get(i, self._as_real(i))))):
                self._restored.add(i)
                with torch.no_grad():
                    w.copy_(self._backup.get(i, self._as_real(i)))
            elif written:
                raise ProbeError(
                    "loss_fn changes weights of the model in place at some calls and not at others: no two of its values "
                    "can be compared; let it write into copies, or at each call"
                )

    def _as_real(self, i: int) -> Tensor:
        live = self._live[i].detach()
        return torch.view_as_real(live.resolve_conj()) if live.is_complex() else live


def _same_entries(copy: Tensor, live: Tensor) -> bool:
    """Whether a copy, which may be wider, still holds the live entries; no whole one is made of them."""
    if copy.dtype == live.dtype or copy.numel() <= CHUNK:
        return _same(copy, live.to(copy.dtype))
    wide, narrow = copy.detach().reshape(-1), live.reshape(-1)
    return all(_same(a, b.to(a.dtype)) for a, b in zip(wide.split(CHUNK), narrow.split(CHUNK), strict=True))


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for the signs of NaN; False where that cannot be said."""
    try:
        a, b = a.detach(), b.detach()
        return bool(torch.equal(a, b)) or bool(torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a != a, b != b))
    except (RuntimeError, TypeError):
        return False


class _Outside:
    """Tensors in closures: they stay themselves. The small ones are put back if they were written into."""

    def __init__(self, tensors: Mapping[str, Tensor], known: set[int]) -> None:
        self._kept: list[tuple[Tensor, Tensor, int]] = []
        self._watched: list[tuple[str, Tensor, int]] = []
        total = 0
        for name, tensor in tensors.items():
            if id(tensor) in known or tensor.is_meta or tensor.is_inference() or hasattr(tensor, "to_local"):
                continue
            size = tensor.numel() * tensor.element_size()
            if tensor.layout == torch.strided and size <= SMALL and total + size <= ALL_SMALL:
                self._kept.append((tensor, tensor.detach().clone(), tensor._version))
                total += size
            else:
                self._watched.append((name, tensor, tensor._version))

    def put_back(self) -> None:
        for i, (tensor, content, version) in enumerate(self._kept):
            if tensor._version != version:
                with torch.no_grad():
                    tensor.detach().copy_(content)
                self._kept[i] = tensor, content, tensor._version

    def lost(self) -> list[str]:
        """The names of those that changed and cannot be put back; each is named once."""
        names = [name for name, tensor, version in self._watched if tensor._version != version]
        self._watched = [(name, tensor, version) for name, tensor, version in self._watched if tensor._version == version]
        return names
