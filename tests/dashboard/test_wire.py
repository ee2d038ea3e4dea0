"""What goes over the wire comes out as it went in."""

import json

import numpy as np
import pytest

from gradlens.dashboard import wire


def test_arrays_come_out_as_they_went_in():
    """Dtypes, shapes, NaN and infinities; each array begins at a multiple of 8, as typed arrays ask."""
    arrays = {
        "a": np.array([[1.5, np.nan], [np.inf, -0.0]]),
        "b": np.arange(3, dtype=np.int16),
        "none": np.empty((0, 4), np.float32),
        "c": np.arange(5, dtype=np.uint8),
    }
    data = wire.pack({"name": "ü", "n": 3}, arrays)
    header, found = wire.unpack(data)
    assert header == {"name": "ü", "n": 3}
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    length = int.from_bytes(data[:4], "little")
    described = json.loads(data[4 : 4 + length])["arrays"]
    assert (4 + length) % 8 == 0
    assert all(each["offset"] % 8 == 0 for each in described.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float64("nan"), [float("nan")], {"x": np.float32("inf")}])
def test_json_has_no_words_that_browsers_refuse(value):
    """What is not finite is null."""
    assert "NaN" not in wire.text({"a": value}).decode()
    assert "Infinity" not in wire.text({"a": value}).decode()
    json.loads(wire.text({"a": value}))
