"""Python scripts in forks of one process that has imported torch: what `subprocess.run` gives, seconds earlier."""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 240


class Mother:
    """The process that all forks of this one come from: see `tests.mother`."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("mother.py"))],  # `tests.statistics` is not Python's
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def run(self, words, cwd, env):
        """`python WORDS`, to its end."""
        with tempfile.TemporaryDirectory() as folder:
            streams = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
            request = {"words": words, "folder": str(cwd or os.getcwd()), "environment": {**os.environ, **env}, **streams}
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            ready = select.select([self._process.stdout], [], [], SECONDS)[0]
            code = self._process.stdout.readline() if ready else b""
            if not code:
                self.close()
                raise AssertionError(f"{words}: no answer for {SECONDS} seconds, or no process to fork")
            return subprocess.CompletedProcess(words, int(code), *(Path(path).read_text() for path in streams.values()))

    def close(self):
        """Ends it and all that came from it."""
        _mothers.remove(self)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


_mothers = []
atexit.register(lambda: [mother.close() for mother in list(_mothers)])


def expected(done, code):
    """What is done, if its exit code is this one."""
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def forked(*words, cwd=None, code=None, env=None):
    """`python WORDS` in a fork of a process that has imported torch; the exit code must be `code`, where one is given."""
    if not _mothers:
        _mothers.append(Mother())
    done = _mothers[0].run([str(word) for word in words], cwd, {"OMP_NUM_THREADS": "1", **(env or {})})
    return done if code is None else expected(done, code)
