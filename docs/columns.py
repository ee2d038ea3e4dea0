"""Writes docs/columns.md from `gradlens.fields`: run `python docs/columns.py`. A test keeps the file up to date."""

from pathlib import Path

from gradlens import activations, fields

TITLES = {
    "counts": "Counts and shares",
    "moments": "Sign and magnitude",
    "weights": "With the weights",
    "flips": "Against the last gradient (feature `flips`)",
    "updates": "What the optimizer did (feature `updates`, on `used` rows)",
    "shape": "How it was measured",
}
KEYS = {
    "step": "the optimizer step, from 0",
    "backward": "the backward within its step, from 0; of a `used` row, the step's last",
    "stage": "which gradient: `backward`, `accumulated`, `reduced`, `used`",
    "parameter": "the qualified name, wrappers' prefixes stripped; a tied parameter by its first name",
    "status": "why there are no or zero partials",
    "scale": "the loss scale at backward time; 1.0 without a scaler, NaN if unknown",
    "shape": "of the parameter",
    "dtype": "of the parameter",
}


def text() -> str:
    lines = [
        "# Columns",
        "",
        "Of `lens.table()`, `lens.history()` and `open_run(...)`. One row a parameter. This page is written from",
        "`gradlens/fields.py`. Counts are exact; moments run over the finite values, in float64; an empty cell (NaN) means",
        "that there is nothing to take the value over. g is the gradient, w the weight, dw the update.",
        "",
        "## Keys",
        "",
        *_table(KEYS.items()),
    ]
    fields_by_group = [*(f for f in fields.SCALARS if f.shown), *fields.DERIVED]
    for group, title in TITLES.items():
        rows = [(f.name, f.meaning) for f in fields_by_group if f.group == group]
        if group == "moments":
            rows += [(name, fields.meaning(name)) for name in fields.QUANTILES]
        lines += ["", f"## {title}", "", *_table(rows)]
    lines += [
        "",
        "## Activations (feature `activations`)",
        "",
        "Of `lens.activations()` and `open_run(...).activations()`: one row a (step, backward, module), of what a backward",
        "pass on an observed step went through, in the order of the forward pass. A *unit* is an entry of one example, at",
        "the same place in each; the first axis of an output is taken for the batch (the second of an LSTM or attention",
        "that is not `batch_first`). Forward passes that no `backward()` follows have no row.",
        "",
        *_table((activations.KEYS | activations.COLUMNS).items()),
        "",
        "## Histogram",
        "",
        f"For each sign {fields.BUCKETS} buckets, one a power of two from 2^{fields.EXPONENT_MIN} on, the same for every",
        "parameter and step, so that histograms add and compare. Smaller and larger values fall into the end buckets.",
        "",
        "Histograms are taken on detail steps: each observed step at first, then whenever the run has grown by a tenth.",
        "Every step has quantiles; between detail steps those of parameters with more than 65,536 entries rest on an even",
        "sample (`docs/kernels.md` says how far they are off).",
    ]
    return "\n".join(lines) + "\n"


def _table(rows) -> list[str]:
    cells = [f"| `{name}` | {meaning.replace('|', chr(92) + '|')} |" for name, meaning in rows]
    return ["| column | meaning |", "|---|---|", *cells]


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(text())
