"""`gradlens compare`: two runs side by side."""

from __future__ import annotations

import json

import click

from gradlens.cli.report import show, write
from gradlens.cli.runs import RUN, opened

EPILOG = """
\b
Examples:
  gradlens compare runs/first runs/second
  gradlens compare runs/first runs/second --html difference.html
  gradlens compare runs/first runs/second --json | jq .first_difference
"""


@click.command("compare", short_help="Where two runs part, and in which settings.", epilog=EPILOG)
@click.argument("a", type=RUN)
@click.argument("b", type=RUN)
@click.option("--html", "page", type=click.Path(dir_okay=False), help="Write a page that opens offline ('-': to stdout).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def command(a: str, b: str, page: str | None, as_json: bool) -> None:
    """Which settings differ between runs A and B, where they part, and which parameters differ most."""
    from gradlens.page.comparison import Comparison
    from gradlens.page.summary import Summary

    found = Comparison.of(Summary.of(opened(a)), Summary.of(opened(b)))
    if page is not None:
        from gradlens.page.html import render_comparison

        write(render_comparison(found), page)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
    elif page is None:
        show(found.text())
