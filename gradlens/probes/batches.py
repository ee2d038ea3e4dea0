"""Batches as a user gives them: how large each is, how many there are, and what passing over them must not disturb."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradlens.errors import ArgumentError, ArgumentTypeError, GradlensError
from gradlens.progress import tracked

Sizes = Callable[[Any], float] | Sequence[float] | None  #: how many examples a batch has: asked of it, or listed


def counted(
    batches: Iterable[Any], told: str, progress: bool | None, sizes: Sizes = None
) -> Iterator[tuple[Any, float | None]]:
    """Each batch with its size, None where batches say none; an error for one that is empty or does not fit the others."""
    size_of = _sizer(sizes)
    known = True
    for k, batch in enumerate(tracked(batches, told, length(batches), progress)):
        size = size_of(k, batch)
        if size == 0:
            raise ArgumentError(f"batch {k} is empty: its tensors have no examples (drop_last=True leaves out a rest)")
        known = known if k else size is not None
        if known != (size is not None):
            one, other = (k, 0) if known else (0, k)
            raise ArgumentError(
                f"batch {one} does not say how large it is, and batch {other} does (the first dimension of its first "
                f"tensor), so they cannot be weighted; give batches of one kind, or sizes="
            )
        yield batch, size


def _sizer(sizes: Sizes) -> Callable[[int, Any], float | None]:
    """The size of the k-th batch."""
    if sizes is None:
        return lambda k, batch: batch_size(batch)
    if callable(sizes):
        return lambda k, batch: _checked(k, sizes(batch))
    listed = sizes.tolist() if hasattr(sizes, "tolist") else sizes
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise ArgumentTypeError(
            f"sizes is a function of a batch, such as lambda batch: batch[0].shape[1], or a number for each batch, not "
            f"{sizes!r}"
        )

    def of(k: int, batch: Any) -> float:
        if k >= len(listed):
            raise ArgumentError(f"sizes has {len(listed)} numbers, and there are more batches")
        return _checked(k, listed[k])

    return of


def _checked(k: int, size: Any) -> float:
    number = size.item() if hasattr(size, "item") else size
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < float("inf"):
        raise ArgumentError(f"the size of batch {k} is how many examples it has, a number above 0, not {size!r}")
    return number


def check_batches(batches: object) -> None:
    """Raise for what cannot be passed over as batches, and for one batch in their place."""
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping | str | bytes):
        raise ArgumentTypeError(
            f"batches are a DataLoader, a list of batches, or any iterable of them, not {type(batches).__name__}; for "
            f"one batch that would be [batch]"
        )
    if isinstance(batches, Tensor | np.ndarray):
        raise ArgumentTypeError(
            f"batches are an iterable of batches, and this is one tensor of shape {tuple(batches.shape)}, whose rows "
            f"would be taken for batches; split it, as in x.split(32), or give [x]"
        )
    if isinstance(batches, tuple | list) and _is_one(batches):
        kinds = ", ".join(f"{tuple(part.shape)} of {part.dtype}" for part in batches[:3])
        raise ArgumentTypeError(
            f"batches looks like one batch, (x, y): its parts are tensors of different kinds ({kinds}); give a list of such "
            f"batches, or [batch] for one"
        )


def _is_one(parts: Sequence[Any]) -> bool:
    """Whether the parts are those of one batch: tensors that differ in type or in more than their first dimension."""
    if not 2 <= len(parts) <= 4 or not all(isinstance(part, Tensor | np.ndarray) for part in parts):
        return False
    return len({str(part.dtype) for part in parts}) > 1 or len({tuple(part.shape[1:]) for part in parts}) > 1


@contextmanager
def noted_if_one_batch(batches: Iterable[Any]) -> Iterator[None]:
    """Where the loss fails on a few tensors, its error gets a note: they may be the parts of one batch."""
    try:
        yield
    except Exception as error:
        few = isinstance(batches, tuple | list) and 2 <= len(batches) <= 4
        if few and not isinstance(error, GradlensError) and all(isinstance(x, Tensor | np.ndarray) for x in batches):
            error.add_note(
                "gradlens: batches is a sequence of tensors, and each of them was given to loss_fn as a batch; if they are "
                "the parts of one batch, (x, y), give [(x, y)], or a list of such pairs"
            )
        raise


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
