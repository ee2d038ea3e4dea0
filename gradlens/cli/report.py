"""`gradlens report`: what a run says, as a page of text, as JSON, or as an HTML file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradlens.cli.runs import RUN, opened
from gradlens.errors import RunDirectoryError
from gradlens.records import Severity

if TYPE_CHECKING:
    from gradlens.page.summary import Summary

EPILOG = """
\b
Examples:
  gradlens report runs/digits
  gradlens report runs/digits --html digits.html       one file, opens offline
  gradlens report runs/digits --json | jq .findings
  gradlens report runs/digits --fail-on warning        exit with 1 if there is one, for CI
"""


@click.command("report", short_help="What a run says: text, JSON or an HTML page.", epilog=EPILOG)
@click.argument("run", type=RUN)
@click.option("--html", "page", type=click.Path(dir_okay=False), help="Write a page that opens offline ('-': to stdout).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option(
    "--fail-on", type=click.Choice(["warning", "error"]), help="Exit with 1 if a finding is as severe as this, or worse."
)
def command(run: str, page: str | None, as_json: bool, fail_on: str | None) -> None:
    """What RUN says: its health, its loss, which way its weights should move."""
    from gradlens.page.summary import Summary

    summary = Summary.of(opened(run))
    if page is not None:
        from gradlens.page.html import render

        write(render(summary), page)
    if as_json:
        click.echo(json.dumps(_content(summary), indent=2, default=str))
    elif page is None:
        show(summary.text())
    worst = summary.worst()
    if fail_on is not None and worst is not None and worst.rank >= Severity(fail_on).rank:
        sys.exit(1)


def write(text: str, page: str) -> None:
    """A page to a file, or to standard output.

    Raises:
        RunDirectoryError: It cannot be written.
    """
    if page == "-":
        sys.stdout.buffer.write(f"{text}\n".encode())
        return
    try:
        Path(page).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"the page cannot be written to {page}: {error.strerror or error}") from error
    click.echo(f"{page}: {len(text.encode()) / 1e6:.2f} MB, opens in any browser, offline", err=True)


def show(text: str) -> None:
    """With colours on a terminal, and as it is in a pipe."""
    if not sys.stdout.isatty():
        click.echo(text)
        return
    from gradlens.cli.colours import coloured

    coloured(text)


def _content(summary: Summary) -> dict[str, Any]:
    """The same as numbers; what is not finite is null, which every JSON reader knows."""
    from gradlens.page.data import finite, rows
    from gradlens.page.summary import as_json

    losses = summary.losses
    seen = {"first": min(losses), "last": max(losses), "lowest": min(losses, key=losses.__getitem__)} if losses else {}
    worst = summary.worst()
    steps = summary.steps
    return {
        "run": str(summary.run.path),
        "steps": {"count": len(steps), "first": steps[0], "last": steps[-1]} if steps else None,
        "loss": {name: {"step": step, "value": finite(losses[step])} for name, step in seen.items()} or None,
        "diagnosis": {"verdict": summary.diagnosis.verdict, "confidence": finite(float(summary.diagnosis.confidence))},
        "worst": None if worst is None else worst.value,
        "findings": [as_json(finding) for finding in summary.findings],
        "parameters": rows(summary),
        "overhead": summary.overhead or None,
        "settings": summary.run.settings,
    }
