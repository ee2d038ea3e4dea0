"""What reading gradients costs, against one plain read of the same bytes; and how that grows with the tensor.

    python benchmarks/kernels.py                     # everything: a few minutes; writes kernels.csv
    python benchmarks/kernels.py --quick             # few rounds, nothing written

The plain read is a C loop that adds every float of the gradients (`read.c`), on one thread. Cases are measured in
interleaved rounds of one process; figures are medians over rounds, ratios are taken within a round. Needs a C compiler.

    gradients   counts, sums, extremes, histogram, the 16 largest: one operand
    + weights   and the weights' norm, the product with them, their values at the largest
    + flips     and what changed against the last gradient, which is then overwritten: three operands read, one written
    compare     what the optimizer did: gradient, weights before, weights after
    sample      sixteen entries of each

In `kernels.csv`, `reads` is the time over that of the plain read of the gradients alone, `per_tensor` in microseconds. The
scale rows take one tensor of 10^5 to 10^8 weights. `no top` is the kernel compiled without looking for the largest, `rising`
a tensor whose every entry is larger than all before it, the worst case for that search. `extra_mib` is by how much one call
raised the process's peak memory, in a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import platform
import resource
import statistics
import subprocess
import sys
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

from gradlens.kernels import native, reference

HERE = Path(__file__).parent
RESULTS = HERE / "kernels.csv"
SCALE = (10**5, 10**6, 10**7, 10**8)
LINE = "{model:>12} {what:<12} {backend:<12} {threads} {milliseconds:>9} ms {reads:>8} reads {per_tensor:>9} us"
SEARCH = "if (may_belong(&s->top, above, at, o))"  # in native.c, before the search for the largest in a block


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
    flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp-simd"]
    library = ctypes.CDLL(str(compiled((HERE / "read.c").read_text(), "read", flags)))
    library.read_all.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    library.read_all.restype = ctypes.c_double

    def of(tensors: Sequence[Tensor]) -> Callable[[], object]:
        pointers, counts = array("q", [t.data_ptr() for t in tensors]), array("q", [t.numel() for t in tensors])
        return lambda: library.read_all(pointers.buffer_info()[0], counts.buffer_info()[0], len(tensors))

    return of


def without_top() -> native.Native:
    """The kernel that never looks for the largest."""
    source = (Path(native.__file__).with_name("native.c")).read_text()
    assert SEARCH in source
    flags = ["-std=gnu99", "-O3", "-fopenmp-simd", "-ffp-contract=off", "-pthread"]
    return native.load(compiled(source.replace(SEARCH, "if (0)"), "no_top", flags))


@dataclass
class Case:
    """One thing to time."""

    model: str
    what: str
    backend: str
    threads: int
    call: Callable[[], object]

    def seconds(self) -> float:
        torch.set_num_threads(self.threads)
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start


def timed(cases: Sequence[Case], rounds: int) -> dict[int, list[float]]:
    """Seconds by case, interleaved; the first case is the plain read, and what ran before warms no one's cache."""
    for case in cases:
        case.seconds()
    taken: dict[int, list[float]] = {i: [] for i in range(len(cases))}
    for _ in range(rounds):
        for i, case in enumerate(cases):
            if case.backend == "reference" and len(taken[i]) >= 3:
                continue
            taken[i].append(case.seconds())
    return taken


def rows(cases: Sequence[Case], tensors: Sequence[Tensor], rounds: int) -> list[dict[str, object]]:
    """The table's rows."""
    taken = timed(cases, rounds)
    found = []
    for i, case in enumerate(cases):
        ratios = [seconds / plain for seconds, plain in zip(taken[i], taken[0], strict=False)]
        middle = statistics.median(taken[i])
        found.append(
            {
                "model": case.model,
                "weights": sum(t.numel() for t in tensors),
                "tensors": len(tensors),
                "what": case.what,
                "backend": case.backend,
                "threads": case.threads,
                "milliseconds": f"{1e3 * middle:.4g}",
                "reads": f"{statistics.median(ratios):.3g}",
                "per_tensor": f"{1e6 * middle / len(tensors):.3g}",
                "extra_mib": "",
            }
        )
        print(LINE.format(**found[-1]))
    return found


def of_models(kernel: native.Native, read: Callable, rounds: int) -> list[dict[str, object]]:
    """Every backend on every model."""
    found = []
    for model, shapes in MODELS.items():
        gradients, weights, last, after = ([torch.randn(shape) * scale for shape in shapes] for scale in (1e-3, 1, 1e-3, 1))
        operands = gradients, [torch.nn.Parameter(w) for w in weights], last, after
        cases = [Case(model, "plain read", "read.c", 1, read(gradients))]
        for backend, threads in ((kernel, 1), (kernel, 2), (reference, 1)):
            name = "reference" if backend is reference else f"native {native.VARIANTS[kernel.variant]}"
            cases += [Case(model, what, name, threads, call) for what, call in calls(backend, *operands).items()]
        found += rows(cases, gradients, rounds)
    return found


def calls(backend: Any, g: list, w: list, last: list, after: list) -> dict[str, Callable[[], object]]:
    """What is asked of a backend."""
    return {
        "gradients": lambda: backend.summarize(g),
        "+ weights": lambda: backend.summarize(g, w),
        "+ flips": lambda: backend.summarize(g, w, last, last),
        "compare": lambda: backend.compare(g, w, after),
        "sample": lambda: backend.sample(g),
    }


def of_scale(kernel: native.Native, read: Callable, rounds: int) -> list[dict[str, object]]:
    """One tensor, larger and larger."""
    found, bare = [], without_top()
    name = f"native {native.VARIANTS[kernel.variant]}"
    for n in SCALE:
        gradient = torch.randn(n)
        rising = torch.linspace(1e-6, 1, n)
        cases = [
            Case(f"{n:.0e}", "plain read", "read.c", 1, read([gradient])),
            Case(f"{n:.0e}", "gradients", name, 1, lambda g=gradient: kernel.summarize([g])),
            Case(f"{n:.0e}", "gradients", name, 2, lambda g=gradient: kernel.summarize([g])),
            Case(f"{n:.0e}", "no top", name, 1, lambda g=gradient: bare.summarize([g])),
            Case(f"{n:.0e}", "rising", name, 1, lambda g=rising: kernel.summarize([g])),
        ]
        found += rows(cases, [gradient], rounds if n < 10**8 else max(rounds // 3, 3))
        for row in found[-len(cases) :]:
            if row["what"] == "gradients":
                row["extra_mib"] = f"{peak(n, int(str(row['threads']))):.2f}"
    return found


def peak(n: int, threads: int) -> float:
    """MiB by which summarising n weights raises the peak memory, in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import kernels; print(kernels.raised({n}, {threads}))"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def raised(n: int, threads: int) -> float:
    """Here: MiB, from before the first call to after it."""
    torch.set_num_threads(threads)
    kernel, gradient = native.load(), torch.ones(n)
    kernel.summarize([torch.ones(10)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kernel.summarize([gradient])
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def machine() -> dict[str, object]:
    """Where it ran."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    kernel, read = native.load(), reader()
    found = of_models(kernel, read, 3 if quick else 25) + of_scale(kernel, read, 3 if quick else 15)
    if not quick:
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*found[0], *machine()], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | machine() for row in found)


if __name__ == "__main__":
    main()
