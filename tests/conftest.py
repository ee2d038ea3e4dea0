"""Fixtures that tests of several packages share."""

import os

import pytest

# One thread for torch's own loops, here and in what is started from here, before torch is imported: threads that wait for a
# core that another worker has take more than all tests together. Tests that are about threads ask for some.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.writers.served import Browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium; without one the test is skipped."""
    if reason := Browser.missing():
        pytest.skip(reason)
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()
