"""What watching costs a training step: gradlens in several settings, and what else people use, on four models.

    pip install -r benchmarks/requirements.txt      # the peers; those that are missing are left out, with the reason
    python benchmarks/overhead.py                   # everything: an hour; overhead.csv and the plot
    python benchmarks/overhead.py --model gpt --threads 2 --minutes 4 --only 'bare*' 'gradlens*'
    python benchmarks/overhead.py --budget          # whether budget=0.01 is kept
    python benchmarks/overhead.py --plot            # docs/images/overhead.png from overhead.csv

One process, torch on one thread or two. Two copies of a model train side by side, one as it is and one with a contender, a
step of this and a step of that: zero_grad, forward, backward, the optimizer's step, loss.item(). What is compared is
processor time, since other work on the machine changes it little. Contenders take turns in random order, several rounds.
Each share is of a step of the bare copy; figures are medians over rounds, and `bare again`, a bare copy beside a bare copy,
says what they can be by chance:

- `thread`: of the training thread, the median step of one copy against that of the other. What one pays where a core is
  free for background threads.
- `added`: the same and the processor time of all other threads, until all that was seen is in files; `low` and `high` are
  its extremes over the rounds. What one pays where no core is free. wandb's own process is not in it. With several torch
  threads it is `thread`, since theirs cannot be told apart.
- `wall`: of the time that passes, the median step of each. On a busy machine it says little.
- `look_ms`: of gradlens, what the lens says itself that observing a step cost on the training thread (`lens.overhead()`,
  measured directly). It is no difference of two long times, so it is exact where the others are not; it leaves out the short
  hooks, and what caches have lost.

The first steps are left out (6, 18 or 60), and the end: `end_ms` is what closing took, once. gradlens then draws its
pictures and makes its records into Parquet.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import fnmatch
import gc
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))

from contenders import ALL, Contender, Training, quieten
from models import TASKS, Task

HERE = Path(__file__).parent
RESULTS = HERE / "overhead.csv"
PLOT = HERE.parent / "docs" / "images" / "overhead.png"
FIELDS = ["model", "threads", "contender", "kind", "step_ms", "added", "low", "high", "thread", "wall", "look_ms", "end_ms"]
FIELDS += ["rounds", "note", "machine"]


class Round(NamedTuple):
    """Of a contender: seconds a step of processor time, and shares of the bare step."""

    step: float  # the training thread's, with the contender
    added: float
    thread: float
    wall: float
    look: float  # seconds, of an observed step
    end: float  # of the run, once


def machine() -> str:
    """The processor, its cores, and torch."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model)
    busy = os.getloadavg()[0]
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}, load {busy:.1f}"


def trained(task: Task, contender: Contender, template: torch.nn.Module) -> Round:
    """One round of a contender, beside its baseline."""
    base = next(each for each in ALL if each.name == contender.baseline)
    with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as there, contextlib.ExitStack() as bare:
        pair = []
        for one, directory in ((base, there), (contender, here)):
            model = copy.deepcopy(template)
            pair.append(Training(model, task.optimizer(model), task.loss(), Path(directory), one.micro))
        plain, watched = pair
        bare.enter_context(base.attach(plain))
        with contender.attach(watched):
            for _ in range(task.warm_up):
                plain.step()
                watched.step()
            for call in watched.at_end:
                call()
            gc.collect()
            times: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
            process, thread = time.process_time(), time.thread_time()
            for _ in range(task.steps):
                for i, training in enumerate(pair):
                    wall, own = time.perf_counter(), time.thread_time()
                    training.step()
                    times[i].append((time.perf_counter() - wall, time.thread_time() - own))
            for call in watched.at_end:
                call()
            look = watched.look()
            others = (time.process_time() - process - (time.thread_time() - thread)) / task.steps
            closing = time.perf_counter()
        closed = time.perf_counter()
    (wall_before, before), (wall_after, after) = (
        [statistics.median(t) for t in zip(*times[i], strict=True)] for i in (0, 1)
    )
    others *= torch.get_num_threads() == 1  # torch's own threads are not told apart from others
    return Round(
        after, (after - before + others) / before, after / before - 1, wall_after / wall_before - 1, look, closed - closing
    )


def rounds(task: Task, contenders: Sequence[Contender], seconds: float) -> tuple[dict[str, list[Round]], dict[str, str]]:
    """As many rounds as fit into the time, one at least, or until Ctrl-C; and why some contenders are missing."""
    torch.manual_seed(0)
    template, times, missing = task.model(), defaultdict(list), dict[str, str]()
    start, last, n = time.monotonic(), 0.0, 0
    while n < 1 or time.monotonic() - start + last < seconds:
        begun = time.monotonic()
        try:
            for contender in random.sample(contenders, len(contenders)):
                if contender.name not in missing:
                    try:
                        times[contender.name].append(trained(task, contender, template))
                    except Exception as error:  # noqa: BLE001 - peers break in many ways, and the reason is the result
                        missing[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        except KeyboardInterrupt:
            break
        last, n = time.monotonic() - begun, n + 1
        print(f"  round {n}: {last:.0f} s", file=sys.stderr)
    return times, missing


def rows(name: str, threads: int, contenders: Sequence[Contender], seconds: float) -> list[dict[str, object]]:
    """The results of one model."""
    where = machine()
    times, missing = rounds(TASKS[name], contenders, seconds)
    result = []
    for contender in contenders:
        row: dict[str, object] = dict.fromkeys(FIELDS, "")
        row |= {"model": name, "threads": threads, "contender": contender.name, "kind": contender.kind, "machine": where}
        if contender.name in missing:
            row["note"] = missing[contender.name]
        elif not times[contender.name]:
            continue
        else:
            own = times[contender.name]
            middle = Round(*(statistics.median(values) for values in zip(*own, strict=True)))
            row |= {field: f"{getattr(middle, field):.4f}" for field in ("added", "thread", "wall")}
            row |= {"low": f"{min(one.added for one in own):.4f}", "high": f"{max(one.added for one in own):.4f}"}
            row |= {"step_ms": f"{1e3 * middle.step:.3f}", "end_ms": f"{1e3 * middle.end:.1f}"}
            row |= {"look_ms": "" if math.isnan(middle.look) else f"{1e3 * middle.look:.3f}"}
            row |= {"rounds": len(own), "note": f"beside {contender.baseline}"}
        result.append(row)
    return result


def chosen(patterns: Sequence[str]) -> list[Contender]:
    """The contenders of that name."""
    wanted = {c.name for c in ALL if not patterns or any(fnmatch.fnmatchcase(c.name, p) for p in patterns)}
    return [c for c in ALL if c.name in wanted and (c.kind != "bare" or c.name == "bare again")]  # the others are baselines


def stored() -> list[dict[str, str]]:
    """What overhead.csv has."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def store(fresh: Sequence[dict[str, object]]) -> None:
    """Into overhead.csv, in place of what it had of the same model, threads and contender."""

    def key(row: dict) -> tuple[int, int, int]:
        names = [c.name for c in ALL]
        at = names.index(row["contender"]) if row["contender"] in names else len(names)
        return (list(TASKS).index(row["model"]), int(row["threads"]), at)

    merged = {key(row): row for row in [*stored(), *fresh]}
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged[k] for k in sorted(merged))


def show(results: Sequence[dict]) -> None:
    """As a table."""
    for row in results:
        if row["added"] == "":
            print(f"{row['model']:9} {row['threads']}  {row['contender']:32} {row['note']}")
        else:
            added, low, high, thread, wall = (100 * float(row[name]) for name in ("added", "low", "high", "thread", "wall"))
            print(
                f"{row['model']:9} {row['threads']}  {row['contender']:32} {float(row['step_ms']):9.2f} ms {added:+8.1f} % "
                f"[{low:+.1f}, {high:+.1f}]  thread {thread:+.1f} %  wall {wall:+.1f} %  {row.get('look_ms') or '-'} ms  "
                f"end {float(row['end_ms']):.0f} ms  {row['rounds']} rounds"
            )


# --- the budget -------------------------------------------------------------------------------------------------------


def kept(name: str, budget: float, seconds: float) -> str:
    """Train under a budget, and say what was spent: as the lens says, and from outside.

    From outside: what all steps took beyond as many of those on which nothing was looked at, nor one or two steps before.
    """
    import gradlens

    task = TASKS[name]
    torch.manual_seed(0)
    model, seen, durations = task.model(), list[bool](), list[float]()
    with tempfile.TemporaryDirectory() as directory:
        training = Training(model, task.optimizer(model), task.loss(), Path(directory))
        with gradlens.watch(training.model, training.optimizer, run=directory, budget=budget) as lens:
            start = time.perf_counter()
            while time.perf_counter() - start < seconds:
                before, looked = time.perf_counter(), lens.overhead().observed
                training.step()
                durations.append(time.perf_counter() - before)
                seen.append(lens.overhead().observed > looked)
            overhead = lens.overhead()
            told = [str(finding.seen) for finding in lens.findings() if finding.rule == "budget"]
    quiet = [t for i, t in enumerate(durations) if not any(seen[max(i - 2, 0) : i + 1])]
    outside = 1 - statistics.median(quiet) * len(durations) / sum(durations)
    middle = sum(t for t, s in zip(durations, seen, strict=True) if s) / sum(seen) - statistics.median(quiet)
    text = f"{name}: {overhead}\n  from outside: an observed step takes {1e3 * middle:.2f} ms longer than a quiet one, "
    share = middle * sum(seen) / sum(durations)
    return text + f"{share:.2%} of all; all steps beyond quiet ones: {outside:.2%}. {' '.join(told)}"


# --- the plot ---------------------------------------------------------------------------------------------------------

COLOURS = {"gradlens": "#1b6ca8", "peer": "#b0b0b0", "bare": "#e0b050"}


def plot(results: Sequence[dict[str, str]], threads: int = 1) -> None:
    """Bars of the added share, a panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    there = [row for row in results if int(row["threads"]) == threads and row["kind"] == "peer"]
    names = [name for name in TASKS if any(row["model"] == name for row in there)]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 5.2), sharey=True, squeeze=False)
    labels = [c.name for c in ALL if c.kind != "bare" or c.name == "bare again"][::-1]
    for axis, name in zip(axes[0], names, strict=True):
        mine = {r["contender"]: r for r in results if r["model"] == name and int(r["threads"]) == threads and r["added"]}
        for at, label in enumerate(labels):
            if label in mine:
                row = mine[label]
                added, low, high = (100 * float(row[field]) for field in ("added", "low", "high"))
                axis.barh(at, max(added, 0.05), color=COLOURS[row["kind"]], height=0.7)
                axis.plot([max(low, 0.05), max(high, 0.05)], [at, at], color="#303030", linewidth=1)
                axis.annotate(
                    f"{added:+.1f} %", (max(high, added, 0.05), at), (4, 0), textcoords="offset points", va="center"
                )
            else:
                axis.annotate("not measured", (0.06, at), va="center", color="#808080")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(0, 40_000)
        axis.set_xticks([0, 1, 10, 100, 1000])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axis.set_title(TASKS[name].title.replace(", ", ",\n", 1), fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0][0].set_yticks(range(len(labels)), labels)
    figure.suptitle("Processor time that watching every step adds to a step, all threads (logarithmic)")
    figure.tight_layout()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--minutes", type=float, default=8.0, help="for each model and number of threads")
    parser.add_argument("--only", nargs="+", default=[], help="contenders by glob pattern")
    parser.add_argument("--budget", action="store_true", help="whether budget=0.01 is kept")
    parser.add_argument("--plot", action="store_true", help="only draw what overhead.csv has")
    parser.add_argument("--dry", action="store_true", help="print, store nothing")
    given = parser.parse_args()
    if given.plot:
        plot(stored())
        return
    quieten()
    for threads in given.threads:
        torch.set_num_threads(threads)
        for name in given.model:
            if given.budget:
                print(kept(name, 0.01, 60 * given.minutes), flush=True)
                continue
            fresh = rows(name, threads, chosen(given.only), 60 * given.minutes)
            show(fresh)
            sys.stdout.flush()
            if not given.dry:
                store(fresh)
    if not given.budget and not given.dry:
        plot(stored())


if __name__ == "__main__":
    main()
