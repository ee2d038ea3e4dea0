"""Which backend reads the tensors, and what happens where one is missing."""

import pytest
import torch

from gradlens import fields, kernels
from gradlens.errors import GradlensWarning
from gradlens.kernels import native, reference
from tests.kernels.made import check_identical


@pytest.fixture
def afresh():
    """The backend is looked for again, before and after."""
    kernels._native.cache_clear()
    yield
    kernels._native.cache_clear()


def test_without_the_native_kernel_the_reference_serves(afresh, monkeypatch, tmp_path):
    """One note says how to get it; the numbers come all the same."""
    load = native.load
    monkeypatch.setattr(native, "load", lambda: load(tmp_path / "missing.so"))
    g = torch.randn(50)
    with pytest.warns(GradlensWarning, match="C compiler") as notes:
        rows = [kernels.summarize([g]), kernels.summarize([g])]
    assert len(notes) == 1
    for row in rows:
        check_identical(row, reference.summarize([g]), fields.SUMMARY)


def test_a_note_turned_into_an_error_stops_nothing(afresh, monkeypatch, tmp_path):
    """The suite turns our warnings into errors, as a user may; in a training step none is raised."""
    load = native.load
    monkeypatch.setattr(native, "load", lambda: load(tmp_path / "missing.so"))
    assert kernels.sample([torch.ones(3)])[0, :3].tolist() == [1, 1, 1]


def test_a_library_that_is_not_ours_is_refused(tmp_path):
    """A file that does not load, or was built for other columns, is no backend."""
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(native.UnavailableError, match="does not load"):
        native.load(broken)


def test_other_columns_are_refused(monkeypatch):
    """The library says for which columns it was built."""
    if not native.LIBRARY.exists():
        pytest.skip("the native kernel was not built")
    monkeypatch.setattr(native, "_columns", lambda: "others")
    with pytest.raises(native.UnavailableError, match="other columns"):
        native.load()
