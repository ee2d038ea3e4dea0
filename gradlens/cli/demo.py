"""`gradlens demo`: a training script of twenty lines, watched by `gradlens run`, and the page of its run."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import click

from gradlens.errors import GradlensError, RunDirectoryError

SCRIPT = Path(__file__).parent.parent / "demo" / "digits.py"


@click.command("demo", short_help="Train a small network, see what is said of it.")
@click.option("--run", type=click.Path(file_okay=False), default="runs/demo", show_default=True, help="Replaced if there.")
@click.option("--epochs", type=click.IntRange(1), default=6, show_default=True)
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Try 1.0 and see what is said.")
@click.pass_context
def command(ctx: click.Context, run: str, epochs: int, lr: float) -> None:
    """Train a small network on handwritten digits and show what gradlens says of it. Takes some ten seconds."""
    if importlib.util.find_spec("sklearn") is None:
        raise GradlensError("the demo's digits come with scikit-learn: pip install scikit-learn")
    if Path(run).exists() and not (Path(run) / "run.json").exists():
        raise RunDirectoryError(f"{run} is there and is no run of gradlens: give --run another folder")
    shutil.rmtree(run, ignore_errors=True)
    training = [str(SCRIPT), "--epochs", str(epochs), "--lr", str(lr)]
    click.echo(f"$ gradlens run --run {run} {' '.join(training)}\n", err=True)
    done = subprocess.run([sys.executable, "-m", "gradlens", "run", "--run", run, *training], check=False)
    if done.returncode:
        ctx.exit(done.returncode)
    click.echo(f"\n$ gradlens report {run}\n", err=True)
    from gradlens.cli.report import command as report

    ctx.invoke(report, run=run, page=None, as_json=False, fail_on=None)
    click.echo(f"\nNext:\n  gradlens report {run} --html demo.html\n  gradlens view {Path(run).parent}", err=True)
