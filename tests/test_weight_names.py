"""A weight is named as people write it."""

import numpy as np
import pytest
import torch

from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.weight_names import find_name, is_index, label, parse_index, parse_weight

NAMES = ("0.weight", "0.bias", "scale", "odd[1]")


@pytest.mark.parametrize(
    ("written", "parsed"),
    [
        ("0.weight", ("0.weight", None)),
        ("0.weight[3, 7]", ("0.weight", (3, 7))),
        ("0.weight[3,7] ", ("0.weight", (3, 7))),
        ("0.weight[-1, 2]", ("0.weight", (-1, 2))),
        ("scale[]", ("scale", ())),
        (("0.weight", (3, 7)), ("0.weight", (3, 7))),
        (("0.weight", [3, 7]), ("0.weight", (3, 7))),
        (("0.bias", 2), ("0.bias", (2,))),
        (("0.bias", np.int64(2)), ("0.bias", (2,))),
        (("0.weight", np.array([3, 7])), ("0.weight", (3, 7))),
        (("0.weight", torch.tensor([3, 7])), ("0.weight", (3, 7))),
        ("module._orig_mod.0.weight[1, 1]", ("0.weight", (1, 1))),
        ("odd[1]", ("odd[1]", None)),
        ("1.weight[0]", ("1.weight", (0,))),
    ],
)
def test_a_weight_is_read_as_it_is_written(written, parsed):
    """Text, pairs, arrays and the names of wrapped models all mean the same weight."""
    assert parse_weight(written, NAMES) == parsed


@pytest.mark.parametrize("weight", [3, None, ("0.weight", 0.5), ("0.weight", True), ("0.weight", (1, "x")), (1, 2)])
def test_what_is_no_weight_is_explained(weight):
    """The error shows the three ways to write one."""
    with pytest.raises(ArgumentTypeError, match=r"fc1\.weight\[0, 3\]"):
        parse_weight(weight, NAMES)


def test_names_of_wrapped_models_are_found_both_ways():
    """A plain name finds a wrapped parameter, a wrapped name a plain one; where two fit, neither is taken."""
    assert find_name("_orig_mod.0.bias", NAMES) == "0.bias"
    assert find_name("a.weight", ["a.module.weight", "b.weight"]) == "a.module.weight"
    with pytest.raises(ArgumentError, match="did you mean"):
        find_name("a.weight", ["a.module.weight", "module.a.weight"])
    with pytest.raises(ArgumentTypeError, match="named by text"):
        find_name(3, NAMES)


def test_labels_and_indices():
    """A label is what the parser reads; a name is no index."""
    assert parse_weight(label("0.weight", (3, 7)), NAMES) == ("0.weight", (3, 7))
    assert label("scale", ()) == "scale"
    assert parse_index(3) == (3,)
    assert is_index((1, 2))
    assert is_index(())
    assert not is_index("0.bias")
    assert not is_index(("0.bias", 1))
