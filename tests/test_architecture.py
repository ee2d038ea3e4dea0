"""Imports go one way, as this table says; the offline half starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "gradlens"
BOTTOM = {
    "activations",
    "errors",
    "facts",
    "markup",
    "progress",
    "plots",
    "fields",
    "records",
    "blocks",
    "moments",
    "frames",
    "noise",
    "pooling",
    "schedules",
}
BOTTOM |= {"findings", "selection", "weight_names", "workers"}
LIVE = BOTTOM | {"_torch", "kernels", "statistics", "capture", "analysis", "store", "writers", "watching", "unwrapping"}

#: module -> the modules of gradlens it may import. A package may always import itself.
ALLOWED = {
    "errors": set(),
    "activations": set(),
    "facts": {"activations"},
    "markup": set(),
    "progress": {"markup"},
    "plots": {"errors", "fields"},
    "notebook": {"errors"},
    "fields": {"errors"},
    "records": {"errors", "fields", "markup"},
    "blocks": {"fields", "records"},
    "moments": {"blocks"},
    "frames": {"errors", "fields", "records"},
    "noise": {"errors", "records"},
    "pooling": {"errors", "fields", "records"},
    "schedules": {"errors"},
    "selection": {"errors"},
    "weight_names": {"errors"},
    "workers": set(),
    "unwrapping": {"weight_names"},
    "analysis": BOTTOM,
    "store": BOTTOM | {"analysis"},
    "writers": BOTTOM | {"analysis", "store"},
    "kernels": {"_torch", "errors", "fields"},
    "statistics": {"errors", "fields", "records", "blocks", "moments", "kernels", "schedules"},
    "_torch": set(),
    "findings": {"errors", "records"},
    "capture": {"_torch", "activations", "errors", "facts", "findings", "records", "schedules", "selection", "unwrapping"},
    "probes": BOTTOM | {"_torch", "statistics", "kernels", "unwrapping", "capture", "analysis"},
    "watching": LIVE,
    "lens": LIVE | {"notebook"},
    "integrations": {"errors", "records", "lens", "testing", "watching", "page", "store", "writers", "probes"},
    "testing": LIVE | {"lens"},
    "dashboard": BOTTOM | {"analysis", "store", "writers"},
    "page": BOTTOM | {"analysis", "store", "writers"},
    "cli": BOTTOM | {"analysis", "store", "writers", "page"},
    "demo": set(),
    "__main__": {"cli"},
}


def imported(path):
    """The gradlens modules that a file imports, wherever in the file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the tree"
            names = [f"gradlens.{alias.name}" for alias in node.names] if node.module == "gradlens" else [node.module]
        else:
            continue
        for name in names:
            if name and name.startswith("gradlens."):
                yield name.split(".")[1]


def files():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    """A module imports only what the table allows."""
    module = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert module in ALLOWED, f"say in the table what {module} may import"
    unexpected = set(imported(path)) - ALLOWED[module] - {module}
    assert not unexpected, f"{module} may not import {sorted(unexpected)}"


LONGEST = 300


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_class_is_longer_than_a_reader_can_hold(path):
    """A class of more than 300 lines has a second idea in it."""
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in classes}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


@pytest.mark.parametrize(
    "module", ["fields", "records", "findings", "frames", "noise", "pooling", "analysis", "store", "writers", "page", "cli"]
)
def test_the_offline_half_imports_no_torch(module):
    """The offline half starts without torch, so that the command line and the tab start at once."""
    code = (
        f"import sys, importlib, pkgutil; package = importlib.import_module('gradlens.{module}')\n"
        "for found in pkgutil.walk_packages(getattr(package, '__path__', []), package.__name__ + '.'):\n"
        "    importlib.import_module(found.name)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
