"""Each group of ranks is started once, and runs the scenarios of all the tests that ask for it."""

import os

import pytest

from tests.distributed.ranks import once


@pytest.fixture(scope="session")
def launched(tmp_path_factory):
    """`launched(function, ranks)`: what the function of a test module returned in each rank."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return lambda function, ranks=2: once(folder, function, ranks)
