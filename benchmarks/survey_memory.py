"""What a survey of a sample takes, beside the model: peak resident memory and seconds.

    python benchmarks/survey_memory.py                               # 10^8 weights in float32, a million of them surveyed
    python benchmarks/survey_memory.py --layers 40 --dtype bfloat16  # 10^9

A table of rows is looked up in a few places a batch, so that the arithmetic is little and the memory is all that counts.
"""

from __future__ import annotations

import argparse
import threading
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from gradlens.probes.survey import BYTES, survey

WIDTH = 5_000


def resident() -> int:
    """Bytes of this process that are in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak:
    """The most that was resident while it ran."""

    def __enter__(self) -> Peak:
        self.start = self.most = resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, resident())

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="of 25 million weights each")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sample", type=int, default=1_000_000)
    parser.add_argument("--top", action="store_true", help="survey the most sensitive ones instead")
    parser.add_argument("--batches", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = nn.Embedding(WIDTH * options.layers, WIDTH, dtype=getattr(torch, options.dtype))
    batches = [torch.randint(0, model.num_embeddings, (64,)) for _ in range(options.batches)]
    kind = "top" if options.top else "sample"
    started = time.time()
    with warnings.catch_warnings(action="ignore"), Peak() as peak:
        found = survey(
            model, lambda m, rows: m(rows).float().square().mean(), batches, **{kind: options.sample}, progress=False
        )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    over, statistics = peak.most - peak.start, len(found) * BYTES
    told = f"{found.total:,} weights of {options.dtype} ({size / 2**30:.2f} GiB), {kind} {len(found):,}"
    print(
        f"{told}, {options.batches} batches: {time.time() - started:.0f} s, {over / 2**30:.2f} GiB beside the model = "
        f"{(over - statistics) / size:.2f} models and {statistics / 2**30:.2f} GiB of statistics"
    )


if __name__ == "__main__":
    main()
