"""How often are kept verdicts right? Measured against the full-data gradient, on real data that packages ship.

    python benchmarks/calibration.py                 # everything: about ten minutes on one core
    python benchmarks/calibration.py --quick         # one seed, to see that it runs
    python benchmarks/calibration.py --nudge         # predicted against actual changes of the loss, a minute
    python benchmarks/calibration.py --layers        # which layers' verdicts are wrong, two minutes
    python benchmarks/calibration.py --summarise     # print the stored verdicts again

Tasks: scikit-learn's handwritten digits (an MLP and a CNN), Python's own language reference (a small transformer over
characters), and scikit-learn's diabetes data (regression). Five seeds, each surveyed early, midway and late in training, for
K = 4 to 64 batches of the size that was trained with. A verdict is *wrong* when its direction is not that of the truth:

- `iid`: batches drawn with replacement, the truth is the gradient over all training data. The claim's own terms.
- `epoch`: batches as a shuffled loader gives them, without replacement (anew after each pass); the same truth, of which the
  surveyed examples are a part. What users do.
- `held-out`: batches from one half of the data, the truth is the gradient over the other half. The truth has noise itself.

Each row of `calibration.csv` pools the surveys of one task, stage, mode, K, level, method and sampled share: the realised
false discovery rate (mean over surveys of the share of wrong verdicts, 0 where none was kept), that of the worst seed and of
the worst survey, the coverage, and how often nothing was kept. `signs_of_mean_right` is what one would get by taking every
sign of the mean at its word; K = 1 is that of a single batch.

`nudge.csv`: verdicts of 16 batches of one half of the data followed by 1e-4, the actual change of the loss as a share of the
predicted one, on the surveyed batches and on 16 of the other half; `noise` is the standard error of the actual change.

`layers.csv`: of the language model, at q = 0.1, the share of wrong verdicts by layer (mean over 40 surveys, 0 where none was
kept), and that of the worst seed.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradlens.errors import GradlensWarning
from gradlens.probes.nudge import nudge
from gradlens.probes.survey import survey
from gradlens.statistics.significance import q_values

HERE = Path(__file__).parent
BATCHES = (4, 8, 16, 32, 64)
LEVELS = (0.05, 0.1, 0.2)
METHODS = ("bh", "by")
SHARES = (1.0, 0.05, 0.01)  #: of the weights, surveyed alone
STAGES = {"early": 20, "mid": 200, "late": 2000}  #: steps of training
MODES = ("iid", "epoch", "held-out")
SURVEYS = 8  #: of each seed, stage, mode and K


@dataclass(frozen=True)
class Task:
    """A model to train, its data as one tensor of examples a field, and the mean loss of a batch."""

    make: Callable[[], nn.Module]
    data: tuple[Tensor, ...]
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
    batch: int
    lr: float


def classify(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def digits_mlp() -> Task:
    make = lambda: nn.Sequential(nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 64), nn.ReLU(), nn.Linear(64, 10))  # noqa: E731
    return Task(make, digits(), classify, batch=32, lr=1e-3)


def digits_cnn() -> Task:
    x, y = digits()

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip

    return Task(make, (x.reshape(-1, 1, 8, 8), y), classify, batch=32, lr=1e-3)


class Characters(nn.Module):
    """One transformer block over characters."""

    def __init__(self, vocabulary: int, length: int, width: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.out = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.embed(x) + self.place, src_mask=self.mask, is_causal=True))


def language() -> Task:
    from pydoc_data.topics import topics

    text = "\n".join(topics.values())
    letters = sorted(set(text))
    codes = torch.tensor([letters.index(c) for c in text[: 2048 * 33]]).reshape(-1, 33)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(model(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    return Task(lambda: Characters(len(letters), 32), (codes,), loss, batch=16, lr=2e-3)


def diabetes() -> Task:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    x, y = (torch.tensor((v - v.mean(0)) / v.std(0), dtype=torch.float32) for v in (x, y))

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.mse_loss(model(batch[0])[:, 0], batch[1])

    make = lambda: nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1))  # noqa: E731
    return Task(make, (x, y), loss, batch=16, lr=1e-3)


TASKS = {"digits MLP": digits_mlp, "digits CNN": digits_cnn, "language": language, "diabetes": diabetes}


def trained(task: Task, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """The model at each stage of one training with Adam."""
    torch.manual_seed(seed)
    model = task.make()
    optimizer = torch.optim.Adam(model.parameters(), lr=task.lr)
    random = torch.Generator().manual_seed(seed)
    step = 0
    for stage, end in STAGES.items():
        while step < end:
            for rows in torch.randperm(len(task.data[0]), generator=random).split(task.batch):
                optimizer.zero_grad()
                task.loss(model, tuple(field[rows] for field in task.data)).backward()
                optimizer.step()
                step += 1
                if step == end:
                    break
        yield stage, model


def gradient(task: Task, model: nn.Module, rows: Tensor) -> np.ndarray:
    """The gradient of the mean loss over the given examples, in float64."""
    total: Any = 0
    for part in rows.split(512):
        model.zero_grad()
        task.loss(model, tuple(field[part] for field in task.data)).backward()
        total = total + len(part) / len(rows) * torch.cat([p.grad.double().reshape(-1) for p in model.parameters()])
    model.zero_grad()
    return total.numpy()


def drawn(task: Task, mode: str, k: int, random: torch.Generator) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """K batches, and the examples whose gradient is the truth."""
    n = len(task.data[0])
    everything = torch.randperm(n, generator=random)
    if mode == "iid":
        rows = torch.randint(0, n, (k, task.batch), generator=random)
        truth = everything
    else:
        pool = everything if mode == "epoch" else everything[: n // 2]
        truth = everything if mode == "epoch" else everything[n // 2 :]
        passes = [pool[torch.randperm(len(pool), generator=random)] for _ in range(1 + k * task.batch // len(pool))]
        rows = torch.cat(passes)[: k * task.batch].reshape(k, task.batch)
    return [tuple(field[r] for field in task.data) for r in rows], truth


def measure(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """One row a survey, level, method and share."""
    task = TASKS[name]()
    for stage, model in trained(task, seed):
        everything = np.sign(gradient(task, model, torch.arange(len(task.data[0]))))
        random = torch.Generator().manual_seed(1000 + seed)
        yield from single_batches(
            task, model, everything, {"task": name, "stage": stage, "mode": "iid", "seed": seed}, random
        )
        for mode in MODES:
            for k in BATCHES:
                for repeat in range(SURVEYS):
                    batches, truth = drawn(task, mode, k, random)
                    sign = everything if mode != "held-out" else np.sign(gradient(task, model, truth))
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", GradlensWarning)
                        results = survey(model, task.loss, batches).results
                    where = {"task": name, "stage": stage, "mode": mode, "batches": k, "seed": seed}
                    yield from rows_of(where, results, sign, np.random.default_rng(repeat))


def single_batches(
    task: Task, model: nn.Module, truth: np.ndarray, where: dict[str, Any], random: torch.Generator
) -> Iterator[dict[str, Any]]:
    """How often the sign of one batch's partial is right, without any test: the row of K = 1."""
    for _ in range(SURVEYS):
        rows = torch.randint(0, len(task.data[0]), (task.batch,), generator=random)
        signs = np.sign(gradient(task, model, rows)) == truth
        blank = {"level": 0.1, "method": "bh", "share": 1.0, "kept": 0, "coverage": 0.0, "wrong": 0.0}
        yield {**where, "batches": 1, **blank, "signs": float(signs[truth != 0].mean())}


def rows_of(where: dict[str, Any], results: Any, truth: np.ndarray, random: np.random.Generator) -> Iterator[dict[str, Any]]:
    for share in SHARES:
        chosen = (
            np.arange(len(truth)) if share == 1 else np.sort(random.choice(len(truth), round(share * len(truth)), False))
        )
        p, mean = results.p[chosen], results.mean[chosen]
        right = np.sign(mean) == truth[chosen]
        tested = ~np.isnan(p) & np.isfinite(results.t[chosen])
        for method in METHODS:
            q = np.full(len(p), np.nan)
            q[tested] = q_values(torch.from_numpy(p[tested]), method).numpy()
            for level in LEVELS:
                kept = q <= level
                n = int(kept.sum())
                yield {
                    **where, "level": level, "method": method, "share": share,
                    "kept": n, "coverage": n / len(p), "wrong": float((~right[kept]).mean()) if n else 0.0,
                    "signs": float(right[truth[chosen] != 0].mean()),
                }  # fmt: skip


KEYS = ("task", "stage", "mode", "batches", "level", "method", "share")


def pooled(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The surveys of each setting together."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in KEYS)].append(row)
    return [{**dict(zip(KEYS, key, strict=True)), **summary(found)} for key, found in groups.items()]


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    wrong, kept = np.array([row["wrong"] for row in found]), np.array([row["kept"] for row in found])
    seeds = defaultdict(list)
    for row in found:
        seeds[row["seed"]].append(row["wrong"])
    return {
        "surveys": len(found),
        "fdr": round(float(wrong.mean()), 5),
        "fdr_where_kept": round(float(wrong[kept > 0].mean()), 5) if kept.any() else "",
        "worst_seed": round(max(float(np.mean(values)) for values in seeds.values()), 5),
        "worst_survey": round(float(wrong.max()), 5),
        "surveys_over_level": round(float((wrong > found[0]["level"]).mean()), 5),
        "nothing_kept": round(float((kept == 0).mean()), 5),
        "coverage": round(float(np.mean([row["coverage"] for row in found])), 5),
        "lowest_coverage": round(float(min(row["coverage"] for row in found)), 5),
        "signs_of_mean_right": round(float(np.mean([row["signs"] for row in found])), 5),
    }


def nudges(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """One row a stage: how much of the predicted change came about."""
    task = TASKS[name]()
    half = len(task.data[0]) // 2
    for stage, model in trained(task, seed):
        random = torch.Generator().manual_seed(seed)
        rows = torch.randperm(2 * half, generator=random).reshape(2, half)
        drawn = [side[torch.randint(0, half, (16, task.batch), generator=random)] for side in rows]
        surveyed, held_out = ([tuple(field[r] for field in task.data) for r in side] for side in drawn)
        found = survey(model, task.loss, surveyed)
        moved = {
            where: nudge(model, task.loss, found, batches)
            for where, batches in (("surveyed", surveyed), ("held_out", held_out))
        }
        if not found.coverage:
            continue
        yield {
            "task": name, "stage": stage, "seed": seed, "moved": moved["surveyed"].moved,
            "predicted": f"{moved['surveyed'].predicted:.4g}",
            **{where: round(one.actual / one.predicted, 4) for where, one in moved.items()},
            "noise": round(moved["held_out"].noise / abs(moved["held_out"].predicted), 4),
        }  # fmt: skip


def by_layer(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """One row a survey, method and layer; `rest` are all layers but the output together."""
    task = TASKS[name]()
    for stage, model in trained(task, seed):
        truth = np.sign(gradient(task, model, torch.arange(len(task.data[0]))))
        owners = np.concatenate([np.full(p.numel(), name.partition(".")[0]) for name, p in model.named_parameters()])
        layers = {layer: owners == layer for layer in dict.fromkeys(owners)} | {"rest": owners != "out"}
        random = torch.Generator().manual_seed(2000 + seed)
        for k in BATCHES[1:]:
            for _ in range(SURVEYS):
                results = survey(model, task.loss, drawn(task, "iid", k, random)[0]).results
                tested = ~np.isnan(results.p)
                for method in METHODS:
                    q = np.full(len(truth), np.nan)
                    q[tested] = q_values(torch.from_numpy(results.p[tested]), method).numpy()
                    for layer, mine in layers.items():
                        kept = mine & (q <= 0.1)
                        wrong = np.sign(results.mean[kept]) != truth[kept]
                        yield {
                            "task": name, "stage": stage, "batches": k, "method": method, "layer": layer, "seed": seed,
                            "kept": len(wrong), "wrong": float(wrong.mean()) if len(wrong) else 0.0,
                        }  # fmt: skip


def pooled_by_layer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ("task", "stage", "batches", "method", "layer")
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    pooled = []
    for key, found in groups.items():
        wrong = [row["wrong"] for row in found]
        seeds = [np.mean([row["wrong"] for row in found if row["seed"] == seed]) for seed in {row["seed"] for row in found}]
        pooled.append({
            **dict(zip(keys, key, strict=True)), "surveys": len(found), "kept": int(np.mean([row["kept"] for row in found])),
            "fdr": round(float(np.mean(wrong)), 5), "worst_seed": round(float(max(seeds)), 5),
        })  # fmt: skip
    return pooled


def store(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table(results: list[dict[str, Any]], **chosen: Any) -> None:
    """Print the rows that match, as Markdown."""
    shown = [row for row in results if all(str(row[key]) == str(value) for key, value in chosen.items())]
    columns = [key for key in KEYS if key not in chosen] + [
        "fdr", "worst_seed", "worst_survey", "nothing_kept", "coverage", "signs_of_mean_right",
    ]  # fmt: skip
    print("\n" + ", ".join(f"{key} = {value}" for key, value in chosen.items()))
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in shown:
        print("| " + " | ".join(_cell(row[column]) for column in columns) + " |")


def _cell(value: Any) -> str:
    try:
        return f"{float(value):.1%}" if "." in str(value) else str(value)
    except ValueError:
        return str(value)


def summarise(results: list[dict[str, Any]]) -> None:
    """The tables that the documentation quotes."""
    for mode in MODES:
        table(results, mode=mode, level=0.1, method="bh", share=1.0)
    for level in LEVELS:
        table(results, mode="iid", batches=16, level=level, share=1.0, stage="mid")
    table(results, mode="iid", level=0.1, method="by", share=1.0)
    table(results, mode="iid", level=0.1, method="bh", share=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--out", type=Path, default=HERE / "calibration.csv")
    parser.add_argument("--quick", action="store_true", help="one seed, nothing stored")
    parser.add_argument("--nudge", action="store_true", help="compare predicted and actual changes of the loss")
    parser.add_argument("--layers", action="store_true", help="the language model's wrong verdicts, by layer")
    parser.add_argument("--summarise", action="store_true", help="print the stored results, measure nothing")
    options = parser.parse_args()
    if options.summarise:
        with options.out.open() as file:
            return summarise(list(csv.DictReader(file)))
    torch.set_num_threads(1)
    if options.nudge:
        store(
            HERE / "nudge.csv",
            [row for name in options.tasks for seed in range(options.seeds) for row in nudges(name, seed)],
        )
        return print((HERE / "nudge.csv").read_text())
    if options.layers:
        warnings.simplefilter("ignore", GradlensWarning)
        store(HERE / "layers.csv", pooled_by_layer([row for s in range(options.seeds) for row in by_layer("language", s)]))
        return print((HERE / "layers.csv").read_text())
    started, rows = time.time(), []
    for name in options.tasks:
        for seed in range(1 if options.quick else options.seeds):
            rows += measure(name, seed)
            print(f"{name}, seed {seed}: {time.time() - started:.0f} s", flush=True)
    results = pooled(iter(rows))
    if not options.quick:
        store(options.out, results)
    summarise(results)
    return None


if __name__ == "__main__":
    main()
