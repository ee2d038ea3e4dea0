"""What a rank holds of a parameter, and where FSDP2 keeps it.

A distributed tensor (DTensor) says by its placements which entries of the whole are here. Between forward and backward
FSDP2 lets the module show the *whole*, gathered parameter instead of the shard, which is another tensor, with other hooks
and no averaged gradient: so the shard is looked up in FSDP2's own records, not in the module. No collective is called.
"""

from __future__ import annotations

from typing import Any

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
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if tuple(shape) == tuple(tensor.shape):
        return ""
    return ",".join(f"{start}:{start + size}" for start, size in zip(offset, shape, strict=True))
