"""The native kernel as it is built: for any Python and any torch, and no condition of an installation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gradlens.kernels import native

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def sources(tmp_path):
    """A copy of what the build reads."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "gradlens/__init__.py", "gradlens/kernels/native.c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def built(sources, compiler):
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    surroundings = os.environ | {"CC": compiler}
    done = subprocess.run(command, cwd=sources, env=surroundings, capture_output=True, text=True)
    return done, sources / "gradlens" / "kernels" / native.LIBRARY.name


def test_without_a_compiler_the_build_goes_on(sources):
    """It says what it could not build, and does not fail; `test_backends` says what serves then."""
    done, library = built(sources, str(sources / "no-compiler"))
    assert done.returncode == 0, done.stderr
    assert "no-compiler" in done.stdout + done.stderr
    assert not library.exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc") or not shutil.which("nm"), reason="needs a C compiler and nm")
def test_the_library_knows_nothing_of_python_and_torch(sources):
    """It asks for nothing but the C library, so one build serves every version of both."""
    done, library = built(sources, "cc")
    assert library.exists(), done.stderr
    told = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1].split("@")[0] for line in told.splitlines()]
    assert {"malloc", "pthread_create"} <= set(names)
    assert [name for name in names if name.startswith(("Py", "_Py", "_Z", "torch", "GOMP", "omp_"))] == []
    assert native.load(library).variant == native.load().variant
