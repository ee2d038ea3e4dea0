"""Writes two parts of docs/architecture.md from the code: run `python docs/architecture.py`. A test keeps them up to date.

The tree says of each module what its docstring's first line says; the import table is the one that
tests/test_architecture.py holds the code to. The rest of the page is written by hand, and names code as `file.py:name`.
"""

import ast
import importlib.util
import re
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "gradlens"
PAGE = HERE / "architecture.md"
FILE = re.compile(r"`([\w/]+\.(?:py|c))`")
REFERENCE = re.compile(r"`([\w/]+\.py):([\w.]+)`")  #: `capture/watcher.py:Watcher.pass_ended`


def text() -> str:
    """The page, its two parts written again."""
    page = PAGE.read_text()
    for name, lines in (("tree", tree()), ("imports", imports())):
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        page = before + start + "\n".join(["", *lines, "", ""]) + end + after
    return page


def tree() -> list[str]:
    """Every module and package, with the first line of its docstring."""
    lines = ["| module | what it is |", "|---|---|"]
    for path in sorted(PACKAGE.rglob("*.py"), key=_order):
        place = path.relative_to(PACKAGE)
        name = f"**{place.parent}/**" if path.name == "__init__.py" and place.parent.parts else str(place)
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        if first:
            lines.append(f"| {name} | {first.replace('|', chr(92) + '|')} |")
    return lines


def _order(path: Path) -> tuple:
    place = path.relative_to(PACKAGE)
    return (len(place.parts) > 1, place.parent.parts, path.name != "__init__.py", path.name)


def imports() -> list[str]:
    """The table of who may import whom."""
    place = HERE.parent / "tests" / "test_architecture.py"
    spec = importlib.util.spec_from_file_location("architecture_table", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bottom, live = frozenset(module.BOTTOM), frozenset(module.LIVE)
    lines = [f"*vocabulary*: {_words(bottom)}.", "", f"*live half*: the vocabulary, {_words(live - bottom)}.", ""]
    lines += ["| module | may import |", "|---|---|"]
    for name, allowed in module.ALLOWED.items():
        rest, words = set(allowed), []
        for group, word in ((live, "*live half*"), (bottom, "*vocabulary*")):
            if group <= rest:
                rest -= group
                words.append(word)
        lines.append(f"| {name} | {', '.join([*words, *([_words(rest)] if rest else [])]) or 'nothing'} |")
    return lines


def _words(names) -> str:
    return ", ".join(sorted(names))


def dangling() -> list[str]:
    """References of the page, `file.py:name`, whose file or name is not there."""
    return [f"{file}:{name}" for file, name in REFERENCE.findall(PAGE.read_text()) if not _defined(PACKAGE / file, name)]


def absent() -> list[str]:
    """Files that the page names without a name in them, as `capture/engine.py` or `native.c`, and that are not there."""
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.suffix in (".py", ".c")}
    ends = files | {file.rsplit("/", 1)[-1] for file in files}
    return [name for name in FILE.findall(PAGE.read_text()) if name not in ends and not (PACKAGE.parent / name).exists()]


def homeless() -> list[str]:
    """Packages that the part written by hand leaves out: the page would not say where their lines belong."""
    by_hand = PAGE.read_text().partition("<!-- imports -->")[0]
    packages = {path.parent.relative_to(PACKAGE).parts[:1] for path in PACKAGE.rglob("*/__init__.py")} - {()}
    return sorted(name for (name,) in packages if f"`{name}/" not in by_hand)


def _defined(path: Path, name: str) -> bool:
    if not path.exists():
        return False
    body = ast.parse(path.read_text()).body
    for part in name.split("."):
        found = [node for node in body if _name(node) == part]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def _name(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Assign):
        return getattr(node.targets[0], "id", None)
    if isinstance(node, ast.AnnAssign):
        return getattr(node.target, "id", None)
    return getattr(node, "name", None)


if __name__ == "__main__":
    PAGE.write_text(text())
