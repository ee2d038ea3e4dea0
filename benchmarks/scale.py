"""How the cost of a look grows from 10^5 to 10^8 weights, and how much memory it takes.

    python benchmarks/scale.py                       # time and memory; writes scale.csv
    python benchmarks/scale.py memory                # this part; the rows of the other stay
    python benchmarks/scale.py --quick               # few rounds, nothing written

Time: one tensor, summarised by the native kernel. `no top` is the kernel compiled without the search for the largest, and
`rising` a tensor whose every entry is larger than all before it, the worst case for that search. Interleaved rounds,
medians; `nanoseconds` a weight, `ratio` to `no top` within a round. Needs a C compiler.

Memory: the peak resident size of a process that trains three steps, watched with `features=()` and not watched at all;
`extra_mib` is the difference, at 10^5 to 10^8 weights in few parameters and at 10^6 weights in 10 to 10,000.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from kernels import SLOW, Case, compiled, machine, timed

from gradlens.kernels import native

HERE = Path(__file__).parent
RESULTS = HERE / "scale.csv"
WEIGHTS = (10**5, 10**6, 10**7, 10**8)
PARAMETERS = (10, 100, 1000, 10_000)
SEARCH = "if (may_belong(&s->top, above, at, o))"  # in native.c, before the search for the largest in a block

TRAINED = """
import re, sys, torch, gradlens
weights, parameters, watched = map(int, sys.argv[1:])
model = torch.nn.ParameterList([torch.randn(weights // parameters) for _ in range(parameters)])
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
lens = gradlens.watch(model, optimizer, features=()) if watched else None
for step in range(3):
    optimizer.zero_grad()
    sum(p @ p for p in model).backward()
    optimizer.step()
if lens:
    lens.flush()
    assert lens.history()["step"].nunique() == 3
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)  # getrusage has the parent's peak
"""


def without_top() -> native.Native:
    """The kernel that never looks for the largest."""
    source = (Path(native.__file__).with_name("native.c")).read_text()
    assert SEARCH in source
    flags = ["-std=gnu99", "-O3", "-fopenmp-simd", "-ffp-contract=off", "-fno-strict-aliasing", "-pthread"]
    return native.load(compiled(source.replace(SEARCH, "if (0)"), "no_top", flags))


def times(rounds: int) -> list[dict[str, object]]:
    """A row a size and case."""
    kernel, bare, found = native.load(), without_top(), []
    for n in WEIGHTS:
        gradient, rising = torch.randn(n), torch.linspace(1e-6, 1, n)
        cases = [
            Case("no top", "", 1, lambda g=gradient: bare.summarize([g])),
            Case("gradients", "", 1, lambda g=gradient: kernel.summarize([g])),
            Case("gradients", "", 2, lambda g=gradient: kernel.summarize([g])),
            Case("rising", "", 1, lambda g=rising: kernel.summarize([g])),
        ]
        taken = timed(cases, rounds)
        for case, seconds in zip(cases, taken, strict=True):
            ratio = statistics.median(a / b for a, b in zip(seconds, taken[0], strict=False))
            each = 1e9 * statistics.median(seconds) / n
            row = {"what": case.what, "weights": n, "parameters": 1, "threads": case.threads}
            found.append(row | {"nanoseconds": f"{each:.3g}", "ratio": f"{ratio:.3g}", "extra_mib": ""})
            print(found[-1], flush=True)
    return found


def peak(weights: int, parameters: int, watched: bool) -> float:
    """MiB, of a process of its own."""
    command = [sys.executable, "-c", TRAINED, str(weights), str(parameters), str(int(watched))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory() -> list[dict[str, object]]:
    """A row a size and number of parameters."""
    found = []
    for weights, parameters in [*((n, 10) for n in WEIGHTS), *((10**6, n) for n in PARAMETERS[1:])]:
        extra = peak(weights, parameters, True) - peak(weights, parameters, False)
        row = {"what": "watched step", "weights": weights, "parameters": parameters, "threads": torch.get_num_threads()}
        found.append(row | {"nanoseconds": "", "ratio": "", "extra_mib": f"{extra:.1f}"})
        print(found[-1], flush=True)
    return found


PARTS = {"time": times, "memory": lambda _: memory()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    for part in given.parts or PARTS:
        found = [row | machine() for row in PARTS[part](SLOW if given.quick else 15)]
        if not given.quick:
            written(found)


def written(found: list[dict[str, object]]) -> None:
    """The rows, beside those of the other part."""
    old = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    kept = [row for row in old if row["what"] not in {row["what"] for row in found}]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + found)


if __name__ == "__main__":
    main()
