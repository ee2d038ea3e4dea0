"""What reading gradients costs, backend by backend, against one plain read of the same bytes.

    python benchmarks/kernels.py                     # every part, some minutes each; writes kernels.csv
    python benchmarks/kernels.py types sizes         # these parts; the rows of the others stay
    python benchmarks/kernels.py --quick             # few rounds, nothing written

    models      a ResNet-18, a small GPT and 1,000 tensors of 20 entries, in float32
    columns     what each group of columns adds to a step, on tensors of 1,024 entries to 262,144: nanoseconds a weight
    types       4 million entries of float32, bfloat16 and float64
    sizes       one float32 tensor of 10^3 to 10^8 entries

The plain read is a C loop that adds every eight bytes of the gradients (`read.c`), on one thread. Cases are measured in
interleaved rounds of one process; figures are medians over rounds, ratios are taken within a round. Needs a C compiler.

    gradients   counts, sums, extremes, histogram, the 16 largest: one operand
    + weights   and the weights' norm, the product with them, their values at the largest
    + flips     and what changed against the last gradient, which is then overwritten: three operands read, one written
    compare     what the optimizer did: gradient, weights before, weights after
    sample      sixteen entries of each
    light       rows without histograms, as on steps without detail: `+ flips` is then `light + flips`
    prepared    `read` and `compare` of a prepared call, gradients looked at again: what a steady step costs

Figures are good for documents only from a quiet machine: no other process, and the `least` column near `reads`.

In `kernels.csv`, `reads` is the time over that of the plain read of the gradients alone, `least` the smallest such ratio of
all rounds, `per_tensor` microseconds. The last gradients are a list that is known to stay where it is, as in a watched step.
How the cost grows up to 10^8 weights, and what memory it takes, is in `scale.py`.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import platform
import statistics
import subprocess
import sysconfig
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradlens import kernels
from gradlens.kernels import batched, native, reference

HERE = Path(__file__).parent
RESULTS = HERE / "kernels.csv"
SIZES = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8)
TYPES = (torch.float32, torch.bfloat16, torch.float64)
SLOW = 3  #: rounds of what takes seconds
LINE = (
    "{case:>12} {what:<11} {backend:<14} {threads} {milliseconds:>9} ms {reads:>8} reads, at best {least:>8} {per_tensor} us"
)


def resnet() -> list[tuple[int, ...]]:
    """A ResNet-18 for ImageNet: 11.7 million weights in 62 tensors."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for stage in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(stage, width, 3, 3), (stage,), (stage,), (stage, stage, 3, 3), (stage,), (stage,)]
            if block == 0 and stage != width:
                shapes += [(stage, width, 1, 1), (stage,), (stage,)]
            width = stage
    return [*shapes, (1000, 512), (1000,)]


def gpt(width: int = 288, layers: int = 12, words: int = 14_000) -> list[tuple[int, ...]]:
    """A small GPT: 16 million weights in 148 tensors."""
    block: list[tuple[int, ...]] = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(words, width), (128, width), *block * layers, (width,), (width,)]


MODELS = {"resnet": resnet(), "gpt": gpt(), "1,000 tiny": [(4, 5)] * 1000}


def compiled(source: str, name: str, flags: Sequence[str]) -> Path:
    """A library of a C source."""
    folder = Path(tempfile.mkdtemp())
    (folder / f"{name}.c").write_text(source)
    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    library = folder / f"{name}.so"
    subprocess.run([compiler, "-shared", "-fPIC", *flags, f"{folder}/{name}.c", "-lm", "-o", str(library)], check=True)
    return library


def reader() -> Callable[[Sequence[Tensor]], Callable[[], object]]:
    """Makes the plain read of some tensors."""
    library = ctypes.CDLL(str(compiled((HERE / "read.c").read_text(), "read", ["-O3", "-march=native"])))
    library.read_all.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    library.read_all.restype = ctypes.c_uint64

    def of(tensors: Sequence[Tensor]) -> Callable[[], object]:
        pointers, words = array("q", [t.data_ptr() for t in tensors]), array("q", [t.nbytes // 8 for t in tensors])
        return lambda: library.read_all(pointers.buffer_info()[0], words.buffer_info()[0], len(tensors))

    return of


@dataclass
class Case:
    """One thing to time."""

    what: str
    backend: str
    threads: int
    call: Callable[[], object]

    def seconds(self) -> float:
        torch.set_num_threads(self.threads)
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start


def timed(cases: Sequence[Case], rounds: int) -> list[list[float]]:
    """Seconds of each case by round, interleaved, after one round that does not count."""
    slow = [case.seconds() > 0.5 for case in cases]
    taken: list[list[float]] = [[] for _ in cases]
    for turn in range(rounds):
        for i, case in enumerate(cases):
            if turn < SLOW or not slow[i]:
                taken[i].append(case.seconds())
    return taken


def rows(name: str, cases: Sequence[Case], tensors: Sequence[Tensor], rounds: int) -> list[dict[str, object]]:
    """The table's rows; the first case is the plain read."""
    taken = timed(cases, rounds)
    found: list[dict[str, object]] = []
    for case, seconds in zip(cases, taken, strict=True):
        ratios = [mine / plain for mine, plain in zip(seconds, taken[0], strict=False)]
        middle = statistics.median(seconds)
        found.append(
            {
                "case": name,
                "weights": sum(t.numel() for t in tensors),
                "tensors": len(tensors),
                "type": str(tensors[0].dtype).removeprefix("torch."),
                "what": case.what,
                "backend": case.backend,
                "threads": case.threads,
                "milliseconds": f"{1e3 * middle:.4g}",
                "reads": f"{statistics.median(ratios):.3g}",
                "least": f"{min(ratios):.3g}",
                "per_tensor": f"{1e6 * middle / len(tensors):.3g}",
            }
        )
        print(LINE.format(**found[-1]), flush=True)
    return found


def levels() -> list[tuple[str, int, Any]]:
    """The native kernel on one thread and on two, then as processors that can less would run it."""
    best = native.load()
    name = f"native {native.VARIANTS[best.variant]}"
    lower = [native.Native(best.library, variant, best.introspector) for variant in reversed(range(best.variant))]
    return [
        (name, 1, best),
        (name, 2, best),
        *((f"native {native.VARIANTS[kernel.variant]}", 1, kernel) for kernel in lower),
    ]


TORCH: list[tuple[str, int, Any]] = [("batched", 1, batched), ("reference", 1, reference)]


def calls(backend: Any, g: list, w: list, last: native.StableTensors, after: list) -> dict[str, Callable[[], object]]:
    """What is asked of a backend."""
    return {
        "gradients": lambda: backend.summarize(g, None, None, None),
        "+ weights": lambda: backend.summarize(g, w, None, None),
        "+ flips": lambda: backend.summarize(g, w, last, last),
        "compare": lambda: backend.compare(g, w, after, None),
        "sample": lambda: backend.sample(g),
        "light": lambda: backend.summarize(g, None, None, None, False),
        "light + flips": lambda: backend.summarize(g, w, last, last, False),
    }


def measured(
    name: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype, backends: Sequence[tuple[str, int, Any]], rounds: int
) -> list[dict[str, object]]:
    """Tensors of these shapes, asked everything of every backend."""
    g, w, last, after = ([(torch.randn(*shape) * scale).to(dtype) for shape in shapes] for scale in (1e-3, 1, 1e-3, 1))
    cases = [Case("plain read", "read.c", 1, reader()(g))]
    for backend, threads, kernel in backends:
        parameters, kept = [torch.nn.Parameter(t) for t in w], native.StableTensors(last)
        asked = calls(kernel, g, parameters, kept, after)
        if backend == levels()[0][0]:
            asked |= {f"prepared {what}": call for what, call in steady(g, parameters, kept).items()}
        cases += [Case(what, backend, threads, call) for what, call in asked.items()]
    return rows(name, cases, g, rounds)


def steady(g: list, w: list, last: native.StableTensors) -> dict[str, Callable[[], object]]:
    """The calls of a steady step."""
    before = native.StableTensors([torch.empty_like(t.detach()) for t in w])
    prepared = kernels.prepare(w, last, before)
    prepared.read(g)
    return {
        "read": lambda: prepared.read(g),
        "light read": lambda: prepared.read(g, False),
        "unchanged": lambda: prepared.unchanged(g),
        "moved": lambda: prepared.compare(g),
    }


def groups(g: list, w: list, last: list) -> dict[str, Callable[[], object]]:
    """Calls that have one group of columns more each, then those of a steady step."""
    kept, (_, _, kernel) = native.StableTensors(last), levels()[0]
    return {
        "light": lambda: kernel.summarize(g, None, None, None, False),
        "light + weights": lambda: kernel.summarize(g, w, None, None, False),
        "light + flips": lambda: kernel.summarize(g, w, kept, None, False),
        "light + flips + keep": lambda: kernel.summarize(g, w, kept, kept, False),
        "gradients": lambda: kernel.summarize(g),
    } | steady(g, w, kept)


def columns(rounds: int) -> list[dict[str, object]]:
    """What each group of columns costs a weight."""
    found = []
    for n, count in ((1024, 200), (16_384, 40), (65_536, 20), (262_144, 20)):
        g, w, last = ([torch.randn(n) * scale for _ in range(count)] for scale in (1e-3, 1, 1e-3))
        cases = [Case("plain read", "read.c", 1, reader()(g))]
        cases += [Case(what, "native", 1, call) for what, call in groups(g, w, last).items()]
        for row in rows(f"{count} of {n}", cases, g, rounds):
            found.append(row)
            print(f"    {float(str(row['milliseconds'])) * 1e6 / n / count:.3f} ns a weight: {row['what']}", flush=True)
    return found


def models(rounds: int) -> list[dict[str, object]]:
    """Every backend on every model."""
    return [
        row for name, shapes in MODELS.items() for row in measured(name, shapes, torch.float32, levels() + TORCH, rounds)
    ]


def types(rounds: int) -> list[dict[str, object]]:
    """Every backend on every type."""
    many = [(1_000_000,)] * 4
    return [row for dtype in TYPES for row in measured("4 million", many, dtype, levels() + TORCH, rounds)]


def sizes(rounds: int) -> list[dict[str, object]]:
    """Every backend on tensors of every size; the torch ones up to 10^7, where they take a second and more."""
    found = []
    for n in SIZES:
        backends = levels() + (TORCH if n <= 10**7 else [])
        found += measured(f"{n:.0e}", [(n,)], torch.float32, backends, rounds if n < 10**8 else SLOW)
    return found


def machine() -> dict[str, object]:
    """Where it ran."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


PARTS: dict[str, Callable[[int], list[dict[str, object]]]] = {
    "models": models,
    "columns": columns,
    "types": types,
    "sizes": sizes,
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    for part in given.parts or PARTS:
        found = [{"part": part} | row | machine() for row in PARTS[part](SLOW if given.quick else 21)]
        if given.quick:
            continue
        kept = [row for row in csv.DictReader(RESULTS.open()) if row["part"] != part] if RESULTS.exists() else []
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(kept + found, key=lambda row: list(PARTS).index(str(row["part"]))))


if __name__ == "__main__":
    main()
