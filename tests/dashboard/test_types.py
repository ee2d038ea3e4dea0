"""The tab's modules, as the TypeScript compiler reads them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "gradlens" / "dashboard" / "static"
TSC = ROOT / "node_modules" / ".bin" / "tsc"


def test_the_types_of_all_modules_hold():
    """`tsc --checkJs`, strictly, over every hand-written module."""
    if not TSC.exists() or shutil.which("node") is None:
        pytest.skip("TypeScript is not installed: make node_modules")
    found = subprocess.run([TSC, "-p", ROOT / "tsconfig.json"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", sorted(STATIC.glob("*.js")), ids=lambda path: path.name)
def test_no_module_makes_markup_of_text(path):
    """No way in which a name could become an element or code: neither innerHTML nor its like, nor eval."""
    found = re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|@ts-", path.read_text()
    )
    assert found == []


def test_every_import_leads_to_a_file():
    """With its suffix, as a browser asks for it: there is no build step that would add one."""
    for path in STATIC.glob("*.js"):
        for target in re.findall(r'(?:from|import)\s+"([^"]+)"', path.read_text()):
            assert (path.parent / target).is_file(), f"{path.name}: {target}"
