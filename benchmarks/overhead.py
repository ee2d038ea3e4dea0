"""What watching costs a training: gradlens in several settings, and what else people use.

    pip install -c constraints.txt -r benchmarks/requirements.txt   # the peers; those that are missing are left out
    python benchmarks/overhead.py                                   # everything: an hour or two; overhead.csv and the plot
    python benchmarks/overhead.py --model mlp-8 gpt --minutes 3 --only 'bare*' 'gradlens*' '*norm*'
    python benchmarks/overhead.py --model gpt --only 'gradlens, first steps'            # each with histograms
    python benchmarks/overhead.py --budget                          # whether budget=0.01 is kept
    python benchmarks/overhead.py --plot                            # docs/images/overhead.png from overhead.csv

What is measured is what a person feels: wall time, with everything on. In a round, each contender trains a fresh copy of
the model for some steps, in random order, and between any two of them a bare copy trains for as many. A contender's cost is
its time minus the mean of the two bare stretches around it, so slow drifts of the machine cancel; background threads compete
with the training as they would, for the cores and for Python's lock. Figures are medians over rounds with quartiles; `bare
again`, a bare stretch between bare stretches, says what they can be by chance. Run it on a machine that does nothing else.

Columns: `bare_us` a step; `added_us` a step, `low` and `high` its quartiles; `added` its share of the bare step; `thread_us`
of that, processor time of the training thread; `others` the share of one core that all other threads take while training
(torch on one thread only); `says` what the lens itself says it took of these steps (`lens.overhead()`), beside `felt`, what
it took: added / (bare + added). `end_ms` is what closing took, once.
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
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))

from contenders import ALL, Contender, Training, quieten
from models import TASKS, Task

HERE = Path(__file__).parent
RESULTS = HERE / "overhead.csv"
PLOT = HERE.parent / "docs" / "images" / "overhead.png"
FIELDS = ["model", "threads", "contender", "kind", "bare_us", "added_us", "low", "high", "added", "thread_us", "others"]
FIELDS += ["says", "felt", "end_ms", "rounds", "note", "machine"]
BARE = ALL[0]
SETTLED = 100  #: steps after which one in ten has histograms; the first ones all have
QUICK = ("mlp-8", "mlp-42", "mlp-202", "gpt", "thousand")
FEW = ("bare again", "gradlens", "gradlens, features=()", "gradlens, not looking", "one norm*", "wandb*")


class Stretch(NamedTuple):
    """Of some steps: seconds each, and what the contender says."""

    wall: float
    thread: float
    others: float  # processor time of other threads, as a share of the wall time
    says: float
    end: float = 0.0  # seconds, once


class Round(NamedTuple):
    """Of a contender, beside the bare stretches around it: seconds a step."""

    bare: float
    added: float
    thread: float
    others: float
    says: float
    end: float


def machine() -> str:
    """The processor, its cores, and torch."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model)
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"


def stretch(task: Task, contender: Contender, template: torch.nn.Module) -> Stretch:
    """A fresh copy of the model trained by a contender: some steps to warm up, then those that count."""
    with tempfile.TemporaryDirectory() as directory:
        model = copy.deepcopy(template)
        training = Training(model, task.optimizer(model), task.loss(), Path(directory), contender.micro)
        steps = max(task.steps // contender.micro, 2)
        with contender.attach(training):
            own = timed(training.step, training.says, warm_up(task, contender), steps)
            closing = time.perf_counter()
        return own._replace(end=time.perf_counter() - closing)


def warm_up(task: Task, contender: Contender) -> int:
    """Steps before those that count."""
    return max(task.warm_up, SETTLED) if contender.settles else task.warm_up


def timed(step: Callable[[], object], says: Callable[[], tuple[float, float]], warm_up: int, steps: int) -> Stretch:
    """Some steps to warm up, then those that count."""
    for _ in range(warm_up):
        step()
    gc.collect()
    said = says()
    wall, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
    for _ in range(steps):
        step()
    wall, thread, process = time.perf_counter() - wall, time.thread_time() - thread, time.process_time() - process
    took, of = (now - before for now, before in zip(says(), said, strict=True))
    others = (process - thread) / wall if torch.get_num_threads() == 1 else math.nan
    return Stretch(wall / steps, thread / steps, others, took / of if of > 0 else math.nan)


def compared(before: Stretch, own: Stretch, after: Stretch) -> Round:
    """A contender's stretch against the bare ones around it."""
    bare, thread = (statistics.fmean((getattr(before, name), getattr(after, name))) for name in ("wall", "thread"))
    return Round(bare, own.wall - bare, own.thread - thread, own.others, own.says, own.end)


def rounds(task: Task, contenders: Sequence[Contender], seconds: float) -> tuple[dict[str, list[Round]], dict[str, str]]:
    """As many rounds as fit into the time, one at least, or until Ctrl-C; and why some contenders are missing."""
    torch.manual_seed(0)
    template, times, missing = task.model(), defaultdict(list), dict[str, str]()
    baselines = {c.baseline: next(b for b in ALL if b.name == c.baseline) for c in contenders}
    start, last, n = time.monotonic(), 0.0, 0
    while n < 1 or time.monotonic() - start + last < seconds:
        begun = time.monotonic()
        try:
            for name, baseline in baselines.items():
                bare = stretch(task, baseline, template)
                mine = [c for c in contenders if c.baseline == name and c.name not in missing]
                for contender in random.sample(mine, len(mine)):
                    try:
                        own = stretch(task, contender, template)
                    except Exception as error:  # noqa: BLE001 - peers break in many ways, and the reason is the result
                        missing[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
                        continue
                    after = stretch(task, baseline, template)
                    times[contender.name].append(compared(bare, own, after))
                    bare = after
        except KeyboardInterrupt:
            break
        last, n = time.monotonic() - begun, n + 1
        print(f"  round {n}: {last:.0f} s", file=sys.stderr)
    return times, missing


def shorter(task: Task) -> Task:
    """Half as long, so that some rounds fit into the time of `--quick`."""
    return replace(task, steps=task.steps // 2, warm_up=task.warm_up // 2)


def rows(task: Task, name: str, threads: int, contenders: Sequence[Contender], seconds: float) -> list[dict[str, object]]:
    """The results of one model."""
    where = machine()
    times, missing = rounds(task, contenders, seconds)
    result = []
    for contender in contenders:
        row: dict[str, object] = dict.fromkeys(FIELDS, "")
        row |= {"model": name, "threads": threads, "contender": contender.name, "kind": contender.kind, "machine": where}
        if contender.name in missing:
            row["note"] = missing[contender.name]
        elif not times[contender.name]:
            continue
        else:
            row |= figures(times[contender.name]) | {"note": f"beside {contender.baseline}"}
        result.append(row)
    return result


def figures(own: Sequence[Round]) -> dict[str, object]:
    middle = Round(*(statistics.median(values) for values in zip(*own, strict=True)))
    added = sorted(one.added for one in own)
    low, _, high = statistics.quantiles(added, n=4, method="inclusive") if len(added) > 1 else (added * 3)
    shares = {"added": middle.added / middle.bare, "felt": middle.added / (middle.bare + middle.added)}
    shares |= {"others": middle.others, "says": middle.says}
    times = {"bare_us": middle.bare, "added_us": middle.added, "low": low, "high": high, "thread_us": middle.thread}
    return {
        **{name: "" if math.isnan(share) else f"{share:.4f}" for name, share in shares.items()},
        **{name: f"{1e6 * seconds:.1f}" for name, seconds in times.items()},
        "end_ms": f"{1e3 * middle.end:.1f}",
        "rounds": len(own),
    }


def chosen(patterns: Sequence[str]) -> list[Contender]:
    """The contenders of that name."""
    wanted = {c.name for c in ALL if not patterns or any(fnmatch.fnmatchcase(c.name, p) for p in patterns)}
    return [c for c in ALL if c.name in wanted and (c.kind != "bare" or c.name == "bare again")]  # the others are baselines


def stored() -> list[dict[str, str]]:
    """What overhead.csv has."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("bare_us") is not None]  # without those measured otherwise


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
        start = f"{row['model']:9} {row['threads']}  {row['contender']:32}"
        if row["added"] == "":
            print(start, row["note"])
            continue
        says = f"  says {100 * float(row['says']):.1f} %, felt {100 * float(row['felt']):.1f} %" if row["says"] else ""
        others = f"  others {100 * float(row['others']):.0f} % of a core" if row["others"] else ""
        print(
            f"{start} {float(row['bare_us']):10.0f} us {float(row['added_us']):+9.0f} us [{float(row['low']):+.0f}, "
            f"{float(row['high']):+.0f}] {100 * float(row['added']):+7.1f} %  thread {float(row['thread_us']):+.0f} us"
            f"{others}{says}  end {float(row['end_ms']):.0f} ms  {row['rounds']} rounds"
        )


# --- the budget -------------------------------------------------------------------------------------------------------


def kept(name: str, budget: float, seconds: float) -> str:
    """Train under a budget, and say what was spent: as the lens says, and against bare stretches before and after."""
    import gradlens

    task = TASKS[name]
    torch.manual_seed(0)
    template = task.model()
    before = stretch(task, BARE, template)
    model = copy.deepcopy(template)
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(None):
        training = Training(model, task.optimizer(model), task.loss(), Path(directory))
        with gradlens.watch(training.model, training.optimizer, run=directory, budget=budget) as lens:
            start = time.perf_counter()
            while time.perf_counter() - start < seconds:
                training.step()
            took = (time.perf_counter() - start) / training.steps
            overhead = lens.overhead()
            told = [str(finding.seen) for finding in lens.findings() if finding.rule == "budget"]
    after = stretch(task, BARE, template)
    bare = statistics.fmean((before.wall, after.wall))
    spread = abs(before.wall - after.wall) / bare
    return f"{name}: {overhead}\n  felt: {took / bare - 1:+.2%}; the bare stretches differ by {spread:.1%}. {' '.join(told)}"


# --- the plot ---------------------------------------------------------------------------------------------------------

COLOURS = {"gradlens": "#1b6ca8", "peer": "#b0b0b0", "bare": "#e0b050"}


def plot(results: Sequence[dict[str, str]], threads: int = 1) -> None:
    """Bars of the added share, a panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    there = [row for row in results if int(row["threads"]) == threads and row["kind"] == "peer" and row["added"]]
    names = [name for name in TASKS if any(row["model"] == name for row in there)]
    seen = {row["contender"] for row in results if int(row["threads"]) == threads and row["added"]}
    labels = [c.name for c in ALL if c.name in seen and (c.kind != "bare" or c.name == "bare again")][::-1]
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(3.4 * len(names), 1.6 + 0.25 * len(labels)), sharey=True, squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        mine = {r["contender"]: r for r in results if r["model"] == name and int(r["threads"]) == threads and r["added"]}
        for at, label in enumerate(labels):
            if label in mine:
                row = mine[label]
                added = 100 * float(row["added"])
                low, high = (100 * float(row[field]) / float(row["bare_us"]) for field in ("low", "high"))
                axis.barh(at, max(added, 0.05), color=COLOURS[row["kind"]], height=0.7)
                axis.plot([max(low, 0.05), max(high, 0.05)], [at, at], color="#303030", linewidth=1)
                axis.annotate(
                    f"{added:+.1f} %", (max(high, added, 0.05), at), (4, 0), textcoords="offset points", va="center"
                )
            else:
                axis.annotate("not measured", (0.06, at), va="center", color="#808080")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(0, 60_000)
        axis.set_xticks([0, 10, 1000])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axis.set_title(TASKS[name].title.replace(", ", ",\n", 1), fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0][0].set_yticks(range(len(labels)), labels)
    figure.suptitle("Wall time that watching every step adds to a step (logarithmic)")
    figure.tight_layout()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--minutes", type=float, default=8.0, help="for each model and number of threads")
    parser.add_argument("--only", nargs="+", default=[], help="contenders by glob pattern")
    parser.add_argument("--quick", action="store_true", help="five models, six contenders, one thread: some 13 minutes")
    parser.add_argument("--warm-up", type=int, help="steps before those that count")
    parser.add_argument("--budget", action="store_true", help="whether budget=0.01 is kept")
    parser.add_argument("--plot", action="store_true", help="only draw what overhead.csv has")
    parser.add_argument("--dry", action="store_true", help="print, store nothing")
    given = parser.parse_args()
    if given.plot:
        plot(stored())
        return
    if given.quick:
        given.model, given.threads, given.minutes, given.only = list(QUICK), [1], 2.5, list(FEW)
    quieten()
    for threads in given.threads:
        torch.set_num_threads(threads)
        for name in given.model:
            if given.budget:
                print(kept(name, 0.01, 60 * given.minutes), flush=True)
                continue
            task = shorter(TASKS[name]) if given.quick else TASKS[name]
            if given.warm_up is not None:
                task = replace(task, warm_up=given.warm_up)
            fresh = rows(task, name, threads, chosen(given.only), 60 * given.minutes)
            show(fresh)
            sys.stdout.flush()
            if not given.dry:
                store(fresh)
    if not given.budget and not given.dry:
        plot(stored())


if __name__ == "__main__":
    main()
