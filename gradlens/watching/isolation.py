"""Our own computing kept apart from the user's: no graph, no autocast, no modes; and whether computing is possible now."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from gradlens import _torch


def isolated_compute() -> contextlib.AbstractContextManager[None]:
    """No graph, no autocast, no user's modes: what is computed here is ours alone.

    To leave `torch.autocast` clears a cache, which lets other threads have the interpreter: some microseconds each time, far
    more beside a busy thread. So it is entered only where the user has.
    """
    if torch.is_autocast_enabled("cpu") or torch.cuda.is_initialized():
        return _isolated()
    return _without_modes() if _torch.modes_are_active() else torch.no_grad()


@contextlib.contextmanager
def _without_modes() -> Iterator[None]:
    with torch.no_grad(), _torch.disable_current_modes():
        yield


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    with torch.no_grad(), _torch.disable_current_modes(), torch.autocast("cpu", enabled=False):
        if torch.cuda.is_initialized():
            with torch.autocast("cuda", enabled=False):
                yield
        else:
            yield


def capturing_cuda_graph() -> bool:
    """Whether a CUDA graph is being captured: what is launched now would run at each replay, and hooks never again."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
