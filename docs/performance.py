"""Writes the tables of docs/performance.md from CSV files of benchmarks/: run `python docs/performance.py`.

What stands between a table's two marks is replaced, where the benchmark has rows for it; else it stays as it is.
"""

import csv
import re
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
PAGE = HERE / "performance.md"

MODELS = {
    "mlp-8": "MLP, 8 parameters",
    "mlp-42": "MLP, 42 parameters",
    "mlp-202": "MLP, 202 parameters",
    "gpt": "GPT, 98 parameters, 8.4 million weights",
    "thousand": "1,000 tiny parameters",
    "convnet": "convnet, 14 parameters",
    "resnet": "ResNet-18, 62 parameters",
    "gpt-16m": "GPT, 148 parameters, 16.2 million weights",
    "resnet-64": "ResNet-18, 64 images",
    "gpt-2048": "GPT, 16.2 million weights, 2,048 tokens",
}


def rows(name: str) -> list[dict[str, str]]:
    """Of a benchmark, as it is now: rows of an older layout are left out."""
    path = BENCHMARKS / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("bare_us") or row.get("growth_mib")]


def cost(threads: int) -> list[str]:
    """Added wall time, a row a contender and a column a model."""
    there = [row for row in rows("overhead.csv") if int(row["threads"]) == threads and row["added_us"]]
    models = [name for name in MODELS if any(row["model"] == name for row in there)]
    if not models:
        return []
    of = {(row["contender"], row["model"]): row for row in there}
    bare = {name: next(row for row in there if row["model"] == name)["bare_us"] for name in models}
    lines = [
        "| added to a step, median (quartiles) | " + " | ".join(MODELS[name] for name in models) + " |",
        "|---" * (1 + len(models)) + "|",
        "| a bare step | " + " | ".join(duration(float(bare[name])) for name in models) + " |",
    ]
    for contender in dict.fromkeys(row["contender"] for row in there):
        cells = [added(of.get((contender, name))) for name in models]
        lines.append(f"| {contender} | " + " | ".join(cells) + " |")
    return [*lines, "", f"Torch on {threads} thread{'s' * (threads > 1)}. {machines(there)}."]


def added(row: dict[str, str] | None) -> str:
    """`+420 us (390 to 460), +31 %`."""
    if row is None:
        return "not measured"
    low, high = (duration(float(row[name])) for name in ("low", "high"))
    return f"{duration(float(row['added_us']), sign=True)} ({low} to {high}), {100 * float(row['added']):+.1f} %"


def machines(there: list[dict[str, str]]) -> str:
    """Each machine once, with the loads that it had."""
    loads: dict[str, list[float]] = {}
    for row in there:
        name, _, load = row["machine"].partition(", load ")
        loads.setdefault(name, []).append(float(load))
    return "; ".join(f"{name}, load {min(of)} to {max(of)}" for name, of in sorted(loads.items()))


def duration(us: float, sign: bool = False) -> str:
    """Three digits, with a unit."""
    plus = "+" if sign else ""
    return f"{us / 1000:{plus}.3g} ms" if abs(us) >= 1000 else f"{us:{plus}.0f} us"


def said() -> list[str]:
    """What the lens says, beside what is felt."""
    there = [row for row in rows("overhead.csv") if row.get("says") and row["felt"]]
    if not there:
        return []
    lines = ["| model | torch threads | | says | felt | own threads, of a core |", "|---|---|---|---|---|---|"]
    for row in there:
        others = f"{100 * float(row['others']):.1f} %" if row["others"] else "not measured"
        share = f"{100 * float(row['says']):.1f} % | {100 * float(row['felt']):.1f} %"
        lines.append(f"| {MODELS[row['model']]} | {row['threads']} | {row['contender']} | {share} | {others} |")
    return lines


def scripts() -> list[str]:
    """Small trainings of public kinds, a row each."""
    there = rows("scripts.csv")
    lines = [
        "| training | parameters | a bare step | added, median (quartiles) | bare again | says | felt | bit-identical |"
    ]
    lines.append("|---" * 8 + "|")
    for row in there:
        again, says, felt = (100 * float(row[name]) for name in ("again", "says", "felt"))
        cells = [row["title"], row["parameters"], duration(float(row["bare_us"])), added(row)]
        cells += [f"{again:+.1f} %", f"{says:.1f} %", f"{felt:.1f} %", f"in {row['identical']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", f"Torch on one thread. {machines(there)}."] if there else []


def memory() -> list[str]:
    """Whether anything grows."""
    there = rows("memory.csv")
    lines = ["| situation | backwards | after a fifth | at the end | growth | objects more |", "|---|---|---|---|---|---|"]
    for row in there:
        size = f"{row['start_mib']} MiB | {row['end_mib']} MiB | {float(row['growth_mib']):+.1f} MiB"
        lines.append(f"| {row['situation']} | {int(row['steps']):,} | {size} | {int(row['objects']):+,} |")
    return lines if there else []


TABLES = {
    "cost, one thread": lambda: cost(1),
    "cost, two threads": lambda: cost(2),
    "says": said,
    "scripts": scripts,
    "memory": memory,
}


def text(page: str) -> str:
    """The page with its tables."""
    for name, table in TABLES.items():
        lines = table()
        if lines:
            start, end = f"<!-- table: {name} -->", f"<!-- end of table: {name} -->"
            between = re.escape(start) + ".*?" + re.escape(end)
            page = re.sub(between, lambda _, s=start, e=end, t=lines: "\n".join([s, "", *t, "", e]), page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    PAGE.write_text(text(PAGE.read_text()))
