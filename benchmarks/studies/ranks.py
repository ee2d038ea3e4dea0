"""Trainings of two ranks under DistributedDataParallel (gloo): two processes each, and the first one's lens counts."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import distributed, nn

import gradlens
from studies.base import STUDIES, Study, Training, _seed
from studies.mistakes import MISTAKES, Change
from studies.parts import assembled
from studies.recipes import RECIPES

RANKS = 2
#: Training, and the mistake that it is made with; none: it is well.
TABLE = (
    ("digits_mlp", ""),
    ("digits_cnn_batchnorm", ""),
    ("wine_mlp", ""),
    ("patches_groupnorm", ""),
    ("sums_transformer", ""),
    ("digits_vit", "softmax_before_cross_entropy"),
    ("digits_mlp", "rate_too_large"),
    ("digits_tanh", "never_zeroed"),
    ("digits_cnn", "schedule_stepped_for_each_batch"),
    ("wine_mlp", "head_replaced_after_the_optimizer"),
    ("patches_groupnorm", "clipped_before_unscale"),
    ("friedman_mlp", "rate_too_small"),
    ("majorities_transformer", "left_in_evaluation_mode"),
)


def _change(mistake: str) -> tuple[Change | None, str, tuple[str, ...]]:
    found = next((m for m in MISTAKES if m.name == mistake), None)
    return (None, "DDP", ()) if found is None else (found.change, found.kind, found.rules)


def training(recipe: str, mistake: str) -> Training:
    """Of one rank, whose process group is there."""
    parts = RECIPES[recipe].make()
    change, _, _ = _change(mistake)
    if change is not None:
        change(parts)
    parts.model = nn.parallel.DistributedDataParallel(parts.model)
    return assembled(parts)


def apart(study: Study, steps: int, seed: int) -> tuple[Any, ...]:
    """Findings, diagnosis and losses of the first rank, from processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        given = [sys.executable, __file__, study.name, str(steps), str(seed), folder]
        ranks = [subprocess.Popen([*given, str(rank)], stderr=subprocess.DEVNULL) for rank in range(RANKS)]
        for rank in ranks:
            rank.wait(timeout=300)
        return pickle.loads((Path(folder) / "found").read_bytes())  # type: ignore[no-any-return]


def main(name: str, steps: str, seed: str, folder: str, rank: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=RANKS)
    torch.manual_seed(int(seed))
    _seed[0] = RANKS * int(seed) + int(rank)
    recipe, _, mistake = name.removeprefix("ddp_").partition("__")
    made = training(recipe, mistake)
    with gradlens.watch(made.model, made.optimizers, **made.options) as lens:
        losses = [float(made.step(k)) for k in range(int(steps))]
    if rank == "0":
        (Path(folder) / "found").write_bytes(pickle.dumps((lens.findings(), lens.diagnosis(), losses)))
    distributed.destroy_process_group()


for _recipe, _mistake in TABLE:
    _, _kind, _rules = _change(_mistake)
    _name = f"ddp_{_recipe}" + (f"__{_mistake}" if _mistake else "")
    _steps = RECIPES[_recipe].steps
    STUDIES.append(Study(_name, lambda: None, _rules, 10_000, _kind, RECIPES[_recipe].half, _steps))  # type: ignore[arg-type,return-value]

if __name__ == "__main__":
    main(*sys.argv[1:])
