"""Which directories are served as runs, and which never."""

import os
import shutil

import pytest

from gradlens.dashboard import catalog
from gradlens.dashboard.catalog import Catalog, UnknownRunError
from gradlens.errors import RunDirectoryError
from tests.store.made import training, write


@pytest.fixture
def logdir(tmp_path):
    """Two runs, one of them nested, beside other things."""
    logdir = tmp_path / "logs"
    write(logdir / "a", training(2))
    write(logdir / "deep" / "er" / "b", training(2))
    (logdir / "no run").mkdir()
    (logdir / "no run" / "run.txt").write_text("{}")
    return logdir


def test_runs_are_found_wherever_they_lie(logdir):
    """Nested ones too, by their relative path; a log directory that is a run itself is called `.`."""
    assert Catalog(logdir).names() == ["a", os.path.join("deep", "er", "b")]
    assert Catalog(logdir / "a").names() == ["."]
    assert Catalog(logdir / "a").path(".") == logdir / "a"


def test_new_runs_appear(logdir, monkeypatch):
    """A run that was made meanwhile is listed by a later search."""
    monkeypatch.setattr(catalog, "FRESH", 0)
    found = Catalog(logdir)
    assert len(found.names()) == 2
    write(logdir / "c", training(1))
    assert len(found.names()) == 3


@pytest.mark.parametrize(
    "name", ["..", "../logs/a", "a/..", "a/../a", "/etc", "", ".", "no run", "a/", "a\0", "deep/er", "//a"]
)
def test_only_found_names_are_served(logdir, name):
    """Neither `..`, nor absolute paths, nor spellings that the search did not give."""
    with pytest.raises(UnknownRunError, match="there is no run"):
        Catalog(logdir).path(name)
    absolute = str(logdir / "a")
    with pytest.raises(UnknownRunError):
        Catalog(logdir).path(absolute)


def test_links_out_of_the_log_directory_are_not_runs(logdir, tmp_path):
    """A linked directory elsewhere is not listed; one that is linked within is."""
    outside = write(tmp_path / "outside", training(1))
    (logdir / "linked").symlink_to(outside)
    (logdir / "within").symlink_to(logdir / "deep" / "er" / "b")
    names = Catalog(logdir).names()
    assert "linked" not in names
    assert "within" in names or os.path.join("deep", "er", "b") in names


def test_a_run_swapped_for_a_link_is_refused(logdir, tmp_path):
    """A directory that becomes a link out after the search is not served."""
    found = Catalog(logdir)
    assert "a" in found.names()
    shutil.move(logdir / "a", tmp_path / "moved")
    (logdir / "a").symlink_to(tmp_path / "moved")
    with pytest.raises(UnknownRunError):
        found.path("a")


@pytest.mark.parametrize("inner", ["segments/0000-rank0.json", "history", "findings/0001-rank0.jsonl"])
def test_links_out_within_a_run_are_refused(logdir, tmp_path, inner):
    """No file of a run may be a link to elsewhere: what it leads to would be read."""
    secret = tmp_path / "secret"
    found = Catalog(logdir)
    path = found.path("a")
    found.version(path)
    target = path / inner
    if target.is_dir():
        shutil.move(target, secret)
    else:
        secret.write_text("{}")
        target.unlink(missing_ok=True)
    target.symlink_to(secret)
    with pytest.raises(RunDirectoryError, match="link out of the log directory"):
        found.version(path)


def test_the_version_changes_with_the_run(logdir):
    """Equal while nothing is written, another after a step, and none of TensorBoard's events matter."""
    found = Catalog(logdir)
    path = found.path("a")
    before = found.version(path)
    assert found.version(path) == before
    (path / "events.out.tfevents.1").write_bytes(b"x")
    assert found.version(path) == before
    write(path, training(1, first=2))
    assert found.version(path) != before


def test_the_search_is_bounded(logdir, monkeypatch):
    """Too many entries end it, with what was found until then, and it says so."""
    monkeypatch.setattr(catalog, "MAX_ENTRIES", 3)
    found = Catalog(logdir)
    found.names()
    assert not found.complete


def test_loops_of_links_end(logdir):
    """A link to a parent is followed once."""
    (logdir / "no run" / "up").symlink_to(logdir)
    assert "a" in {name.rpartition(os.sep)[2] for name in Catalog(logdir).names()}


def test_a_log_directory_that_is_not_there_has_no_runs(tmp_path):
    """It may be made later."""
    assert Catalog(tmp_path / "none").names() == []
