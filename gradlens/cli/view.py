"""`gradlens view`: TensorBoard over a folder of runs, at an address that is printed."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import click

from gradlens.errors import GradlensError, RunDirectoryError

EPILOG = """
\b
Examples:
  gradlens view runs                      http://localhost:6006, the tab GradLens
  gradlens view runs --port 7000
  gradlens view runs -- --samples_per_plugin=images=100     options of TensorBoard's own
"""


@click.command("view", short_help="TensorBoard with the tab GradLens.", epilog=EPILOG)
@click.argument("logdir", type=click.Path())
@click.option("--port", type=click.IntRange(0, 65535), default=6006, show_default=True, help="0 takes a free one.")
@click.option("--host", default="localhost", show_default=True, help="0.0.0.0 lets other machines in.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def command(logdir: str, port: int, host: str, more: tuple[str, ...]) -> None:
    """Start TensorBoard, with the tab of gradlens, over LOGDIR. Ends with Ctrl-C."""
    if not Path(logdir).is_dir():
        raise RunDirectoryError(f"{logdir} is not a folder; give the one that holds your runs, such as runs")
    if importlib.util.find_spec("tensorboard") is None:
        raise GradlensError("TensorBoard is not installed: pip install tensorboard")
    arguments = ["-m", "tensorboard.main", "--logdir", logdir, "--host", host, "--port", str(port), *more]
    os.execv(sys.executable, [sys.executable, *arguments])
