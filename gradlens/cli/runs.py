"""Runs as the commands read them: by path, with the nearest one named where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradlens.errors import RunDirectoryError, nearest

if TYPE_CHECKING:
    from gradlens.store.run import Run

DEPTH = 3  #: folders below the working directory that are searched for a run of a similar name


class RunPath(click.ParamType):
    """A run directory; completed by the shell as a folder."""

    name = "run"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """Folders."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="dir")]


RUN = RunPath()


def opened(path: str) -> Run:
    """The run at a path.

    Raises:
        RunDirectoryError: It is none; the message names runs that may be meant.
    """
    if not (Path(path) / "run.json").is_file():
        raise RunDirectoryError(_absent(path))
    from gradlens.store.run import open_run

    return open_run(path)


def _absent(path: str) -> str:
    what = "is no run of gradlens (it has no run.json)" if Path(path).exists() else "is not there"
    inside = [str(run) for run in _below(Path(path), 1)] if Path(path).is_dir() else []
    if inside:
        return f"{path} {what}; it holds runs: {', '.join(inside[:6])}"
    known = [str(run) for run in _below(Path(path).parent, 1)] + [str(run) for run in _below(Path(), DEPTH)]
    hint = nearest(path, dict.fromkeys(known)) or "; runs are what watch(run=...) or `gradlens run` have written"
    return f"{path} {what}{hint}"


def _below(folder: Path, depth: int) -> Iterable[Path]:
    """Run directories down to a depth; hidden folders are left out."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return
    for name in names:
        inside = folder / name
        if (inside / "run.json").is_file():
            yield inside
        elif depth > 1:
            yield from _below(inside, depth - 1)
