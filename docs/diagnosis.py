"""Writes the tables of docs/diagnosis.md from benchmarks/trainings.csv: run `python docs/diagnosis.py`."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BINS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 1.01)


def text() -> str:
    """The page as it is, with its tables written again."""
    page = (ROOT / "docs" / "diagnosis.md").read_text()
    with (ROOT / "benchmarks" / "trainings.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (ROOT / "benchmarks" / "seeds.csv").open() as file:
        several = list(csv.DictReader(file))
    tables = {"kinds": _kinds(rows), "healthy": _healthy(rows), "reliability": _reliability(rows), "seeds": _seeds(several)}
    for name, table in tables.items():
        page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: m[1] + t + m[2], page, flags=re.S)
    return page


def _lines(*lines: str) -> str:
    return "\n".join(["", *lines, "", ""])


def _kinds(rows: list[dict[str, str]]) -> str:
    ill = [row for row in rows if row["result"] in RESULTS]
    lines = ["| mistake | half | named | partly | wrong | missed |", "|---|---|---|---|---|---|"]
    for half in ("unseen", "tuned"):
        some = [row for row in ill if row["half"] == half]
        count = Counter(row["result"] for row in some)
        lines.append(f"| **all** | {half} | **{count['named']} of {len(some)}** | {_rest(count)} |")
    for kind in sorted({row["kind"] for row in ill}):
        for half in ("unseen", "tuned"):
            some = [row for row in ill if row["half"] == half and row["kind"] == kind]
            count = Counter(row["result"] for row in some)
            if some:
                lines.append(f"| {kind} | {half} | {count['named']} of {len(some)} | {_rest(count)} |")
    return _lines(*lines)


RESULTS = ("named", "partly", "wrong", "missed")


def _rest(count: Counter[str]) -> str:
    return " | ".join(str(count[name] or "") for name in RESULTS[1:])


def _healthy(rows: list[dict[str, str]]) -> str:
    well = [row for row in rows if row["result"] in ("well", "alarm")]
    lines = ["| half | healthy trainings | with a warning | seconds a training (median) |", "|---|---|---|---|"]
    for half in ("unseen", "tuned"):
        some = [row for row in well if row["half"] == half]
        alarms = [f"`{row['training']}` ({row['origin']})" for row in some if row["result"] == "alarm"]
        seconds = sorted(float(row["seconds"]) for row in rows if row["half"] == half)
        said = f"{len(alarms)}: {', '.join(alarms)}" if alarms else "0"
        lines.append(f"| {half} | {len(some)} | {said} | {seconds[len(seconds) // 2]:.1f} |")
    return _lines(*lines)


def _seeds(rows: list[dict[str, str]]) -> str:
    """By kind and half: how many of the trainings came out right with each seed."""
    seeds = sorted({row["seed"] for row in rows}, key=int)
    lines = [
        f"| | half | trainings | {' | '.join(f'seed {seed}' for seed in seeds)} |",
        f"|---|---|---|{'---|' * len(seeds)}",
    ]
    ill = sorted({row["kind"] for row in rows if row["result"] in RESULTS})
    for kind in [*ill, "healthy, silent"]:
        for half in ("unseen", "tuned"):
            here = [row for row in rows if row["half"] == half]
            some = [row for row in here if (row["kind"] == kind if kind in ill else row["result"] in ("well", "alarm"))]
            right = Counter(row["seed"] for row in some if row["result"] in ("named", "well"))
            lines.append(
                f"| {kind} | {half} | {len(some) // len(seeds)} | {' | '.join(str(right[seed]) for seed in seeds)} |"
            )
    return _lines(*lines)


def _reliability(rows: list[dict[str, str]]) -> str:
    """Of the unseen half, by what the tuned half alone would have said."""
    trainings = _benchmark()
    fitted = trainings.counted(row for row in rows if row["half"] == "tuned")
    pairs = []
    for row in (row for row in rows if row["half"] == "unseen" and row["origin"]):
        sure = fitted.of_verdict(row["origin"], trainings.level_of(row["origin"]), trainings.situations_of(row))
        pairs.append((sure, row["result"] == "named"))
    lines = ["| stated confidence | verdicts | mean stated | right |", "|---|---|---|---|"]
    for low, high in itertools.pairwise(BINS):
        some = [pair for pair in pairs if low <= pair[0] < high]
        if some:
            stated, right = sum(s for s, _ in some) / len(some), sum(r for _, r in some)
            lines.append(f"| {low:.0%} to {min(high, 1):.0%} | {len(some)} | {stated:.0%} | {right / len(some):.0%} |")
    quiet = [row for row in rows if row["half"] == "unseen" and not row["origin"] and row["loss"] == "falls"]
    well = sum(row["result"] == "well" for row in quiet)
    stated = fitted.of_quiet("falls")
    lines.append(f'| "nothing looks ill", the loss falls | {len(quiet)} | {stated:.0%} | {well / max(len(quiet), 1):.0%} |')
    return _lines(*lines)


def _benchmark() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("trainings", ROOT / "benchmarks" / "trainings.py")
    module = sys.modules.get("trainings") or importlib.util.module_from_spec(spec)
    if "trainings" not in sys.modules:
        sys.modules["trainings"] = module
        spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    (ROOT / "docs" / "diagnosis.md").write_text(text())
