"""`gradlens finish`: a killed run made whole for plain readers of Parquet."""

from __future__ import annotations

import dataclasses
import json

import click

from gradlens.cli.runs import RUN, opened

EPILOG = """
\b
Examples:
  gradlens finish runs/digits
  duckdb -c "select max(step) from 'runs/digits/history/*.parquet'"     has the last steps now
"""


@click.command("finish", short_help="Make a killed run whole for readers of Parquet.", epilog=EPILOG)
@click.argument("run", type=RUN)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def command(run: str, as_json: bool) -> None:
    """Make Parquet of the last rows of RUN, whose training was killed.

    `gradlens report` and `open_run` read them without this; pandas, polars and DuckDB do not. A run that is being written is
    left alone.
    """
    from gradlens.store.finish import finish

    path = opened(run).path
    done = finish(path)
    click.echo(json.dumps(dataclasses.asdict(done)) if as_json else f"{path}: {done}")
