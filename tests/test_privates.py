"""Every private of torch that gradlens uses is there."""

import pytest

from gradlens._torch import PRIVATES


@pytest.mark.parametrize("private", PRIVATES, ids=lambda private: private.path)
def test_the_private_is_there(private):
    """Where it is said to be, and with a purpose."""
    private.find()
    assert private.purpose
