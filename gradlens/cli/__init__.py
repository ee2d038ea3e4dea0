"""The command `gradlens`: one module a command, imported when it is called.

    gradlens report runs/digits                what a run says, in the terminal
    gradlens report runs/digits --html a.html  the same as a page that opens offline
    gradlens run train.py --lr 0.1             watch a script that knows nothing of gradlens

Exit codes: 0 the command did its work; 1 `--fail-on` found what it looks for; 2 the call or the run is at fault, and
standard error says why. `run` ends as its script does. What a program reads goes to standard output, all else to standard
error.
"""

from __future__ import annotations

import io
import sys


def main() -> None:
    """The entry point."""
    from gradlens.cli.app import app

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a name that the terminal cannot show is no error
    app(prog_name="gradlens")
