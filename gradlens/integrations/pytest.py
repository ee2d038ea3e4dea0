"""A fixture for pytest: `watched(model, optimizer)` watches for one test, and closes at its end.

    pytest_plugins = ["gradlens.integrations.pytest"]        # in conftest.py

    def test_that_everything_trains(watched):
        lens = watched(model, optimizer)
        train(model, optimizer, steps=20)
        gradlens.testing.assert_all_trained(lens)

A test that passed and whose numbers were not all finite fails when its lens is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

try:
    import pytest
except ImportError as error:
    raise ImportError("gradlens.integrations.pytest is for pytest: pip install pytest") from error

from gradlens.lens import Lens, watch
from gradlens.testing import assert_finite


@pytest.fixture
def watched() -> Iterator[Callable[..., Lens]]:
    """`watch`, whose lenses are closed at the end of the test and must have seen finite numbers alone."""
    lenses: list[Lens] = []

    def make(*args: Any, **options: Any) -> Lens:
        lens = watch(*args, **options)
        lenses.append(lens)
        return lens

    yield make
    for lens in lenses:
        lens.close()
    for lens in lenses:
        assert_finite(lens)
