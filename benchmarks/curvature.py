"""How often the verdicts of `curvature` on single weights are wrong, against full Hessians, over many draws.

    python benchmarks/curvature.py           # writes benchmarks/curvature.csv and the table in docs/second-order.md

The models are those of `tests/probes/trained.py`: trained nets of 170 to 442 weights, and one at a saddle, whose Hessians
are computed row by row. For each of `--draws` seeds of the random signs `curvature(samples=32)` says which weights bend up
or down, and gives Newton moves to those that bend up. A verdict is wrong when the true diagonal has the other sign, or is 0.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import gradlens  # noqa: E402
from tests.probes.trained import MODELS, trained  # noqa: E402

SAMPLES, DRAWS = 32, 20
BEGIN, END = "<!-- curvature -->", "<!-- end of curvature -->"


def measured(draws: int) -> Iterator[dict[str, Any]]:
    """A row a model and draw."""
    for name in MODELS:
        model, loss, full = trained(name)
        true = np.diag(full)
        small = 1e-9 * np.abs(full).max()  # a diagonal entry below that is 0
        for seed in range(draws):
            found = gradlens.curvature(model, loss, samples=SAMPLES, iterations=2, seed=seed, progress=False)
            up, down = found.bends == 1, found.bends == 2
            decided = up | down
            wrong = (up & ~(true > small)) | (down & ~(true < -small))
            moves = up & ~wrong & np.isfinite(found.newton) & (found.partial != 0)
            ratio = found.newton[moves] / (-found.partial[moves] / true[moves])
            trace = (found.trace - true.sum()) / found.trace_noise
            yield {
                "model": name,
                "weights": len(true),
                "seed": seed,
                "decided": int(decided.sum()),
                "wrong": int(wrong.sum()),
                "moves": len(ratio),
                "newton_ratio": round(float(np.median(ratio)), 4) if len(ratio) else "",
                "trace_z": round(float(trace), 3),
            }


def table(rows: list[dict[str, str]]) -> str:
    """The table of the page, a line a model."""
    lines = [
        "| trained model | weights | decided | wrong: mean, worst draw | Newton moves given / true, and 90 % of draws |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        n = int(mine[0]["weights"])
        decided = np.array([int(row["decided"]) for row in mine])
        shares = np.array([int(row["wrong"]) / max(int(row["decided"]), 1) for row in mine])
        ratios = [float(row["newton_ratio"]) for row in mine if row["newton_ratio"] != ""]
        spread = (
            "{:.2f} ({:.2f} to {:.2f})".format(np.median(ratios), *np.quantile(ratios, [0.05, 0.95])) if ratios else "none"
        )
        wrong = f"{100 * shares.mean():.1f} %, {100 * shares.max():.0f} %"
        lines.append(f"| {name} | {n} | {100 * decided.mean() / n:.0f} % | {wrong} | {spread} |")
    z = np.array([float(row["trace_z"]) for row in rows])
    draws = len({row["seed"] for row in rows})
    lines += [
        "",
        f"({SAMPLES} samples, {draws} draws a model, `benchmarks/curvature.py`.) The trace was within two of its standard "
        f"errors in {100 * np.mean(np.abs(z) < 2):.0f} % of the draws.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, write the numbers, and write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--page-only", action="store_true", help="write the table from the numbers that are there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    numbers = Path(__file__).with_suffix(".csv")
    if not asked.page_only:
        rows = list(measured(asked.draws))
        with numbers.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with numbers.open(newline="") as file:
        text = table(list(csv.DictReader(file)))
    page = ROOT / "docs/second-order.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    print(text)


if __name__ == "__main__":
    main()
