"""The documentation says what the code does."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _writer(name):
    """The module that writes a page."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["columns", "acceptance", "rules", "architecture"])
def test_a_page_that_is_written_by_code_is_up_to_date(name):
    """docs/NAME.md is what docs/NAME.py writes: from the fields, from the tests' marks, from the rules."""
    assert (ROOT / "docs" / f"{name}.md").read_text() == _writer(name).text()


def test_the_page_of_architecture_names_code_that_exists():
    """Each `file.py:name` on it is defined there."""
    assert _writer("architecture").dangling() == []


def test_the_page_of_architecture_says_where_the_lines_of_each_package_belong():
    """Each package is in the part that is written by hand, and each file that the page names is there."""
    page = _writer("architecture")
    assert page.absent() == []
    assert page.homeless() == []


def test_every_module_opens_by_saying_what_it_is():
    """The list of modules has all of them: those without a docstring would be missing."""
    architecture = _writer("architecture")
    paths = [path for path in (ROOT / "gradlens").rglob("*.py") if path.read_text().strip()]
    silent = [path for path in paths if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []
    assert len(architecture.tree()) > 100


def test_the_page_of_rules_has_every_finding():
    """Whatever gradlens may find is a default rule's or in the list of those that no rule makes."""
    made = set()
    for path in (ROOT / "gradlens").rglob("*.py"):
        if "rules" not in path.parts and path.name != "testing.py":
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            words = [word.value for call in calls for word in call.keywords if word.arg == "rule"]
            made |= {word.value for word in words if isinstance(word, ast.Constant)}
    assert made == set(_writer("rules").CATALOGUE), "say in docs/rules.py what a new finding says, and write the page anew"


def test_the_rule_on_the_page_of_rules_runs(capsys):
    """It finds the layers that are shut, beside what the default rules find."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rules.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    printed = capsys.readouterr().out
    names["lens"].close()
    assert "[info] sleepy hidden.weight at step 4: 100% of its partials are 0" in printed
    assert "[warning] dead hidden.weight at step 9" in printed
    assert "switched off" not in printed


def test_every_trap_has_a_test():
    """Each trap on the page of acceptance is marked on a test that a naive capture fails."""
    acceptance = _writer("acceptance")
    assert list(acceptance.TRAPS) == list(range(1, 45))
    assert set(acceptance.collect().traps) == set(acceptance.TRAPS)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("trap(45)", "no trap 45"),
        ("situation('x', stages={'sideways': 'yes'})", "sideways"),
        ("situation('x', stages={'used': 'perhaps'})", "begins with one of"),
        ("situation('x', stage={'used': 'yes'})", "stages= and note="),
        ("situation('x', stages={'used': 'yes'})\n@pytest.mark.situation('x', stages={'used': 'no: why'})", "both"),
    ],
)
def test_marks_that_cannot_be_meant_are_refused(tmp_path, mark, message):
    """A mark with a wrong number, stage or word is named with its test, and so are two that contradict each other."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(f"import pytest\n@pytest.mark.{mark}\ndef test_it(): pass\n")
    with pytest.raises(AssertionError, match=message) as caught:
        _writer("acceptance").text(tmp_path)
    assert "tests/test_it.py::test_it" in str(caught.value)


def test_the_code_on_the_page_of_costs_runs(capsys):
    """docs/performance.md's program says what watching costs."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "performance.md").read_text(), re.DOTALL)
    exec(compile(code, "performance.md", "exec"), {})
    assert "of the time of 200 steps, 20 of them observed" in capsys.readouterr().out


PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Each link to a file of the repository finds it."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target
