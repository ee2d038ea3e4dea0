"""The process group, as far as gradlens asks it: numbers, and its key-value store. No collective is called.

The store is a small server of the first process, through which the ranks have met. What is asked of it here never waits for
another rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as distributed

_AVAILABLE = distributed.is_available()
_named: Counter[str] = Counter()


def count() -> int:
    """How many processes train together; 1 without a process group."""
    return distributed.get_world_size() if _AVAILABLE and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return distributed.get_rank() if _AVAILABLE and distributed.is_initialized() else 0


def store(name: str) -> Callable[[], Any] | None:
    """Connects to a part of the group's store for this name; None where the store would grow without bound.

    The n-th call with a name gives the same part on every rank, and never one that was given before. Connecting waits for
    the store's server, so it is for another thread than the one that trains.
    """
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    _named[name] += 1
    prefix, given = f"gradlens/{name}/{_named[name]}", _get_default_store()
    kind = given
    while isinstance(kind, PrefixStore):
        kind = kind.underlying_store
    if type(kind).__name__ == "FileStore":
        return None  # it keeps every value that was ever set
    return lambda: PrefixStore(prefix, given.clone() if hasattr(given, "clone") else given)
