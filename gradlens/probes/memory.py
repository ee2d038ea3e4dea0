"""What a probe needs is said before it starts: bytes beside the model, and what they are for.

    needs = sum over the parameters of (copies in the probe's precision) + arrays for each weight

Not counted is what one forward and backward of the loss take by themselves (activations), since a probe cannot know it, nor
freed blocks that the C library keeps (a third more was seen). What is stated is an upper bound of what is in use at once:
tests measure the peak of each probe against it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gradlens.errors import ArgumentError

MUCH = 2**30  #: bytes from which on a probe says what it needs, also where no progress bar is shown


@dataclass(frozen=True)
class Need:
    """Memory of one kind."""

    bytes: int
    what: str

    def __str__(self) -> str:
        return f"{self.bytes / 2**20:,.1f} MiB for {self.what}"


def stored(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors as they are stored."""
    return sum(t.numel() * t.element_size() for t in tensors)


def in_float64(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors in float64; complex ones take two, integers stay what they are."""
    return sum(t.numel() * (16 if t.is_complex() else 8 if t.is_floating_point() else t.element_size()) for t in tensors)


def compact_numel(weights: Sequence[Tensor], owners: Sequence[nn.Module | None]) -> tuple[int, int]:
    """How many entries vectors have, those of tables with sparse gradients left out, and the most of one parameter."""
    pairs = zip(weights, owners, strict=True)
    sizes = [w.numel() * (2 if w.is_complex() else 1) for w, owner in pairs if not getattr(owner, "sparse", False)]
    return sum(sizes), max(sizes, default=0)


def state_memory(
    probe: str, host: Sequence[Need], here: Sequence[Need], weights: Sequence[Tensor], less: str, progress: bool | None
) -> None:
    """Say what a probe needs before it starts, where a bar is shown or it is much; an error where the machine has less.

    `host` is on the host in any case, `here` where the weights are; `less` is what to do about it.
    """
    needs = ", and ".join(str(need) for need in (*host, *here))
    on_host = sum(need.bytes for need in host)
    if all(w.device.type == "cpu" for w in weights):
        on_host += sum(need.bytes for need in here)
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else float("inf")
    if on_host > have:
        raise ArgumentError(f"{probe} needs {needs}, and this machine has {have / 2**20:,.1f} MiB; {less}")
    everything = sum(need.bytes for need in (*host, *here))
    if sys.stderr.isatty() or everything >= MUCH if progress is None else progress:
        print(f"gradlens: {probe} needs {needs}", file=sys.stderr)
