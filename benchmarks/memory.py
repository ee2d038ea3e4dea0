"""Whether anything grows with the length of a run: resident memory and live objects over many steps.

    python benchmarks/memory.py                               # each situation, 100,000 steps: about an hour and a half
    python benchmarks/memory.py --steps 20000 --only run idle

Each situation runs in a process of its own: a model of four parameters of two to eight weights, watched at every step.
After a fifth of the steps everything that is bounded has reached its bound; from there on, `growth_mib` is what the resident
memory of the last fifth has on average over that of the first fifth, `mib_per_million` the slope of a line through all
points, and `objects` by how many the objects that Python tracks have grown, after a collection. `bare` is the same training
unwatched, which says how much of that is torch's own and the allocator's.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "memory.csv"
POINTS = 50  #: at which memory is looked at
MIB = 1 << 20

Step = Callable[[], None]
Settle = Callable[[], None]


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


# --- what is trained --------------------------------------------------------------------------------------------------


def _model(seed: int = 0):
    import torch

    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Tanh(), torch.nn.Linear(2, 4))


def training(
    directory: str | None, *, watch: bool = True, micro: int = 1, idle: bool = False, steps: bool = True
) -> tuple[Step, Settle]:
    """A step: one backward (and, of each `micro`, an optimizer's step); and what records all that has come.

    `idle`: an optimizer listed last that never steps.
    """
    import torch

    import gradlens

    model, other = _model(), _model(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    never = torch.optim.SGD(other.parameters(), 1e-3)
    settle: Settle = lambda: None  # noqa: E731
    if watch:
        target, optimizers = ({"a": model, "b": other}, [optimizer, never]) if idle else (model, optimizer)
        settle = gradlens.watch(target, optimizers, run=directory).flush
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    calls = itertools.count(1)

    def step() -> None:
        torch.nn.functional.mse_loss(model(x), y).backward()
        if steps and next(calls) % micro == 0:
            optimizer.step()
            optimizer.zero_grad()

    return step, settle


SITUATIONS: dict[str, dict] = {
    "bare": {"watch": False},
    "memory": {"directory": False},
    "run": {},
    "accumulation": {"micro": 4},
    "never closes": {"steps": False},
    "never closes, memory": {"steps": False, "directory": False},
    "idle": {"idle": True},
    "idle, memory": {"idle": True, "directory": False},
}


# --- what is measured -------------------------------------------------------------------------------------------------


def child(name: str, steps: int) -> Iterator[dict[str, float]]:
    """Train, and look at memory now and then."""
    import torch

    torch.set_num_threads(1)
    options = dict(SITUATIONS[name])
    with tempfile.TemporaryDirectory() as directory:
        step, settle = training(directory if options.pop("directory", True) else None, **options)
        began, every = time.monotonic(), max(steps // POINTS, 1)
        for number in range(steps + 1):
            if number % every == 0:
                settle()  # else some seconds of steps wait for the recorder, more or fewer of them
                gc.collect()
                seconds = time.monotonic() - began
                yield {"step": number, "bytes": resident(), "objects": len(gc.get_objects()), "seconds": seconds}
            step()


def measured(name: str, steps: int) -> dict[str, object]:
    """The figures of one situation, from a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--steps", str(steps)]
    lines = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    points = [json.loads(line) for line in lines.splitlines()]
    settled = [point for point in points if point["step"] >= steps / 5]
    at, size, objects = (np.array([point[key] for point in settled], float) for key in ("step", "bytes", "objects"))
    fifth = max(len(settled) // 5, 1)
    return {
        "situation": name,
        "steps": steps,
        "start_mib": f"{settled[0]['bytes'] / MIB:.1f}",
        "end_mib": f"{settled[-1]['bytes'] / MIB:.1f}",
        "growth_mib": f"{(size[-fifth:].mean() - size[:fifth].mean()) / MIB:.1f}",
        "mib_per_million": f"{1e6 * np.polyfit(at, size / MIB, 1)[0]:.1f}",
        "objects": round(objects[-fifth:].mean() - objects[:fifth].mean()),
        "seconds": f"{points[-1]['seconds']:.0f}",
    }


FIELDS = ["situation", "steps", "start_mib", "end_mib", "growth_mib", "mib_per_million", "objects", "seconds"]


def stored() -> dict[str, dict[str, object]]:
    """What memory.csv has, by situation."""
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="") as file:
        return {row["situation"]: dict(row) for row in csv.DictReader(file)}


def store(row: dict[str, object]) -> None:
    """Into memory.csv, in place of what it had of the situation."""
    rows = stored() | {str(row["situation"]): row}
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in SITUATIONS if name in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--only", nargs="+", choices=list(SITUATIONS), default=list(SITUATIONS))
    parser.add_argument("--dry", action="store_true", help="print, store nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        for point in child(given.child, given.steps):
            print(json.dumps(point), flush=True)
    else:
        for name in given.only:
            row = measured(name, given.steps)
            print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
            if not given.dry:
                store(row)


if __name__ == "__main__":
    main()
