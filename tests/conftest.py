"""Fixtures that tests of several packages share."""

import pytest

from tests.writers.served import Browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium; without one the test is skipped."""
    if reason := Browser.missing():
        pytest.skip(reason)
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()
