"""The table of contents."""

import subprocess
import sys

import pytest

import gradlens


def test_everything_listed_is_there():
    """Each public name can be had."""
    for name in gradlens.__all__:
        assert getattr(gradlens, name) is not None


def test_what_is_loaded_late_is_listed():
    """No public name is left out of the table of contents, and none is in it twice."""
    assert set(gradlens._LAZY) <= set(gradlens.__all__)
    assert len(set(gradlens.__all__)) == len(gradlens.__all__)


def test_a_wrong_name_suggests_the_right_one():
    """A typing error names its neighbour."""
    with pytest.raises(AttributeError, match="watch"):
        gradlens.wacth  # noqa: B018


def test_importing_gradlens_does_not_import_torch():
    """`import gradlens` and the offline names start at once."""
    code = "import sys, gradlens; gradlens.open_run, gradlens.rules, gradlens.to_frame; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
