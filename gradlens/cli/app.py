"""The commands by name, what goes wrong in words, and nothing that takes long to import."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import click

from gradlens.errors import GradlensError, GradlensWarning, nearest

#: In the order in which a newcomer needs them.
COMMANDS = {
    "demo": "gradlens.cli.demo",
    "run": "gradlens.cli.run",
    "report": "gradlens.cli.report",
    "compare": "gradlens.cli.compare",
    "top": "gradlens.cli.top",
    "view": "gradlens.cli.view",
    "finish": "gradlens.cli.finish",
    "completion": "gradlens.cli.completion",
}

EXAMPLES = """
\b
Examples:
  gradlens demo                               train a small network, see what is said of it
  gradlens run train.py --epochs 3            watch a script as it is
  gradlens report runs/digits --html page.html
  gradlens report runs/digits --fail-on error exit with 1 if an error was found
"""


class Failure(click.ClickException):
    """What the user can mend: a sentence on standard error, and the exit code of a wrong call."""

    exit_code = 2


class Commands(click.Group):
    """Loads a command's module when it is asked for, and suggests the nearest name when there is none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In our order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The module's `command`."""
        if name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(COMMANDS[name]).command
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """An unknown command is an error with the nearest name."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"there is no command {args[0]!r}{nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Errors of gradlens are for the user to read: no traceback. Warnings are notes."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", GradlensWarning)
            warnings.showwarning = _note
            try:
                return super().invoke(ctx)
            except GradlensError as error:
                raise Failure(str(error)) from error


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"note: {message}", file=sys.stderr)


@click.group(
    cls=Commands,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=False,
)
@click.version_option(None, "-V", "--version", package_name="torch-gradlens", message="gradlens %(version)s")
def app() -> None:
    """Which way each weight should move to lower the loss, and what is wrong with the training."""
