"""What a killed process loses: a training is killed at random moments, again and again, and its run is read each time.

    python benchmarks/durability.py              # 100 kills, some minutes
    python benchmarks/durability.py --kills 5    # to see that it runs
    python benchmarks/durability.py --csv FILE   # adds a line a kill, as in durability.csv

Each process trains a small network with `gradlens.watch(..., run=)` as fast as it goes and tells when it began and when each
step was over, until `kill -9` ends it, after 0.1 to 2.5 seconds. The next one goes on in the same directory. Every second
process has tails of 2,000 rows in place of 100,000 and merges three parts in place of eight, so that it is killed while it
rolls and merges too. After each kill

    no step is lost that was over for more than a second      the age of the oldest lost one is in the table
    every step before those lost is there, or a finding says that it was left out: these train faster than can be written
    each observed loss is the one that training saw    bit by bit
    a torn frame is told

and at the end a lens opens the directory once more, closes it, and all rows are in Parquet files.

Measured with torch 2.13.0, pyarrow 26.0.1 on two cores (AMD EPYC) and an ext4 disk, nothing else running. durability.csv has
the 100 kills, in 18,090 steps:

    age of the oldest lost step      219 ms in the median, 485 ms at most
    steps left out or torn frames    none
    opening the run and reading all of its losses    22 ms in the median

On a machine with a load average of 6 to 13 one kill of 54 lost 1,110 ms, fourteen steps after its start: the thread that
writes has to get a processor within the second.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import select
import shutil
import signal
import statistics
import struct
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import gradlens
from gradlens.store import compaction, store, tables
from gradlens.store.store import Store

LEAST, MOST = 0.1, 2.5  #: seconds of training before the kill
_STEP = struct.Struct("<qdd")  # number, moment, loss


@dataclass
class Kill:
    """What one killed process left."""

    kill: int
    rolling: bool
    seconds: float
    steps: int  #: that were over
    thinned: int  #: steps of this directory that were left out, so far
    lost: int
    oldest_lost_ms: float  #: how long the oldest lost step had been over; 0 where none was lost
    torn_bytes: int
    files: int
    read_ms: float  #: to open the run and read all losses


def train(run: Path, first: int, rolling: bool, tell: int) -> None:
    """Train until somebody ends it."""
    case = gradlens.testing.healthy()
    if rolling:
        compaction.FAN_IN = 3
        durable = Store(run, {"first_step": first}, roll=2000)
        lens = gradlens.watch(case.model, case.optimizer, writers=[durable], first_step=first)
    else:
        lens = gradlens.watch(case.model, case.optimizer, run=run, first_step=first)
    step = first
    while True:
        data = case.batch(step)
        case.optimizer.zero_grad()
        loss = case.loss(case.model, data)
        lens.observe(loss=loss)
        loss.backward()
        case.optimizer.step()
        os.write(tell, _STEP.pack(step, time.monotonic(), loss.item()))
        step += 1


def killed(run: Path, first: int, rolling: bool, seconds: float) -> tuple[dict[int, tuple[float, float]], float]:
    """The steps of a process that is killed so many seconds after its first one, and the moment of the kill."""
    down, up = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(down)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            train(run, first, rolling, up)
        finally:
            os._exit(1)
    os.close(up)
    told, end = bytearray(), None
    while end is None or time.monotonic() < end:
        if select.select([down], [], [], 0.001)[0]:
            part = os.read(down, 1 << 16)
            if not part:
                raise RuntimeError(f"the training in {run} ended by itself")
            told += part
            end = end or time.monotonic() + seconds
    os.kill(child, signal.SIGKILL)
    moment = time.monotonic()
    while part := os.read(down, 1 << 16):
        told += part
    os.close(down)
    os.waitpid(child, 0)
    whole = len(told) - len(told) % _STEP.size
    return {step: (over, loss) for step, over, loss in _STEP.iter_unpack(bytes(told[:whole]))}, moment


def files(run: Path) -> int:
    return sum(len(tables.files(run / name)) for name in ("segments", "findings", *tables.TABLES))


def measure(run: Path, number: int, expected: dict[int, float], seconds: float) -> Kill:
    """One kill, and whether what it left is right. `expected`: the losses of all steps so far."""
    first, rolling = len(expected), number % 2 == 1
    taken, moment = killed(run, first, rolling, seconds)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened = gradlens.open_run(run)
        scalars = opened.scalars()
    read = time.perf_counter() - start
    assert len(caught) == len(opened.notes), "a torn frame was not told"
    steps = opened.steps()
    last = max(steps, default=-1)
    assert last <= max(taken) + 1, "there are steps that nobody made"
    missing = set(range(last + 1)) - set(steps)
    thinned = sum(each.value or 0 for each in opened.findings() if each.rule == "records-thinned" and each.step <= last)
    assert len(missing) <= thinned, f"{len(missing)} steps in the middle are lost, and {thinned} were left out"
    lost = [step for step in taken if step > last]
    age = max((moment - taken[step][0] for step in lost), default=0.0)
    expected |= {step: taken[step][1] if step in taken else math.nan for step in range(first, last + 1)}
    for step, loss in scalars.itertuples(index=False):
        told = expected[step]
        assert loss == told or math.isnan(told), f"step {step} has another loss"  # NaN: it was killed before it told
    torn = sum(int(note.split(":")[-1].split()[0].replace(",", "")) for note in opened.notes)
    age_ms, read_ms = round(1e3 * age, 1), round(1e3 * read, 1)
    return Kill(number, rolling, round(seconds, 3), len(taken), int(thinned), len(lost), age_ms, torn, files(run), read_ms)


def finish(run: Path, expected: dict[int, float]) -> None:
    """The next lens clears away what the killed ones have left."""
    Store(run, {"first_step": len(expected)}).close()
    opened = gradlens.open_run(run)
    assert opened.notes == []
    assert set(opened.steps()) <= set(expected)
    assert max(opened.steps()) == max(expected)
    left = [path for name in tables.TABLES for path in (run / name).iterdir() if path.suffix != ".parquet"]
    assert not left, f"{left} are left over"


def add(path: Path, kill: Kill) -> None:
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(kill)))
        if new:
            writer.writeheader()
        writer.writerow(asdict(kill))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--csv", type=Path, help="where to add a line a kill")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw, kills = random.Random(given.seed), given.kills
    results: list[Kill] = []
    root = Path(tempfile.mkdtemp())
    try:
        run, expected = root / "run", dict[int, float]()
        for number in range(kills):
            if number % 10 == 0:  # ten kills a directory
                if expected:
                    finish(run, expected)
                run, expected = root / f"run{number}", {}
            results.append(measure(run, number, expected, draw.uniform(LEAST, MOST)))
            if given.csv:
                add(given.csv, results[-1])
        finish(run, expected)
    finally:
        shutil.rmtree(root)
    ages = sorted(each.oldest_lost_ms for each in results)
    print(f"{len(results)} kills, {sum(each.steps for each in results):,} steps; each run reads, no step there twice")
    print(f"age of the oldest lost step: {statistics.median(ages):.0f} ms in the median, {ages[-1]:.0f} ms at most")
    print(f"torn frames: {sum(each.torn_bytes > 0 for each in results)}, all told")
    print(f"opening and reading all losses: {statistics.median(each.read_ms for each in results):.0f} ms in the median")
    late = sum(age > 1e3 * store.INTERVAL for age in ages)
    if late:
        raise SystemExit(f"{late} kills lost steps that had been over for more than {store.INTERVAL:g} s")


if __name__ == "__main__":
    main()
