"""What a step costs in TensorBoard: gradlens beside `torch.utils.tensorboard`, in milliseconds and bytes.

    python benchmarks/tensorboard_events.py           # 150 parameters of 10,000 weights, some minutes
    python benchmarks/tensorboard_events.py --quick   # fewer rounds, to see that it runs

Both write what a user wants to see of 150 gradients at each step. SummaryWriter gets the tensors: a histogram of each, or
the norm of each. gradlens' writer gets the two snapshots that the background thread makes of a step anyhow (`backward` and
`used`), so neither pays here for reading the gradients into a table. gradlens is measured apart for the steps that write
numbers alone, that add histograms, and that draw the pictures, and as it is over a run of 1,000 steps a tenth of a second
apart. Rounds are interleaved; the figure is the median over rounds.

Measured with torch 2.13.0, tensorboard 2.21.0 on two shared cores (AMD EPYC Milan), one thread:

    a step of 150 parameters of 10,000 weights                      ms        KB
    SummaryWriter.add_histogram, each parameter                    168    1136.4
    SummaryWriter.add_scalar of the norm, each parameter           5.8       8.1
    gradlens, numbers                                              0.9       1.3
    gradlens, numbers and histograms                               5.3      87.3
    gradlens, numbers and two pictures                            25        32.5
    gradlens, a whole run of 1,000 steps                           0.9       4.1
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from gradlens import fields, kernels
from gradlens.records import Parameters, Snapshot, Stage
from gradlens.statistics.table import Piece, Table
from gradlens.writers.tensorboard import TensorBoard

PARAMETERS, ROWS, COLUMNS = 150, 100, 100


def model(seed: int = 0) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Names, gradients and weights."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"layers.{i}.weight" for i in range(PARAMETERS)]
    weights = [torch.randn(ROWS, COLUMNS, generator=generator) for _ in names]
    return names, [1e-3 * torch.randn(ROWS, COLUMNS, generator=generator) for _ in names], weights


def step(names: list[str], gradients: list[Tensor], weights: list[Tensor]) -> list[Snapshot]:
    """The snapshots of one step, as the background thread has them."""
    parameters = Parameters(tuple(names), ((ROWS, COLUMNS),) * len(names), ("float32",) * len(names))
    rows = kernels.summarize(gradients, weights, gradients)

    def snapshot(stage: Stage) -> Snapshot:
        table = Table(0, 0, stage, parameters, 0.0, notes=[None] * len(names), pieces=[Piece(range(len(names)), rows)])
        return table.unpack([tensor.numpy() for tensor in table.pack()], {"loss": 1.0})

    backward, used = snapshot(Stage.BACKWARD), snapshot(Stage.USED)
    moved = kernels.compare(gradients, weights, [w - 0.01 * g for w, g in zip(weights, gradients, strict=True)]).numpy()
    columns = {field.name: moved[:, i] for i, field in enumerate(fields.UPDATES)}
    return [backward, replace(used, columns={**used.columns, **columns})]


def sizes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


class Peer:
    """SummaryWriter, with one call a parameter."""

    def __init__(self, directory: Path, add: Callable[[SummaryWriter, str, Tensor, int], None]) -> None:
        # A queue of one, so that the writing itself is measured and not only the handing over.
        self._writer, self._add = SummaryWriter(str(directory), max_queue=1), add
        self._names, self._gradients, _ = model()

    def step(self, number: int) -> None:
        for name, gradient in zip(self._names, self._gradients, strict=True):
            self._add(self._writer, name, gradient, number)
        self._writer.flush()


def add_histogram(writer: SummaryWriter, name: str, gradient: Tensor, number: int) -> None:
    writer.add_histogram(name, gradient, number)


def add_norm(writer: SummaryWriter, name: str, gradient: Tensor, number: int) -> None:
    writer.add_scalar(name, gradient.norm(), number)


class Ours:
    """gradlens' writer, made to write numbers alone, or histograms or pictures at each step."""

    def __init__(self, directory: Path, *, histograms: bool = False, pictures: bool = False) -> None:
        self._writer = TensorBoard(directory, interval=0.0)
        self._snapshots = step(*model())
        self._histograms, self._pictures = histograms, pictures

    def step(self, number: int) -> None:
        writer = self._writer
        writer._histograms._next = 0 if self._histograms else 1 << 60
        writer._pictures._next = 0 if self._pictures else 1 << 60
        for snapshot in self._snapshots:
            writer.write(replace(snapshot, step=number, time=0.1 * number))


def measure(rounds: int) -> Iterator[tuple[str, float, float]]:
    """What, milliseconds a step, bytes a step."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        made: dict[str, Callable[[Path], Peer | Ours]] = {
            "SummaryWriter.add_histogram, each parameter": lambda path: Peer(path, add_histogram),
            "SummaryWriter.add_scalar of the norm, each parameter": lambda path: Peer(path, add_norm),
            "gradlens, numbers": Ours,
            "gradlens, numbers and histograms": lambda path: Ours(path, histograms=True),
            "gradlens, numbers and two pictures": lambda path: Ours(path, pictures=True),
        }
        ways = {name: (root / str(i), make(root / str(i))) for i, (name, make) in enumerate(made.items())}
        times: dict[str, list[float]] = {name: [] for name in ways}
        before = dict.fromkeys(ways, 0)
        for number in range(rounds + 2):
            for name, (directory, way) in ways.items():
                took = timed(lambda way=way, number=number: way.step(number))  # type: ignore[misc]
                if number >= 2:  # the first rounds import, describe tags and open a step
                    times[name].append(took)
                else:
                    before[name] = sizes(directory)
        for name, (directory, _) in ways.items():
            yield name, statistics.median(times[name]), (sizes(directory) - before[name]) / rounds


def whole_run(steps: int) -> tuple[float, float]:
    """Milliseconds and bytes a step of the writer as users have it, over a run; opening and closing included."""
    snapshots = step(*model())
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        writer = TensorBoard(temporary)
        for number in range(steps):
            for snapshot in snapshots:
                writer.write(replace(snapshot, step=number, time=0.1 * number))
        writer.close()
        return 1e3 * (time.perf_counter() - start) / steps, writer.path.stat().st_size / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(f"{'a step of ' + str(PARAMETERS) + ' parameters of 10,000 weights':<56}{'ms':>10}{'KB':>10}")
    for name, milliseconds, size in measure(3 if quick else 20):
        print(f"{name:<56}{milliseconds:>10.2f}{size / 1000:>10.1f}")
    steps = 200 if quick else 1000
    milliseconds, size = whole_run(steps)
    print(f"{f'gradlens, a whole run of {steps:,} steps':<56}{milliseconds:>10.2f}{size / 1000:>10.1f}")


if __name__ == "__main__":
    main()
