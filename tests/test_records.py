"""The frozen records."""

import numpy as np
import pytest

from gradlens.records import Finding, Parameters, Severity, Snapshot, Status


def snapshot(*status):
    n = len(status)
    names = tuple(f"p{i}" for i in range(n))
    parameters = Parameters(names, ((),) * n, ("float32",) * n)
    return Snapshot(0, 0, "backward", 0.0, parameters, np.asarray(status, object), np.ones(n), {})


@pytest.mark.parametrize("word", list(Status))
def test_has_is_the_comparison_with_the_word(word):
    """For members and plain words, one or several, and for arrays of text; a word that no status is equals none."""
    one = snapshot(*Status, *(str(status) for status in Status), "strange")
    assert one.has(word).tolist() == (one.status == word).tolist()
    assert one.has(str(word)).tolist() == one.has(word).tolist()
    assert one.has(word, "ok").tolist() == ((one.status == word) | (one.status == "ok")).tolist()
    assert not one.has().any()
    text = snapshot("ok", "zero")
    object.__setattr__(text, "status", text.status.astype(str))
    assert text.has("zero").tolist() == [False, True]


def test_a_word_that_is_no_status_is_an_error():
    """A slip in a rule must not look like health."""
    with pytest.raises(KeyError):
        snapshot("ok").has("dead")


def test_parameters_are_equal_by_value():
    """Two descriptions of one model are one key."""
    a, b = (Parameters(("x",), ((2,),), ("float32",)) for _ in range(2))
    assert (a, hash(a)) == (b, hash(b))
    assert a != Parameters(("x",), ((2,),), ("float32",), ("0:1",))


def test_a_findings_severity_may_be_a_word():
    """And one that is none is an error where the finding is made."""
    assert Finding("r", 0, "warning", "").severity is Severity.WARNING
    with pytest.raises(ValueError, match="loud"):
        Finding("r", 0, "loud", "")


@pytest.mark.parametrize(
    ("shape", "dtype", "piece"),
    [
        ((6, 5), "float32", ""),
        ((6, 5), "float32", "2:4,0:5"),
        ((6, 5), "float32", "0:6,3:5"),
        ((6, 5), "float32", "6:6,0:5"),
        ((4, 3, 2), "complex64", "1:3,0:3,1:2"),
        ((), "float32", ""),
        ((6, 5), "float32", "@7:19"),
        ((6, 5), "float32", "@0:0"),
        ((4, 3), "complex64", "@5:12"),
    ],
)
def test_places_in_a_piece_and_in_the_whole(shape, dtype, piece):
    """Each of this rank's entries has its place in the whole, and no other rank's entry has a place here."""
    parameters = Parameters(("x",), (shape,), (dtype,), (piece,))
    whole = np.arange(np.prod(shape, dtype=int) * (2 if dtype == "complex64" else 1))
    tensor = whole.reshape((*shape, *([2] if dtype == "complex64" else [])))
    if piece.startswith("@"):
        tensor = tensor.reshape(-1, *tensor.shape[len(shape) :])
    blocks = tuple(slice(*map(int, part.strip("@").split(":"))) for part in piece.split(",")) if piece else ...
    here = tensor[blocks].reshape(-1)
    local = np.arange(len(here))
    np.testing.assert_array_equal(parameters.whole_index(0, local), here)
    np.testing.assert_array_equal(parameters.local_index(0, here), local)
    others = np.setdiff1d(whole, here)
    assert (parameters.local_index(0, others) == -1).all()
    assert np.prod(parameters.local_shape(0), dtype=int) * (2 if dtype == "complex64" else 1) == len(here)


def test_scattered_entries_have_no_places():
    """Where entries are not next to each other their number is known, and nothing is said of where they are."""
    parameters = Parameters(("x", "y"), ((6, 5), (3,)), ("float32",) * 2, ("~4,0:5", "partial"))
    assert parameters.local_shape(0) == (4, 5)
    assert parameters.whole_index(0, np.array([0, 7, -1])).tolist() == [-1, -1, -1]
    assert parameters.local_index(0, np.array([0, 7])).tolist() == [-1, -1]
    assert [parameters.alone(row) for row in (0, 1)] == [True, True]
    assert parameters.local_shape(1) == (3,)
