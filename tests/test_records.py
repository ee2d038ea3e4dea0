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
