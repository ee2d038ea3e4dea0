"""What the rules say of real trainings: those that are well should hear nothing, those that are ill what is wrong with them.

    python benchmarks/trainings.py [NAME ...] [--half tuned|unseen] [--seeds 0 1] [--out trainings.csv] [--page] [--jobs 2]

Every training is a hundred to four hundred steps of a small model (`studies/`), watched by the two lines. An ill one is a
healthy one with a mistake, and names the findings that say so. Thresholds may be tuned on the half `tuned`; the half
`unseen` has other models and other data, and is measured alone.

    named    the diagnosis begins with a warning or an error that says the cause
    partly   another finding stands first, or the cause is an info
    wrong    warnings, and none says the cause
    missed   no warning
    alarm    a warning on a training that is well

`trainings.csv` has a row for each training and seed: `training, half, kind, seed, result, origin, confidence, others, steps,
loss_first, loss_last, seconds, seen`. `docs/diagnosis.py` writes the tables of docs/diagnosis.md from it.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from studies import base, loops, mistakes, ranks, written
from studies.base import STUDIES, Study

import gradlens
from gradlens.records import Finding, Severity

__all__ = ["STUDIES", "Study", "base", "loops", "main", "mistakes", "ranks", "studied", "written"]

HEAD = (
    "training", "half", "kind", "seed", "result", "origin", "confidence", "others", "steps", "loss_first", "loss_last",
    "seconds", "seen",
)  # fmt: skip
STEPS = 120  #: of those that were written by hand


def studied(study: Study, steps: int, page: bool = False, seed: int = 0) -> tuple[list[Finding], list[float]]:
    """What was found, and the losses."""
    lens, losses = watched(study, steps, seed)
    if page:
        print(lens.report())
    return lens.findings(), losses


def watched(study: Study, steps: int, seed: int) -> tuple[gradlens.Lens, list[float]]:
    """The closed lens of a whole training, and the losses."""
    base._seed[0] = seed
    torch.manual_seed(seed)
    training = study.make()
    with gradlens.watch(training.model, training.optimizers, **training.options) as lens:
        base._watching[:] = [lens]
        losses = [float(training.step(k)) for k in range(steps)]
    base._watching.clear()
    return lens, losses


def outcome(study: Study, seed: int) -> tuple[list[Finding], gradlens.Diagnosis, list[float]]:
    """Findings, diagnosis and losses; of several ranks from processes of their own."""
    if study.name.startswith("ddp_"):
        return ranks.apart(study, study.steps, seed)
    lens, losses = watched(study, study.steps or STEPS, seed)
    return lens.findings(), lens.diagnosis(), losses


def result(study: Study, diagnosis: gradlens.Diagnosis, findings: list[Finding]) -> str:
    """Whether the cause was named."""
    loud = {finding.rule for finding in findings if finding.severity != Severity.INFO}
    if not study.rules:
        return "alarm" if loud else "well"
    origin = diagnosis.origin
    if (
        origin is not None
        and origin.rule in study.rules
        and (origin.rule in loud or origin.rule in ("frozen", "scaler-found"))
    ):
        return "named"
    if any(finding.rule in study.rules for finding in findings):
        return "partly"
    return "wrong" if loud else "missed"


def measured(job: tuple[str, int]) -> tuple[Any, ...]:
    """One row."""
    torch.set_num_threads(1)
    name, seed = job
    study = next(study for study in STUDIES if study.name == name)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        findings, diagnosis, losses = outcome(study, seed)
    took = time.perf_counter() - start
    origin = diagnosis.origin
    others = dict.fromkeys(f"{f.severity} {f.rule}" for f in findings if origin is None or f.rule != origin.rule)
    row = (study.name, study.half, study.kind, seed, result(study, diagnosis, findings), origin.rule if origin else "")
    row += (f"{diagnosis.confidence:.2f}", "; ".join(others), len(losses), f"{losses[0]:.4g}", f"{losses[-1]:.4g}")
    return *row, f"{took:.1f}", (origin.seen if origin else diagnosis.verdict)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the rules say of real trainings.")
    parser.add_argument("names", nargs="*", help="parts of the trainings' names; all by default")
    parser.add_argument("--half", choices=("tuned", "unseen"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", action="store_true")
    asked = parser.parse_args()
    chosen = [s for s in STUDIES if not asked.names or any(name in s.name for name in asked.names)]
    chosen = [s for s in chosen if asked.half in (None, s.half)]
    if asked.page:
        for study in chosen:
            studied(study, study.steps or STEPS, True, asked.seeds[0])
        return
    jobs = [(study.name, seed) for seed in asked.seeds for study in chosen]
    with multiprocessing.get_context("spawn").Pool(asked.jobs, maxtasksperchild=40) as pool:
        rows = []
        for row in pool.imap(measured, jobs):
            rows.append(row)
            print(f"{row[4]:7} {row[0]:58} {row[9]:>8} -> {row[10]:8} {row[6]} {row[5]} | {row[7]}", flush=True)
    for half in ("tuned", "unseen"):
        count = Counter(row[4] for row in rows if row[1] == half)
        print(half, ", ".join(f"{what} {n}" for what, n in sorted(count.items())))
    if asked.out:
        with asked.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([HEAD, *rows])


if __name__ == "__main__":
    sys.exit(main())
