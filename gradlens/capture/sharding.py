"""What a rank holds of a parameter, and where FSDP2 keeps it.

A distributed tensor (DTensor) says by its placements which entries of the whole are here. Between forward and backward
FSDP2 lets the module show the *whole*, gathered parameter instead of the shard, which is another tensor, with other hooks
and no averaged gradient: so the shard is looked up in FSDP2's own records, not in the module. No collective is called.
"""

from __future__ import annotations

import functools
import math
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


def _groups(state: Any) -> list[Any]:
    """The parameter groups of a state: several since torch 2.11 or so, one or none before."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [group for group in ([state._fsdp_param_group] if groups is None else groups) if group is not None]


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
