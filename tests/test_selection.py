"""Which parameters."""

import pytest

from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.selection import check, predicate

NAMES = {"conv.weight": 1, "conv.bias": 2, "fc.weight": 3, "fc.bias": 4}


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (None, list(NAMES)),
        ("*.weight", ["conv.weight", "fc.weight"]),
        ("!*.bias", ["conv.weight", "fc.weight"]),
        (["fc.*", "!*.bias"], ["fc.weight"]),
        (["conv.bias", "fc.bias"], ["conv.bias", "fc.bias"]),
        (lambda name, tensor: tensor > 2, ["fc.weight", "fc.bias"]),
    ],
)
def test_selections(select, expected):
    """Patterns add, `!` patterns take away, a callable decides alone."""
    assert [n for n, t in NAMES.items() if predicate(select)(n, t)] == expected


@pytest.mark.parametrize(
    ("select", "word"), [("fc.wieght", "fc.weight"), ("!encoder.*", "conv.weight"), (["*.weight", "x"], "'x'")]
)
def test_a_pattern_that_matches_nothing(select, word):
    """The error names the pattern and the nearest names."""
    with pytest.raises(ArgumentError) as caught:
        check(select, NAMES)
    assert word in str(caught.value)


def test_patterns_that_leave_nothing():
    """Together they may leave none: that is an error too."""
    with pytest.raises(ArgumentError, match="leaves none"):
        check(["*.weight", "!*.weight"], NAMES)


@pytest.mark.parametrize("select", [[], [1], 5])
def test_what_is_no_selection(select):
    """Other types are refused."""
    with pytest.raises(ArgumentTypeError, match="select"):
        predicate(select)
