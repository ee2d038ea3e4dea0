"""The command as a user calls it, in a process of its own."""

import os
import subprocess
import sys


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
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
