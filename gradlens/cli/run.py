"""`gradlens run`: a training script, watched as it is.

The script gets the process: Python is replaced (`execv`) by one with the script as its `__main__`, so that its arguments,
exit code, signals and tracebacks are its own. `gradlens.integrations.script` says what happens then.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import click

from gradlens.errors import ArgumentError, nearest
from gradlens.records import Stage

VARIABLE = "GRADLENS_RUN"  #: as `gradlens.integrations.script` reads it
BOOTSTRAP = Path(__file__).parent.parent / "integrations" / "bootstrap"

EPILOG = """
\b
Examples:
  gradlens run train.py --epochs 3                     what stands behind the script is the script's own
  gradlens run --run runs/first --features "" train.py
  gradlens run -m mypackage.train --lr 0.1
  torchrun --nproc-per-node 2 -m gradlens run train.py
  gradlens run -m torch.distributed.run --nproc-per-node 2 train.py
"""


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


class Words(click.ParamType):
    """Words of a few, with commas between them; an empty text is none of them."""

    name = "words"

    def __init__(self, what: str, allowed: tuple[str, ...]) -> None:
        self._what, self._allowed = what, allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """The words."""
        for word in _words(value):
            if word not in self._allowed:
                self.fail(f"{self._what} {word!r} is not one of {', '.join(self._allowed)}{nearest(word, self._allowed)}")
        return _words(value)


class Memory(click.ParamType):
    """An amount of memory, as `watch` takes it."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, if it can be meant."""
        if not re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*([KMGT]?i?B?|[kmgt]i?b?)\s*", value):
            self.fail(f"{value!r} is not an amount of memory; write for example 256MiB or 1GB")
        return str(value)


@click.command(
    "run",
    short_help="Watch a training script as it is.",
    epilog=EPILOG,
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
    options_metavar="[OPTIONS]",
)
@click.option("-m", "as_module", is_flag=True, help="SCRIPT is the name of a module, as for `python -m`.")
@click.option("--run", "run", type=click.Path(file_okay=False), help="The run directory. [default: runs/SCRIPT-DATE-TIME]")
@click.option("--schedule", type=click.IntRange(1), default=1, show_default=True, help="Observe each n-th step.")
@click.option("--select", multiple=True, metavar="PATTERN", help="Parameters to watch ('*.weight', '!*.bias'); repeatable.")
@click.option("--stage", type=Words("stage", tuple(str(s) for s in Stage)), help="Gradients to read, e.g. backward,used.")
@click.option(
    "--features",
    type=Words("feature", ("updates", "flips", "evidence")),
    default="updates,flips",
    show_default=True,
    help="What needs buffers as large as the weights; '' for none.",
)
@click.option("--memory", type=Memory(), default="256MiB", show_default=True, help="What those buffers may take.")
@click.option(
    "--on-finding", type=click.Choice(["record", "warn", "raise"]), default="record", show_default=True, help="On a finding."
)
@click.option("--budget", type=click.FloatRange(0, 1, min_open=True), help="Share of the time that watching may cost.")
@click.option("--first-step", type=click.IntRange(0), default=0, help="Number of the first step, when a training goes on.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def command(as_module: bool, run: str | None, script: str, args: tuple[str, ...], **options: Any) -> None:
    """Run a training SCRIPT and watch it.

    The script is not changed: models and optimizers are found when they begin to train, also in the ranks and processes that
    it starts. What was seen is printed on standard error when it ends, and is in the run directory. The exit code is the
    script's.
    """
    check_script(script, as_module)
    told = {
        "run": os.path.abspath(run or _name(script, as_module)),
        "continue": run is not None and (Path(run) / "run.json").exists(),
        "pid": os.getpid(),
        "options": _given(options),
    }
    if run is not None and Path(run).is_file():
        raise ArgumentError(f"--run {run} is a file; give a directory")
    start(told, script, args, as_module)


def start(told: dict[str, Any], script: str, args: tuple[str, ...], as_module: bool) -> None:
    """This process becomes Python with the script, which is told."""
    os.environ[VARIABLE] = json.dumps(told)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BOOTSTRAP), os.environ.get("PYTHONPATH", "")]))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *_flags(sys.orig_argv[1:]), *(["-m"] if as_module else []), script, *args])


def _flags(arguments: list[str]) -> list[str]:
    """Python's own options, as this process was started with: `-u`, `-X dev`, `-W error`."""
    flags = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-") or word.startswith(("-m", "-c")) or word == "-":
            break
        flags.append(word)
        if word in ("-W", "-X"):
            flags.append(next(words, ""))
    return flags


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `watch`, without those that were not given."""
    options["select"] = list(options["select"]) or None
    return {name: value for name, value in options.items() if value is not None}


def check_script(script: str, as_module: bool) -> None:
    """An error names the nearest script, before Python starts anew."""
    if as_module:
        if script.split(".")[0] not in sys.stdlib_module_names and importlib.util.find_spec(script.split(".")[0]) is None:
            raise ArgumentError(f"there is no module {script!r} that this Python could import")
        return
    path = Path(script)
    if path.is_file() or (path / "__main__.py").is_file():
        return
    what = f"{script} is a folder without a __main__.py" if path.is_dir() else f"there is no script {script}"
    folder = path.parent if path.parent.is_dir() else Path()
    near = difflib.get_close_matches(path.name, [each.name for each in folder.glob("*.py")], n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(repr(str(folder / name)) for name in near)}?" if near else ""
    if not path.suffix and importlib.util.find_spec(script.split(".")[0]) is not None:
        hint = f"; for the module of that name write `gradlens run -m {script}`"
    raise ArgumentError(what + hint)


def _name(script: str, as_module: bool) -> str:
    """`runs/train-20260131-235959`."""
    stem = script.split(".")[-1] if as_module else Path(script).resolve().stem
    stem = Path(script).resolve().parent.name if stem in ("__main__", "main") and not as_module else stem
    return os.path.join("runs", f"{stem or 'script'}-{time.strftime('%Y%m%d-%H%M%S')}")
