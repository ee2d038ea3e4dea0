"""What questions of a large model take: memory beyond the training's own, and time beside a torch.topk of its gradient.

    python benchmarks/questions.py [weights]

Aims, at 1e8 weights: 64 MiB (the result of gradient() apart), half a topk.
"""

import sys
import time

import torch

import gradlens

ORDERS = ("sensitivity", "saliency", "value", "partial")


def peak():
    """The most memory that this process has had, in MiB."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def measured(ask):
    """Peak memory beyond what is there before, and the least of three times, in seconds."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, times = peak(), []
    for _ in range(3):
        start = time.perf_counter()
        ask()
        times.append(time.perf_counter() - start)
    return peak() - before, min(times)


def main():
    n = int(float(sys.argv[1])) if len(sys.argv) > 1 else 10**8
    torch.set_num_threads(1)
    weight, small = torch.nn.Parameter(torch.randn(n)), torch.nn.Parameter(torch.randn(10))
    lens = gradlens.watch({"weight": weight, "small": small}, rules=(), features=())
    (weight.square().sum() + small.sum()).backward()
    torch.randn(n, out=weight.grad)
    lens.weights(top=1)  # imports pandas
    _, topk = measured(lambda: torch.topk(weight.grad.abs_(), 16))
    torch.randn(n, out=weight.grad)
    print(f"{n:,} weights; torch.topk {topk:.2f} s")
    questions = {f"weights(top=16, by={by!r})": lambda by=by: lens.weights(top=16, by=by) for by in ORDERS}
    questions |= {f"weights(top=10_000, by={by!r})": lambda by=by: lens.weights(top=10_000, by=by) for by in ORDERS[:2]}
    questions |= {"explain()": lambda: lens.explain("weight", n // 2), "report()": lens.report, "gradient()": lens.gradient}
    for name, ask in questions.items():
        memory, seconds = measured(ask)
        memory -= n * 4 / 2**20 if name == "gradient()" else 0
        print(f"{name:38s} {memory:6.0f} MiB {seconds:6.2f} s {seconds / topk:5.2f} of a topk")


if __name__ == "__main__":
    main()
