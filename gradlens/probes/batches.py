"""Batches as a user gives them: how large each is, how many there are, and what passing over them must not disturb."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.progress import tracked


def counted(batches: Iterable[Any], told: str, progress: bool | None) -> Iterator[tuple[Any, int | None]]:
    """Each batch with its size, None where batches say none; an error for one that is empty or does not fit the others."""
    known = True
    for k, batch in enumerate(tracked(batches, told, length(batches), progress)):
        size = batch_size(batch)
        if size == 0:
            raise ArgumentError(f"batch {k} is empty: its tensors have no examples (drop_last=True leaves out a rest)")
        known = known if k else size is not None
        if known != (size is not None):
            one, other = (k, 0) if known else (0, k)
            raise ArgumentError(
                f"batch {one} does not say how large it is, and batch {other} does (the first dimension of its first "
                f"tensor), so they cannot be weighted; give batches of one kind"
            )
        yield batch, size


def check_batches(batches: object) -> None:
    """Raise for what cannot be passed over as batches."""
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping | str | bytes):
        raise ArgumentTypeError(
            f"batches are a DataLoader, a list of batches, or any iterable of them, not {type(batches).__name__}; for "
            f"one batch that would be [batch]"
        )


def batch_size(batch: Any) -> int | None:
    """The first dimension of the first tensor in a batch that has entries; None where no tensor has a first dimension."""
    if isinstance(batch, Tensor | np.ndarray):
        return int(batch.shape[0]) if batch.ndim else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        sizes = [size for size in map(batch_size, batch) if size is not None]
        return next((size for size in sizes if size), 0 if sizes else None)
    return None


def length(batches: Any) -> int | None:
    """How many batches there are, where they say."""
    try:
        return len(batches)
    except TypeError:
        return None


def generators(batches: Any) -> list[torch.Generator]:
    """The generators of a DataLoader, from which passing over it draws."""
    owners = [batches, *(getattr(batches, name, None) for name in ("sampler", "batch_sampler"))]
    found = [getattr(owner, "generator", None) for owner in owners]
    return [generator for generator in found if isinstance(generator, torch.Generator)]
