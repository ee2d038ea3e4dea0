"""What watching costs the trainings of `loops.py`, which are of the kinds that public scripts have.

    python benchmarks/scripts.py                          # five minutes; scripts.csv
    python benchmarks/scripts.py --only gan --dry         # one of them, printed
    python docs/performance.py                            # its table, from scripts.csv

It measures what a person feels, as `overhead.py` does: wall time, every step observed, everything at its default, with a run
directory and TensorBoard's events. In a round, fresh copies of the training run bare, watched, bare, bare again and bare; a
stretch is compared with the mean of the two bare ones around it. Figures are medians over rounds with quartiles. `again` is
what the second bare stretch adds to its neighbours: what the figures can be by chance. A stretch has 5 to 120 steps after as
many to warm up, like scripts that are shrunk to seconds: many of its steps have histograms, which are rarer later in a run.

All copies start from one seed, so their losses, weights, buffers, optimizer states and random numbers must be equal bit by
bit at the end. `identical` counts the watched stretches for which that held; the program fails if it did not for one.

Columns as in `overhead.csv`, with `script`, `title` and `parameters` in place of model and contender, `again` (a share of
the bare step) and `identical` (`4 of 4`).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import math
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))

from contenders import says_of
from loops import SCRIPTS, Loop, Script
from overhead import Round, Stretch, compared, figures, machine, timed

RESULTS = Path(__file__).parent / "scripts.csv"
FIELDS = ["script", "title", "parameters", "bare_us", "added_us", "low", "high", "added", "again", "thread_us", "others"]
FIELDS += ["says", "felt", "end_ms", "identical", "rounds", "machine"]


class Run(NamedTuple):
    """A stretch of one copy, and what its training came to."""

    times: Stretch
    digest: str


def run(script: Script, watched: bool) -> Run:
    """A fresh copy of the training, from the same seed each time."""
    torch.manual_seed(0)
    loop, losses = script.start(), list[float]()
    with contextlib.ExitStack() as stack:
        says = stack.enter_context(watching(loop)) if watched else lambda: (math.nan, math.nan)
        times = timed(lambda: losses.append(loop.step()), says, script.warm_up, script.steps)
        closing = time.perf_counter()
        stack.close()
    return Run(times._replace(end=time.perf_counter() - closing), digest(loop, losses))


@contextlib.contextmanager
def watching(loop: Loop) -> Iterator:
    """`gradlens.watch` with a run directory; what it says it took so far, and of how many seconds."""
    import gradlens

    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(io.StringIO()):
        lens = gradlens.watch(loop.target, loop.optimizers, run=directory)
        with lens:
            yield says_of(lens)
        failed = [finding.seen for finding in lens.findings() if finding.rule in ("writer-failed", "gradlens-fault")]
    if failed:
        raise RuntimeError(f"what was measured is not everything: {failed}")


def digest(loop: Loop, losses: Sequence[float]) -> str:
    """Equal for trainings that are equal bit by bit."""
    state = [module.state_dict() for module in loop.modules()], [optimizer.state_dict() for optimizer in loop.optimizers]
    found = hashlib.sha256(torch.get_rng_state().numpy().tobytes() + pickle.dumps(list(losses)))
    for name, value in flat(state):
        found.update(name.encode())
        found.update(
            value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            if torch.is_tensor(value)
            else repr(value).encode()
        )
    return found.hexdigest()


def flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested containers, with where they are."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from flat(part, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for at, part in enumerate(value):
            yield from flat(part, f"{name}.{at}")
    else:
        yield name, value


def rounds(script: Script, seconds: float) -> tuple[list[Round], list[Round], list[bool]]:
    """As many rounds as fit into the time, one at least: watched, bare again, and whether the training stayed as it was."""
    watched, again, equal = [], [], []
    start, last = time.monotonic(), 0.0
    before = run(script, watched=False)
    while not watched or time.monotonic() - start + last < seconds:
        begun = time.monotonic()
        own, between, bare, after = (run(script, watched=which) for which in (True, False, False, False))
        watched.append(compared(before.times, own.times, between.times))
        again.append(compared(between.times, bare.times, after.times))
        equal.append(own.digest == before.digest == between.digest)
        before, last = after, time.monotonic() - begun
    return watched, again, equal


def row(name: str, script: Script, seconds: float) -> dict[str, object]:
    """The results of one script."""
    where = machine()
    watched, again, equal = rounds(script, seconds)
    noise = statistics.median(one.added / one.bare for one in again)
    parameters = sum(1 for module in script.start().modules() for _ in module.parameters())
    about = {"script": name, "title": script.title, "parameters": parameters, "machine": where}
    return about | figures(watched) | {"again": f"{noise:.4f}", "identical": f"{sum(equal)} of {len(equal)}"}


def show(found: dict) -> None:
    """As a line of a table."""
    bare, added, low, high = (float(found[name]) / 1000 for name in ("bare_us", "added_us", "low", "high"))
    share, again, says, felt, others = (100 * float(found[name]) for name in ("added", "again", "says", "felt", "others"))
    print(
        f"{found['script']:17} {found['parameters']:3} {bare:8.2f} ms {added:+7.2f} ms [{low:+.2f}, {high:+.2f}] "
        f"{share:+6.1f} %  bare again {again:+5.1f} %  says {says:4.1f} %, felt {felt:4.1f} %  "
        f"others {others:4.1f} % of a core  end {float(found['end_ms']):.0f} ms  identical in {found['identical']}",
        flush=True,
    )


def store(fresh: Sequence[dict]) -> None:
    """Into scripts.csv, in place of what it had of the same scripts."""
    with contextlib.suppress(FileNotFoundError), RESULTS.open(newline="") as file:
        fresh = [*csv.DictReader(file), *fresh]
    merged = {found["script"]: found for found in fresh}
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged[name] for name in SCRIPTS if name in merged)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--seconds", type=float, default=25.0, help="for each script")
    parser.add_argument("--dry", action="store_true", help="print, store nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    run(SCRIPTS["graph"], watched=True)  # what is imported and compiled once
    fresh = []
    for name in given.only:
        fresh.append(row(name, SCRIPTS[name], given.seconds))
        show(fresh[-1])
    if not given.dry:
        store(fresh)
    changed = [found["script"] for found in fresh if len(set(str(found["identical"]).split(" of "))) > 1]
    if changed:
        print(f"watching changed the training of {', '.join(map(str, changed))}", file=sys.stderr)
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
