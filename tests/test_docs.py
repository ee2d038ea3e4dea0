"""The documentation says what the code does."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_page_of_columns_is_up_to_date():
    """docs/columns.md is what docs/columns.py writes."""
    spec = importlib.util.spec_from_file_location("columns", ROOT / "docs" / "columns.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "columns.md").read_text() == module.text()
