"""Writes docs/rules.md from the rules themselves: run `python docs/rules.py`. A test keeps the file up to date."""

import inspect
from dataclasses import fields
from pathlib import Path

from gradlens import rules
from gradlens.analysis import patterns, ruleset
from gradlens.findings import CATALOGUE

TOP = f"""\
# Rules

A rule looks at what was captured and names what is ill: in which parameter, with which numbers, why that is likely,
and what to do. `lens.findings()` has what was found, the report and the dashboards show it, and `on_finding=` is told.
This page is written from the rules themselves.

A rule is a frozen value, whose settings are checked when it is made. Those below are asked unless you say otherwise:

    gradlens.watch(model, optimizer, rules=[*gradlens.rules.DEFAULT, gradlens.rules.Absent(steps=50)])

Steps are *observed* ones: on a schedule of each tenth step, ten of them are a hundred. Parameters that are frozen,
left out, or that the loss does not depend on are not judged.

**What you hear.** A rule repeats itself while an illness lasts; you hear of it once, and again when it gets worse. It
is over when the rule has kept silent for {ruleset.HEALED} steps, and for twice as long each time it comes back.
More than {ruleset.FLOOD} parameters at once are one finding, whose `parameters` has them all. A rule that raises is
named once and asked no more.
"""

OWN = '''\
## One of your own

A rule is any callable that takes the history and yields findings, or returns a list of them, or None. It is asked after
each snapshot, on a background thread; an error in it stops neither training nor the other rules.

```python
import gradlens
from gradlens import Finding

case = gradlens.testing.dead_relu()


def sleepy(history):
    """Parameters of which at least half of the partials were 0 at each of the last five steps."""
    newest = history.latest()
    for row in gradlens.rules.lasting(history, lambda table: table.column("hold_share") >= 0.5, steps=5):
        seen = f"{newest.column('hold_share')[row]:.0%} of its partials are 0"
        yield Finding("sleepy", newest.step, "info", seen, newest.names[row], remedy="look at what comes into it")


lens = gradlens.watch(case.model, case.optimizer, rules=[*gradlens.rules.DEFAULT, sleepy])
case.train(20)
print(*lens.findings(), sep="\\n")
```

`history.latest(stage=None)` is the newest snapshot: `step, backward, stage, names, loss`, `column(name)` for each
[column](columns.md), one entry a parameter, and `has("absent")` for their status. `history.recent(steps, stage)` are
those of the last steps, and `history.series(parameter, column)` is one number over time. `gradlens.rules.lasting` gives
the rows where something held on each of the last steps, `gradlens.rules.judged` those with a gradient of their own.

## What the graph of a loss shows

`GraphAudit` and `gradlens.audit(loss, model, optimizer)` look for these, each a chain of operations from the loss's side
down (`LogSoftmax <- Softmax`) in `gradlens.analysis.patterns.PATTERNS`.

{patterns}

## What is found elsewhere

Findings that no rule makes: what was asked for and cannot be had, and what went wrong on the way.
'''


def text() -> str:
    names = [(rule, type(rule).__name__) for rule in rules.DEFAULT]
    lines = [TOP, "| rule | `finding.rule` | finds |", "|---|---|---|"]
    lines += [f"| [{name}](#{name.lower()}) | `{rule.name}` | {_first(rule)} |" for rule, name in names]
    for rule, name in names:
        settings = ", ".join(f"{field.name}={field.default:g}" for field in fields(rule))
        lines += ["", f"## {name}", "", f"`gradlens.rules.{name}({settings})`", "", inspect.getdoc(type(rule)) or ""]
    lines += ["", OWN.replace("{patterns}", _patterns()), "| `finding.rule` | says |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in CATALOGUE.items()]
    return "\n".join(lines) + "\n"


def _patterns() -> str:
    """A row for each rule of the graph, with what causes it."""
    causes: dict[str, list[str]] = {}
    for pattern in patterns.PATTERNS:
        known = causes.setdefault(pattern.rule, [])
        known += [cause for cause in pattern.causes[:1] if cause not in known]
    rows = [f"| `{rule}` | {'; '.join(what)} |" for rule, what in causes.items()]
    return "\n".join(["| `finding.rule` | because of |", "|---|---|", *rows])


def _first(rule: rules.Rule) -> str:
    """The first sentence of what a rule says of itself, up to the formula."""
    words = " ".join((inspect.getdoc(type(rule)) or "").split("\n\n")[0].split())
    return words.split(". ")[0].split(": ")[0].rstrip(".")


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(text())
