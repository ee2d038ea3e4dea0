"""Writes docs/acceptance.md: run `python docs/acceptance.py`. A test keeps the file up to date.

The page is read from the tests that prove it, without importing them. A test says what it proves with a mark:

    @pytest.mark.situation("DDP, no_sync", stages={"backward": "yes", "reduced": "marked: ..."}, note="...")
    @pytest.mark.trap(17)

Tests of the same situation share a row. A stage's words begin with `yes` (exact), `marked` (there, and the record or a
finding says what is special about it) or `no` (and why). A stage that is left out does not arise, or is as everywhere.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STAGES = ("backward", "accumulated", "reduced", "used", "updates")
WORDS = ("yes", "marked", "no")

#: What naive captures get wrong, each proved by a test that such a capture fails.
TRAPS = {
    1: "a second backward: its own partials, not a difference of two `.grad`s",
    2: "`retain_graph`: two backwards through one graph",
    3: "a tied parameter, and one that is used five times",
    4: "a tied parameter in two reentrant checkpoints",
    5: "everything inside reentrant checkpoints is one record",
    6: "a backward that returns None leaves a stale `.grad`",
    7: "an unused parameter with `.grad` None, stale, or zeros",
    8: "`autograd.grad` works as before and makes no record",
    9: "MAML's inner and outer loop",
    10: "frozen, then unfrozen",
    11: "replaced parameters: assignment, `assign=True`, weight_norm, LoRA",
    12: "`.double()` in swap mode works, and capture recovers",
    13: "`.to()` on wrapper subclasses, which swaps",
    14: "an error inside our own hooks: training is bit-identical, and DDP's next iteration lives",
    15: "a user's failing backward, then a good one",
    16: "callbacks run in order with DDP's, bucket views both ways",
    17: "`no_sync`",
    18: "`find_unused_parameters`, other parameters on each rank: no deadlock",
    19: "`static_graph` with reentrant checkpoints",
    20: "FSDP2: sharded, empty shard, no sync, a scan between forward and backward",
    21: "the norm of a Partial gradient",
    22: "`DTensor.item()` is local",
    23: "GradScaler: scaled hooks, `unscale_`, fused, inf with and without fused",
    24: "closures, and Lightning's optimization",
    25: "`super().step()` fires twice",
    26: "accelerate's AcceleratedOptimizer",
    27: "an optimizer inside backward: values, and no more memory at the peak",
    28: "compiled before and after; a compiled training step is not compiled again, and warns of nothing",
    29: "compiled autograd drops callbacks: read at the step",
    30: "deepcopy, pickle, torch.save, EMA, jit, export, spawn: no warning",
    31: "the model is freed while the lens lives",
    32: "the lens is freed, hooks are gone, two watches",
    33: "a forked child is silent",
    34: "bits of weights and of the random state",
    35: "`create_graph`: no graph is kept",
    36: "backward inside autocast: wide statistics",
    37: "the user's default dtype and device",
    38: "fp16, bf16, 1e20, 1e-30, and norms of many elements",
    39: "sparse, complex, channels_last, expanded, 0-dim, empty, meta, float8, lazy",
    40: "records do not alias `.grad`",
    41: "finite differences with dropout, BatchNorm, ties and kinks leave the model alone",
    42: "second order through attention: a clear message",
    43: "names through compile, DDP and checkpoint wrappers, and a user's attribute `module`",
    44: "KeyboardInterrupt passes through",
}


@dataclass
class Row:
    """One situation."""

    name: str
    stages: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)


@dataclass
class Marks:
    """What the tests say they prove."""

    rows: dict[str, dict[str, Row]] = field(default_factory=dict)  # by heading, then by situation
    traps: dict[int, list[str]] = field(default_factory=dict)


def collect(root: Path = ROOT) -> Marks:
    """The marks of every test under `root/tests`."""
    marks = Marks()
    for path in sorted((root / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        heading = (ast.get_docstring(tree) or path.stem).splitlines()[0].rstrip(".")
        for test, call in _decorated(tree):
            where = f"{path.relative_to(root).as_posix()}::{test}"
            kind = _kind(call)
            if kind == "trap":
                for number in map(ast.literal_eval, call.args):
                    assert number in TRAPS, f"{where}: there is no trap {number}"
                    marks.traps.setdefault(number, []).append(where)
            elif kind == "situation":
                _add(marks, heading, where, call)
    return marks


def _decorated(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield from ((node.name, mark) for mark in node.decorator_list if isinstance(mark, ast.Call))


def _kind(call: ast.Call) -> str:
    parts = ast.unparse(call.func).split(".")
    return parts[-1] if parts[-3:-1] == ["pytest", "mark"] else ""


def _add(marks: Marks, heading: str, where: str, call: ast.Call) -> None:
    (name,) = map(ast.literal_eval, call.args)
    given: dict[str, Any] = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    unknown = set(given) - {"stages", "note"}
    assert not unknown, f"{where}: a situation has stages= and note=, not {sorted(unknown)}"
    row = marks.rows.setdefault(heading, {}).setdefault(name, Row(name))
    for stage, words in given.get("stages", {}).items():
        assert stage in STAGES, f"{where}: {stage!r} is none of {STAGES}"
        assert words.split(":")[0] in WORDS, f"{where}: {stage} begins with one of {WORDS}, not {words!r}"
        before = row.stages.setdefault(stage, words)
        assert before == words, f"{where}: {name!r} is said to be both {before!r} and {words!r} at {stage}"
    if "note" in given and given["note"] not in row.notes:
        row.notes.append(given["note"])
    row.tests.append(where)


def text(root: Path = ROOT) -> str:
    """The page."""
    marks = collect(root)
    lines = [
        "# Which gradient, in which way of training",
        "",
        "Each row is proved by the tests it names; this page is written from their marks. **yes**: the numbers are those",
        "of that stage, exactly. **marked**: they are there, and the record's status, a column or a finding says what is",
        "special. **no**: they cannot be had, for the reason given. An empty cell does not arise in the row's test, or is",
        "as in plain training. The stages are those of [concepts.md](concepts.md); `updates` is what the optimizer did.",
    ]
    for heading, rows in marks.rows.items():
        lines += ["", f"## {heading}", ""]
        lines += ["| situation | " + " | ".join(STAGES) + " | proved by |", "|---|" + "---|" * (len(STAGES) + 1)]
        for row in rows.values():
            name = "<br>".join([row.name, *(f"*{note}*" for note in row.notes)])
            lines.append(f"| {name} | " + " | ".join(row.stages.get(s, "") for s in STAGES) + f" | {_links(row.tests)} |")
    lines += ["", "## Traps", "", "What a naive capture gets wrong, and the tests that it fails.", ""]
    lines += ["| | trap | proved by |", "|---|---|---|"]
    lines += [f"| {n} | {trap} | {_links(marks.traps.get(n, []))} |" for n, trap in TRAPS.items()]
    return "\n".join(lines) + "\n"


def _links(tests: list[str]) -> str:
    parts = (test.split("::") for test in dict.fromkeys(tests))
    return "<br>".join(f"[{name.removeprefix('test_').replace('_', ' ')}](../{path})" for path, name in parts)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(text())
