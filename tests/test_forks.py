"""A fork of the process that has torch is what a new Python would be, for what scripts can see of it."""

import subprocess
import sys

import pytest

from tests.forks import forked

SCRIPT = """
import atexit, os, statistics, sys
import beside
atexit.register(print, "at exit")
print(__name__, __file__, sys.argv, sys.path[0], os.getcwd(), beside.VALUE, os.environ["ASKED"], sys.stdin.read())
print(sorted({*vars()} - {"__annotations__", "__cached__"}), sys.modules["__main__"].beside is beside)
print("gradlens" in sys.modules, statistics.__file__, sys.path, sys.orig_argv)
print("to standard error", file=sys.stderr)
def fails():
    END
fails()
"""


ENDS = ["pass", "sys.exit(7)", "sys.exit('why')", "raise ValueError('mine')", "os.kill(os.getpid(), 9)"]


@pytest.mark.parametrize("end", ENDS)
def test_a_script_sees_and_does_what_it_does_in_python(tmp_path, monkeypatch, end):
    """Its names, arguments, folder, environment, streams, traceback and exit code are the same."""
    monkeypatch.setenv("ASKED", "for")
    (tmp_path / "beside.py").write_text("VALUE = 5")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.replace("END", end))
    python = subprocess.run(
        [sys.executable, path, "--lr", "x y"], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    fork = forked(path, "--lr", "x y", cwd=tmp_path)
    assert fork.returncode == python.returncode
    assert fork.stderr == python.stderr
    assert fork.stdout == python.stdout


def test_forks_have_nothing_of_each_other(tmp_path):
    """What one sets, imports or seeds is not there in the next."""
    first = "import os, sys, torch; os.environ['LEFT'] = '1'; sys.left = 1; torch.manual_seed(5); os.chdir('/')"
    forked("-c", first, cwd=tmp_path, code=0)
    left = "os.environ.get('LEFT'), hasattr(sys, 'left'), torch.initial_seed() == 5"
    found = forked("-c", f"import os, sys, torch; print({left}, os.getcwd())", cwd=tmp_path, code=0)
    assert found.stdout.split() == ["None", "False", "False", str(tmp_path)]
