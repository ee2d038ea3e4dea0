"""The command as a user calls it, in a process of its own."""

import os
import subprocess
import sys

from tests.forks import expected, forked


def call(*arguments, cwd=None, code=0, text=True, env=None, stdin=None):
    """`gradlens ARGUMENTS`; the exit code must be `code`."""
    done = subprocess.run(
        [sys.executable, "-m", "gradlens", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=text,
        timeout=240,
        check=False,
        input=stdin,
    )
    return expected(done, code)


def forked_call(*arguments, cwd=None, code=0, env=None):
    """`gradlens ARGUMENTS`, the same way: for what is asked of the script and not of the command's start."""
    return forked("-m", "gradlens", *arguments, cwd=cwd, code=code, env=env)
