"""`gradlens audit`: a script to its first backward, and what is wrong in the graph of its loss. No run, no step."""

from __future__ import annotations

import os

import click

from gradlens.cli.run import check_script, start

EPILOG = """
\b
Examples:
  gradlens audit train.py --epochs 3                 what stands behind the script is the script's own
  gradlens audit --json train.py | jq .findings
  gradlens audit --fail-on warning -m mypackage.train
"""


@click.command(
    "audit",
    short_help="Read the graph of a script's first loss.",
    epilog=EPILOG,
    context_settings={"allow_interspersed_args": False},
)
@click.option("-m", "as_module", is_flag=True, help="SCRIPT is the name of a module, as for `python -m`.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--fail-on", type=click.Choice(["warning", "error"]), help="Exit with 1 if a finding is as severe, or worse.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def command(as_module: bool, as_json: bool, fail_on: str | None, script: str, args: tuple[str, ...]) -> None:
    """Run SCRIPT to its first backward, read the graph of that loss, and stop before any weight moves.

    Softmax before a cross entropy, parameters that the loss does not reach or the optimizer does not have, a model in
    evaluation mode. What the script prints goes to standard error.
    """
    check_script(script, as_module)
    output = os.dup(1)
    os.set_inheritable(output, True)
    os.dup2(2, 1)
    start(
        {"audit": True, "json": as_json, "fail_on": fail_on, "output": output, "pid": os.getpid()}, script, args, as_module
    )
