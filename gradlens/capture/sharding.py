"""What a rank holds of a parameter, and where FSDP keeps it.

A distributed tensor (DTensor) says by its placements which entries of the whole are here. Between forward and backward
FSDP2 lets the module show the *whole*, gathered parameter instead of the shard, which is another tensor, with other hooks
and no averaged gradient: so the shard is looked up in FSDP2's own records, not in the module. FSDP1 flattens parameters into
one and cuts that: an original parameter is a slice of its own flattened whole. No collective is called.
"""

from __future__ import annotations

import functools
import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradlens.records import PARTIAL


def shards(part: nn.Module | Tensor) -> dict[tuple[int, str], Any]:
    """FSDP2's record of each parameter that it shards, by the owner's id and the parameter's name there."""
    if not isinstance(part, nn.Module):
        return {}
    result = {}
    for module in part.modules():
        get_state = getattr(module, "_get_fsdp_state", None)
        for group in _groups(get_state()) if callable(get_state) else ():
            for record in group.fsdp_params:
                info = record._module_info
                places = [(info.module, info.param_name)]
                places += zip(info.shared_modules, info.shared_param_names, strict=True)
                result.update({(id(owner), leaf): record for owner, leaf in places})
    return result


@dataclass(frozen=True)
class FlatSlice:
    """What this rank has of an original parameter under FSDP1: entries `start` to `stop` of the flattened whole."""

    shape: tuple[int, ...]  #: of the whole
    start: int
    stop: int
    handle: weakref.ref[Any]  #: FSDP1's record of the flat parameter
    number: int  #: among the parameters that were flattened together

    def tensor(self) -> Tensor | None:
        """The parameter: between forward and backward the module shows a view of the gathered whole in its place."""
        handle = self.handle()
        return None if handle is None else handle.flat_param._params[self.number]

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def piece(self) -> str:
        """As `Parameters.pieces` wants it."""
        return "" if len(self) == math.prod(self.shape) else f"@{self.start}:{self.stop}"

    def gradient(self) -> Tensor | None:
        """The part of `.grad` that belongs to what is here: under `no_sync` FSDP1 keeps the gradient of the whole there."""
        tensor = self.tensor()
        gradient = None if tensor is None else tensor.grad
        if gradient is None or gradient.numel() == tensor.numel():  # type: ignore[union-attr]
            return gradient
        return gradient.reshape(-1)[self.start : self.stop]

    def averaged(self) -> bool:
        """Whether `.grad` is of all ranks, as far as its shape says: FSDP1 flattens and cuts it when it averages it."""
        tensor, handle = self.tensor(), self.handle()
        if tensor is None or handle is None or not handle.uses_sharded_strategy:
            return False
        return tensor.grad is None or tuple(tensor.grad.shape) == (len(self),)


def flat_slices(part: nn.Module | Tensor) -> dict[tuple[int, str], FlatSlice]:
    """What FSDP1 keeps of each original parameter here, by the owner's id and the parameter's name there."""
    result: dict[tuple[int, str], FlatSlice] = {}
    for module in part.modules() if isinstance(part, nn.Module) else ():
        handle: Any = getattr(module, "_handle", None)
        if not getattr(handle, "_use_orig_params", False):
            continue
        whole = handle.flat_param
        for i, (info, shape) in enumerate(zip(whole._param_infos, whole._shapes, strict=True)):
            start, stop = _ends(whole._shard_param_infos[i]) if handle.uses_sharded_strategy else (0, math.prod(shape))
            result[id(info.module), info.param_name] = FlatSlice(tuple(shape), start, stop, weakref.ref(handle), i)
        for tied in whole._shared_param_infos:
            result[id(tied.module), tied.param_name] = result[id(tied.prim_module), tied.prim_param_name]
    return result


def _ends(shard: Any) -> tuple[int, int]:
    return (shard.intra_param_start_idx, shard.intra_param_end_idx + 1) if shard.in_shard else (0, 0)


def _groups(state: Any) -> list[Any]:
    """The parameter groups of a state: several since torch 2.11 or so, one or none before."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [group for group in ([state._fsdp_param_group] if groups is None else groups) if group is not None]


def flat(tensor: Any) -> bool:
    """Whether it is what FSDP1 makes of several parameters, where it does not show the original ones."""
    return hasattr(tensor, "_fqns") and hasattr(tensor, "_unpadded_unsharded_size")


def extent(tensor: Any) -> tuple[tuple[int, ...], str]:
    """The shape of the whole, and which entries of it are here, as `Parameters.pieces` wants it.

    A flat parameter is now the whole, now this rank's part, which is padded: no block of the whole is said to be here.
    """
    if not flat(tensor):
        return tuple(tensor.shape), piece(tensor)
    whole, here = tensor._unpadded_unsharded_size, tensor._sharded_size
    return tuple(whole), "" if whole == here else f"~{here.numel()}"


def summand(tensor: Tensor | None) -> bool:
    """Whether what is here has to be added to what other ranks have."""
    return any(placement.is_partial() for placement in getattr(tensor, "placements", ()))


def piece(tensor: Tensor) -> str:
    """Which entries of the whole are here, as `Parameters.pieces` wants it; `""` where all are."""
    placements = getattr(tensor, "placements", ())
    if all(placement.is_replicate() for placement in placements):
        return ""
    if summand(tensor):
        return PARTIAL
    return _block(tuple(tensor.shape), tensor.device_mesh, tuple(placements))  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1 << 14)
def _block(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> str:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    with torch.device("cpu"):  # torch finds offsets with small tensors, on the user's default device
        sizes, starts = compute_local_shape_and_global_offset(shape, mesh, placements)
    if tuple(sizes) == shape:
        return ""
    scattered = _scattered(mesh, placements)
    blocks = enumerate(zip(starts, sizes, strict=True))
    return ",".join(f"~{size}" if axis in scattered else f"{start}:{start + size}" for axis, (start, size) in blocks)


def _scattered(mesh: Any, placements: tuple[Any, ...]) -> set[int]:
    """The axes along which the entries here are not next to each other.

    FSDP2 shards anew what tensor parallel has sharded: it says so by a split factor, the number of pieces there were. The
    result is a block where all of those pieces are told apart by placements that follow.
    """
    result = set()
    for i, placement in enumerate(placements):
        factor = getattr(placement, "split_factor", 1)
        axis = getattr(placement, "dim", None)
        later = [mesh.size(j) for j in range(i + 1, len(placements)) if getattr(placements[j], "dim", None) == axis]
        if axis is not None and factor not in (1, math.prod(later)):
            result.add(axis)
    return result
