"""What each probe costs beside the obvious code written by hand, from 10^4 to 10^7 weights.

    python benchmarks/probes.py                      # writes benchmarks/probes.csv and the table in docs/second-order.md
    python benchmarks/probes.py --sizes 20000 --probe survey --out /tmp/some.csv

By hand means what one would type for the same answer without guarding anything: the model itself is used and changed. The
two run in turns, after one turn of each that does not count; the best of each is compared. Time is that of one thread on the
processor, which a machine that others use bends less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import gradlens

BATCH, K, CHECKED, SAMPLES = 32, 16, 32, 8  # 32 weights are what check_partials checks by default
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
BEGIN, END = "<!-- cost of probes -->", "<!-- end of cost of probes -->"


def dense(n: int) -> tuple[nn.Module, list[Any]]:
    """An MLP of about n weights, and its batches."""
    width = max(8, round((37**2 + n) ** 0.5 - 37))  # of width^2 + 76 width
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    return model, [(torch.randn(BATCH, 64), torch.randint(10, (BATCH,))) for _ in range(K)]


def table(n: int) -> tuple[nn.Module, list[Any]]:
    """A sparse embedding of about n weights, looked up in a few rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(n // 32, 32, sparse=True, mode="sum"), nn.Linear(32, 10))
    rows = [torch.randint(n // 32, (BATCH, 4)) for _ in range(K)]
    return model, [(x, torch.randint(10, (BATCH,))) for x in rows]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Of one batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def of_batch(batch: Any) -> Callable[[nn.Module], torch.Tensor]:
    """The loss of one batch."""
    return lambda model: loss(model, batch)


def wide(batch: Any) -> Any:
    """In float64, where it is real."""
    return tuple(x.double() if x.is_floating_point() else x for x in batch)


# --- by hand ------------------------------------------------------------------------------------------------------------


def survey_by_hand(model: nn.Module, batches: list[Any]) -> None:
    """Mean and variance of the gradient, and t, by Welford's update in float64."""
    parameters = list(model.parameters())
    mean = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    squares = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    for k, batch in enumerate(batches, 1):
        moments(torch.autograd.grad(loss(model, batch), parameters), mean, squares, k)
    tested(mean, squares, K)


def moments(gradient: Any, mean: list[torch.Tensor], squares: list[torch.Tensor], k: int) -> None:
    """The k-th of them, added."""
    for g, m, s in zip(gradient, mean, squares, strict=True):
        g = (g.to_dense() if g.is_sparse else g).double()
        off = g - m
        m += off / k
        s += off * (g - m)


def tested(mean: list[torch.Tensor], squares: list[torch.Tensor], k: int) -> None:
    """Student's t, p, and Benjamini and Hochberg, by scipy."""
    t = torch.cat([(m / (s / (k - 1) / k).sqrt()).flatten() for m, s in zip(mean, squares, strict=True)])
    from scipy import stats

    p = 2 * stats.t.sf(t.abs().numpy(), k - 1)
    stats.false_discovery_control(p[p == p])


def nudge_by_hand(model: nn.Module, batches: list[Any]) -> None:
    """A copy moved by the sign of the first batch's gradient."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss(model, batches[0]), parameters)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, g in zip(moved.parameters(), gradient, strict=True):
            p -= 1e-4 * (g.to_dense() if g.is_sparse else g).sign()
        sum((loss(moved, batch) - loss(model, batch)).item() for batch in batches)


def check_partials_by_hand(model: nn.Module, batches: list[Any]) -> None:
    """Central differences of a copy in float64."""
    model, batch = copy.deepcopy(model).double(), wide(batches[0])
    parameters = list(model.parameters())
    torch.autograd.grad(loss(model, batch), parameters)
    with torch.no_grad():
        for i in range(CHECKED):
            flat = parameters[i % len(parameters)].view(-1)
            at = i % len(flat)
            value = flat[at].item()
            for h in (1e-5, -1e-5):
                flat[at] = value + h
                loss(model, batch).item()
            flat[at] = value


def check_symmetry_by_hand(model: nn.Module, batches: list[Any]) -> None:
    """Eight directions, gradients on both sides at two steps, in float64."""
    model, batch = copy.deepcopy(model).double(), wide(batches[0])
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    directions = [[torch.randn_like(p) for p in parameters] for _ in range(8)]
    for v in directions:
        for step in (1e-4, -1e-4, 1e-5, -1e-5):
            with torch.no_grad():
                for p, w, d in zip(parameters, start, v, strict=True):
                    p.copy_(w + step * d)
            g = torch.autograd.grad(loss(model, batch), parameters)
            [
                sum(((x.to_dense() if x.is_sparse else x) * d).sum() for x, d in zip(g, u, strict=True))
                for u in directions[:4]
            ]


def curvature_by_hand(model: nn.Module, batches: list[Any]) -> None:
    """Hutchinson's diagonal with t and false discoveries, and as many products for both ends by the power method."""
    parameters = list(model.parameters())
    g = torch.autograd.grad(loss(model, batches[0]), parameters, create_graph=True)
    mean = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    squares = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    for k in range(1, SAMPLES + 1):
        v = [torch.randint(0, 2, p.shape) * 2.0 - 1 for p in parameters]
        h = torch.autograd.grad(sum((a * b).sum() for a, b in zip(g, v, strict=True)), parameters, retain_graph=True)
        moments([a * b for a, b in zip(h, v, strict=True)], mean, squares, k)
    tested(mean, squares, SAMPLES)
    v = [torch.randn_like(p) for p in parameters]
    for _ in range(curvature_by_hand.products):  # type: ignore[attr-defined]
        h = torch.autograd.grad(sum((a * b).sum() for a, b in zip(g, v, strict=True)), parameters, retain_graph=True)
        norm = sum(x.square().sum() for x in h).sqrt()
        v = [x / norm for x in h]


curvature_by_hand.products = 40  # type: ignore[attr-defined]  # set to what Lanczos took


# --- ours ---------------------------------------------------------------------------------------------------------------


def nudged(model: nn.Module, batches: list[Any]) -> None:
    """`nudge` by a survey that was made before, as by hand it is one gradient."""
    gradlens.nudge(model, loss, nudged.verdicts, batches, progress=False)  # type: ignore[attr-defined]


def curved(model: nn.Module, batches: list[Any]) -> None:
    """`curvature` with as many samples."""
    found = gradlens.curvature(model, of_batch(batches[0]), samples=SAMPLES, progress=False)
    curvature_by_hand.products = found.spectrum.iterations  # type: ignore[attr-defined]


PROBES: dict[str, tuple[Callable, Callable]] = {
    "survey": (lambda m, b: gradlens.survey(m, loss, b, progress=False), survey_by_hand),
    "nudge": (nudged, nudge_by_hand),
    "check_partials": (
        lambda m, b: gradlens.check_partials(m, of_batch(b[0]), k=CHECKED, progress=False),
        check_partials_by_hand,
    ),
    "check_symmetry": (lambda m, b: gradlens.check_symmetry(m, of_batch(b[0])), check_symmetry_by_hand),
    "curvature": (curved, curvature_by_hand),
}


def seconds(call: Callable, *arguments: Any) -> float:
    """Of the processor, for one call."""
    start = time.process_time()
    call(*arguments)
    return time.process_time() - start


def measured(kinds: list[str], sizes: list[int], probes: list[str], turns: int) -> Iterator[dict[str, Any]]:
    """A row a model, size and probe."""
    for kind in kinds:
        for n in sizes:
            model, batches = {"dense": dense, "sparse table": table}[kind](n)
            if "nudge" in probes:
                nudged.verdicts = gradlens.survey(model, loss, batches, progress=False)  # type: ignore[attr-defined]
            for probe in probes:
                if kind != "dense" and probe == "curvature":  # by hand it fails: sparse gradients have no second derivative
                    continue
                ours, by_hand = PROBES[probe]
                times = [(seconds(ours, model, batches), seconds(by_hand, model, batches)) for _ in range(turns + 1)][1:]
                best = [min(each) for each in zip(*times, strict=True)]
                weights = sum(p.numel() for p in model.parameters())
                yield {
                    "model": kind,
                    "weights": weights,
                    "probe": probe,
                    "ours_ms": round(1e3 * best[0], 2),
                    "by_hand_ms": round(1e3 * best[1], 2),
                    "ratio": round(best[0] / best[1], 2),
                    "turns": turns,
                }


def ratios(rows: list[dict[str, str]]) -> str:
    """The ratios of a model and probe, a column a size."""
    sizes = sorted({round(np.log10(int(row["weights"]))) for row in rows})
    heads = " | ".join(f"10^{n}" for n in sizes)
    lines = [
        f"| model | probe | {heads} | by hand at 10^{sizes[0]}, 10^{sizes[-1]} |",
        "|---|---|" + "---|" * (len(sizes) + 1),
    ]
    for model, probe in dict.fromkeys((row["model"], row["probe"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["probe"]) == (model, probe)]
        at = {round(np.log10(int(row["weights"]))): row for row in mine}
        shown = " | ".join(f"{float(at[n]['ratio']):.2f}" if n in at else "" for n in sizes)
        ends = ", ".join(f"{float(at[n]['by_hand_ms']):,.0f} ms" for n in (sizes[0], sizes[-1]) if n in at)
        lines.append(f"| {model} | `{probe}` | {shown} | {ends} |")
    return "\n".join(lines)


def write_page(numbers: Path) -> None:
    """Put the table where the page has room for it."""
    with numbers.open(newline="") as file:
        text = ratios(list(csv.DictReader(file)))
    page = Path(__file__).parent.parent / "docs/second-order.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--model", nargs="*", default=["dense", "sparse table"])
    parser.add_argument("--probe", nargs="*", default=list(PROBES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for row in measured(asked.model, asked.sizes, asked.probe, asked.turns):
        rows.append(row)
        print(" ".join(f"{value}" for value in row.values()), flush=True)
    with asked.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if asked.out == Path(__file__).with_suffix(".csv"):
        write_page(asked.out)


if __name__ == "__main__":
    main()
