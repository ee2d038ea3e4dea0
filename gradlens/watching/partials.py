"""Whole partials of the parameters that `keep=` names: what the optimizer used, and the weights before its step.

    optimizer's pre hook, on steps that are due -> copies, one device's packed -> a thread of its own -> `store.partials`

Due are the steps at which the run has grown by a tenth (more, once the allowance is used up), if they are observed: about 25
for each tenfold. On other steps a comparison of two numbers is all that happens. When the disk is slower than that, a step
is left out; training does not wait.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradlens.capture.guards import Guard, guarded
from gradlens.capture.watcher import Watcher
from gradlens.errors import ArgumentError, ArgumentTypeError, nearest
from gradlens.records import Stage
from gradlens.schedules import Growing
from gradlens.selection import predicate
from gradlens.statistics.transfer import Transfer
from gradlens.store.partials import ALLOWANCE, Kept, PartialStore, width
from gradlens.store.segment import Entry
from gradlens.store.tables import Key
from gradlens.watching.failures import Failures
from gradlens.watching.isolation import capturing_cuda_graph, isolated_compute
from gradlens.watching.live_weights import LiveParameter
from gradlens.watching.settings import LensSettings

LEAST = 4  #: steps that the allowance has to hold
WAITING = 64 << 20  #: bytes that may wait for the disk
PARTING = 10.0  #: seconds in which `close()` lets them be written

_WHERE = "whole partials"


def check_keep(
    keep: str | Iterable[str] | None, parameters: Sequence[LiveParameter], run: Path | None, optimizers: Sequence
) -> set[str]:
    """The names that `keep=` means.

    Raises:
        ArgumentError: No parameter is called so, there is no run directory or optimizer, or they exceed the allowance.
        ArgumentTypeError: It is no name, pattern or list of them.
    """
    if keep is None:
        return set()
    patterns = [keep] if isinstance(keep, str) else list(keep)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentTypeError(f"keep is a name or glob pattern of parameters, or a list of them, not {keep!r}")
    if run is None:
        raise ArgumentError("keep= writes to the run directory; give run= too")
    if not optimizers:
        raise ArgumentError("keep= reads what an optimizer uses; give watch() the optimizer too")
    named = {each.name: each for each in parameters}
    for pattern in patterns:
        if not any(predicate(pattern.removeprefix("!"))(name, None) for name in named):
            raise ArgumentError(f"keep={pattern!r} fits no parameter{nearest(pattern.strip('!*'), named)}")
    test = predicate(patterns)
    chosen = [each for name, each in named.items() if test(name, each)]
    each_step = sum(each.numel(here=True) * 2 * width(each.place().dtypes[0]) for each in chosen)
    if each_step * LEAST > ALLOWANCE:
        count = sum(each.numel(here=True) for each in chosen)
        raise ArgumentError(
            f"keep= names {count:,} weights, {each_step / 2**20:,.0f} MiB a step; the "
            f"allowance is {ALLOWANCE >> 20} MiB and has to hold {LEAST} steps: name fewer or smaller parameters"
        )
    return {each.name for each in chosen}


class PartialRecorder:
    """Takes copies on the training thread, and writes them on another."""

    def __init__(
        self,
        run: Path,
        key: Key,
        names: set[str],
        parameters: Callable[[], Sequence[LiveParameter]],
        step: Callable[[], int | None],
        failures: Failures,
        guard: Guard,
    ) -> None:
        self._store, self.guard = PartialStore(run, key), guard
        self._names, self._parameters, self._step, self._failures = names, parameters, step, failures
        self._growing, self._due = Growing(), -1
        self._last = -1
        self._queue: queue.SimpleQueue[tuple[int, int, list[Entry], Transfer, int] | None] = queue.SimpleQueue()
        self._taken = self._written = 0  # bytes: each is counted by one thread
        self._error: Exception | None = None
        self._handles: list[Any] = []
        self._thread = threading.Thread(target=self._write, name="gradlens-partials", daemon=True)
        self._thread.start()

    def attach(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Look at what these optimizers use."""
        self._numbers = {id(optimizer): number for number, optimizer in enumerate(optimizers)}
        self._handles = [optimizer.register_step_pre_hook(self.step_begins) for optimizer in optimizers]

    def close(self) -> None:
        """Let go of the optimizers, and write what waits."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._queue.put(None)
        self._thread.join(PARTING)
        self._report()

    @guarded(_WHERE)
    def step_begins(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer is about to use what is kept."""
        step = self._step()
        if step is None or not self._is_due(step) or self._failures.off(_WHERE) or capturing_cuda_graph():
            return
        self._report()
        with isolated_compute():
            self._take(optimizer, step, self._numbers[id(optimizer)])

    def _is_due(self, step: int) -> bool:
        if step != self._last:
            self._last, self._growing.growth = step, self._store.growth
            if self._growing.due():
                self._due = step
        return step == self._due

    def _take(self, optimizer: torch.optim.Optimizer, step: int, number: int) -> None:
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        scale = getattr(optimizer, "grad_scale", None)
        entries: list[Entry] = []
        tensors: list[Tensor] = []
        for each in self._parameters():
            if each.name not in self._names or each.gradient is None or id(each.slot.tensor()) not in mine:
                continue
            place = each.place()
            entries.append((each.name, tuple(int(n) for n in place.shapes[0]), place.dtypes[0], place.piece(0)))
            partial = each.partials(1.0 if scale is None else scale)
            tensors += [_readable(partial), _readable(each.values())]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        waiting = self._taken - self._written
        if entries and (not waiting or waiting + size <= WAITING):
            self._taken += size
            self._queue.put((step, number, entries, Transfer(tensors), size))

    def _write(self) -> None:
        while (waiting := self._queue.get()) is not None:
            step, number, entries, transfer, size = waiting
            try:
                arrays = iter(transfer.wait())
                kept = [Kept(entry, Stage.USED.value, next(arrays), next(arrays)) for entry in entries]
                self._store.write(step, number, kept)
            except Exception as error:  # noqa: BLE001 - a full disk, say: told by the training thread
                self._error = error
            self._written += size

    def _report(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            self._failures(_WHERE, error)


def record_partials(
    settings: LensSettings,
    parameters: Callable[[], Sequence[LiveParameter]],
    watcher: Watcher,
    store: Any,
    failures: Failures,
) -> PartialRecorder | None:
    """The recorder of what `settings.keep` names, at work; None where it names nothing."""
    names = check_keep(settings.keep, parameters(), settings.run, settings.optimizers)
    if not names or settings.run is None:
        return None

    def step() -> int | None:
        return watcher.step.number if watcher.step.observed else None

    recorder = PartialRecorder(settings.run, store.key, names, parameters, step, failures, watcher.guard)
    recorder.attach(settings.optimizers)
    return recorder


def _readable(tensor: Tensor) -> Tensor:
    """Of a type that numpy has."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(torch.float32)
