"""What a lens writes by itself: the run directory, and TensorBoard in it, which the first rank draws for all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from gradlens import findings
from gradlens.capture.attachment import Attachment
from gradlens.records import Finding
from gradlens.statistics.memory import Plan
from gradlens.watching import process_group
from gradlens.watching.settings import LensSettings
from gradlens.writers.background import Background
from gradlens.writers.base import Writer
from gradlens.writers.exchange import PARTING, PATIENCE, Pooled, Sender


def run_writers(settings: LensSettings, attachment: Attachment, plan: Plan, tell: Callable[[Finding], None]) -> list[Writer]:
    """The durable store first, then what is drawn; nothing where there is no run directory."""
    if settings.run is None:
        return []
    from gradlens.store.store import Store
    from gradlens.writers.tensorboard import TensorBoard

    run, rank, together = settings.run, process_group.rank(), process_group.count()
    resumed = run.is_dir() and any(run.glob("events.out.tfevents.*"))
    shared = process_group.store(run.name) if together > 1 else None
    store = Store(run, described(settings, attachment, plan))
    try:
        if rank:
            return [store] if shared is None else [store, Background(Sender(shared, rank, together), patience=PARTING)]
        board = TensorBoard(run, purge_step=settings.first_step if resumed else None)
        if shared is not None:
            return [store, Background(Pooled(board, shared, together), patience=2 * PARTING + PATIENCE)]
        if together > 1:
            tell(findings.ranks_apart(settings.first_step))
        return [store, board]
    except BaseException:
        store.close()
        raise


def described(settings: LensSettings, attachment: Attachment, plan: Plan) -> dict[str, Any]:
    """What a run directory says of how it was made."""
    return {
        "command": list(sys.argv),
        "optimizers": [_described(optimizer) for optimizer in settings.optimizers],
        "stages": sorted(settings.stages),
        "features": sorted(settings.possible),
        "schedule": repr(settings.schedule),
        "first_step": settings.first_step,
        "sampled": plan.share,
        "torch": torch.__version__,
        "rank": process_group.rank(),
        "ranks": process_group.count(),
        "aliases": dict(attachment.aliases),
    }


def _described(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its type and its numbers by group, as they are now; not its parameters."""
    plain = (bool, int, float, str, tuple, list)
    groups = [
        {name: value for name, value in group.items() if name != "params" and isinstance(value, plain)}
        for group in optimizer.param_groups
    ]
    return {"type": type(optimizer).__name__, "groups": groups}
