"""The documentation says what the code does."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_page_of_columns_is_up_to_date():
    """docs/columns.md is what docs/columns.py writes."""
    spec = importlib.util.spec_from_file_location("columns", ROOT / "docs" / "columns.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "columns.md").read_text() == module.text()


def _acceptance():
    spec = importlib.util.spec_from_file_location("acceptance", ROOT / "docs" / "acceptance.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["acceptance"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_of_situations_is_up_to_date():
    """docs/acceptance.md is what docs/acceptance.py reads from the tests' marks."""
    assert (ROOT / "docs" / "acceptance.md").read_text() == _acceptance().text()


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
        _acceptance().text(tmp_path)
    assert "tests/test_it.py::test_it" in str(caught.value)
