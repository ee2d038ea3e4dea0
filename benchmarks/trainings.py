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

`trainings.csv` has a row for each training and seed: `training, half, kind, seed, result`, the diagnosis (`origin,
severity, confidence`, `loss` as its state, what `follows`, what stands `beside`, `infos`), and `steps, loss_first,
loss_last, seconds, seen`.
`docs/diagnosis.py` writes the tables of docs/diagnosis.md from it, and `--calibrate` the numbers that confidence rests on.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from studies import asked, base, loops, mistakes, ranks, written
from studies.base import STUDIES, Study

import gradlens
from gradlens.analysis import confidence
from gradlens.analysis.confidence import Counts
from gradlens.analysis.diagnosis import level_of
from gradlens.errors import GradlensWarning
from gradlens.records import Finding, Severity

__all__ = ["STUDIES", "Study", "asked", "base", "loops", "main", "mistakes", "ranks", "studied", "written"]

HEAD = (
    *(
        "training",
        "half",
        "kind",
        "seed",
        "result",
        "origin",
        "severity",
        "confidence",
        "loss",
        "follows",
        "beside",
        "infos",
    ),
    *("steps", "loss_first", "loss_last", "seconds", "seen"),
)
FEATURES = ["updates", "flips"]  #: what is watched; `--activations` adds to it
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
    with warnings.catch_warnings():
        if study.rules:  # what watch() warns of is a finding, too
            warnings.simplefilter("ignore", GradlensWarning)
        lens = gradlens.watch(training.model, training.optimizers, **{"features": FEATURES} | training.options)
    with lens:
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


def measured(job: tuple[str, int, tuple[str, ...]]) -> tuple[Any, ...]:
    """One row."""
    torch.set_num_threads(1)
    name, seed, FEATURES[2:] = job
    study = next(study for study in STUDIES if study.name == name)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        findings, diagnosis, losses = outcome(study, seed)
    took = time.perf_counter() - start
    origin = diagnosis.origin
    infos = [f for f in findings if f.severity == Severity.INFO and (origin is None or f.rule != origin.rule)]
    some = ["; ".join(dict.fromkeys(f.rule for f in each)) for each in (diagnosis.follows, diagnosis.beside, infos)]
    named = (origin.rule, str(origin.severity)) if origin else ("", "")
    row = (study.name, study.half, study.kind, seed, result(study, diagnosis, findings), *named)
    row += (f"{diagnosis.confidence:.2f}", str(diagnosis.loss.state), *some, len(losses))
    numbers = (f"{losses[0]:.4g}", f"{losses[-1]:.4g}", f"{took:.1f}")
    return *row, *numbers, (origin.seen if origin else diagnosis.verdict)


# --- how often it is right ------------------------------------------------------------------------------------------


def counted(rows: Iterable[Mapping[str, str]]) -> Counts:
    """How many verdicts were right, of rows of the csv."""
    rules: dict[str, list[bool]] = {}
    levels: list[list[bool]] = [[], [], []]
    weak: dict[str, list[bool]] = {"falls": [], "beside": [], "info": []}
    quiet: dict[str, list[bool]] = {}
    for row in rows:
        right, origin = row["result"] in ("named", "well"), row["origin"]
        if not origin:
            quiet.setdefault(row["loss"], []).append(right)
            continue
        rules.setdefault(origin, []).append(right)
        levels[level_of(origin)].append(right)
        for name in situations_of(row):
            weak[name].append(right)
    three = (counts(rules), tuple(count(each) for each in levels), counts(weak))
    return Counts(*three, counts(quiet))


def situations_of(row: Mapping[str, str]) -> list[str]:
    """What may weaken the verdict of a row."""
    here = {
        "falls": row["loss"] == "falls" and row["severity"] != "error",
        "beside": bool(row["beside"]),
        "info": row["severity"] == "info",
    }
    return [name for name, holds in here.items() if holds]


def count(rights: list[bool]) -> tuple[int, int]:
    return sum(rights), len(rights)


def counts(rights: Mapping[str, list[bool]]) -> dict[str, tuple[int, int]]:
    return {name: count(each) for name, each in sorted(rights.items())}


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def calibrate(path: Path) -> None:
    """Write the numbers of a csv into the module that diagnoses ask."""
    module = Path(confidence.__file__)
    head = module.read_text().partition("MEASURED = ")[0]
    module.write_text(f"{head}MEASURED = {counted(read(path))!r}\n")
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", str(module)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the rules say of real trainings.")
    parser.add_argument("names", nargs="*", help="parts of the trainings' names; all by default")
    parser.add_argument("--half", choices=("tuned", "unseen"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--activations", action="store_true", help="with the feature that looks at what modules make")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--calibrate", type=Path, metavar="CSV", help="write gradlens/analysis/confidence.py from a csv")
    asked = parser.parse_args()
    if asked.calibrate:
        calibrate(asked.calibrate)
        return
    chosen = [s for s in STUDIES if not asked.names or any(name in s.name for name in asked.names)]
    chosen = [s for s in chosen if asked.half in (None, s.half)]
    if asked.page:
        for study in chosen:
            studied(study, study.steps or STEPS, True, asked.seeds[0])
        return
    jobs = [(study.name, seed, ("activations",) if asked.activations else ()) for seed in asked.seeds for study in chosen]
    with multiprocessing.get_context("spawn").Pool(asked.jobs, maxtasksperchild=40) as pool:
        rows = []
        for row in pool.imap(measured, jobs):
            rows.append(row)
            print(
                f"{row[4]:7} {row[0]:58} {row[13]:>8} -> {row[14]:8} {row[7]} {row[5]} | {'; '.join(row[9:12])}", flush=True
            )
    for half in ("tuned", "unseen"):
        count = Counter(row[4] for row in rows if row[1] == half)
        print(half, ", ".join(f"{what} {n}" for what, n in sorted(count.items())))
    if asked.out:
        with asked.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([HEAD, *rows])


if __name__ == "__main__":
    sys.exit(main())
