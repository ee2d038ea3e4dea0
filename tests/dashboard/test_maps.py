"""Matrices that are read in pieces, also while the run grows."""

import time

import numpy as np
import pytest

from gradlens.dashboard import maps
from gradlens.dashboard.downsampling import (
    MISSING,
    NONFINITE,
    NOTHING,
    PER_DECADE,
    PER_ONE,
    ZERO,
    _narrow,
    encoded,
)
from gradlens.dashboard.maps import Maps, Scan, quantity
from gradlens.errors import ArgumentError
from gradlens.store.run import Run
from tests.store import made

MISSING_STATUSES = ["frozen", "uncaptured", "absent", "excluded", "undefined"]


def scanned(run, name="rms", stage="used", scan=None):
    """All of a quantity, read to the end."""
    scan = scan or Scan(quantity(name), stage)
    for _ in range(10_000):
        scan.advance(run, time.monotonic())
        if scan.complete:
            return scan
    raise AssertionError("the scan does not end")


def expected(run, scan, name):
    """The same from the whole history at once."""
    frame = run.history(stage="used")
    values = quantity(name).value(frame[["step", "parameter", "status", *quantity(name).columns]])
    for row, parameter in enumerate(scan.names):
        for column in range(scan.cells.shape[1]):
            steps = range((scan.cells.first + column) * scan.cells.width, (scan.cells.first + column + 1) * scan.cells.width)
            of = frame["step"].isin(steps) & (frame["parameter"] == parameter)
            kept = _narrow(values[of & ~frame["status"].isin(MISSING_STATUSES) & np.isfinite(values)])
            yield row, column, kept, set(frame["status"][of])


@pytest.mark.parametrize("name", list(maps.QUANTITIES))
@pytest.mark.parametrize("rows", [7, 60, 10_000])
def test_a_map_read_in_pieces_is_that_of_the_whole_history(tmp_path, monkeypatch, name, rows):
    """Whatever fits in memory at once, each cell has the extremes of its rows, and says which were ill or missing."""
    monkeypatch.setattr(maps, "ROWS", rows)
    monkeypatch.setattr(maps, "COLUMNS", 10)
    run = Run(made.write(tmp_path / "run", made.training(37, first=5)))
    scan = scanned(run, name)
    assert scan.names == list(made.NAMES)
    assert scan.cells.shape[1] <= 10
    for row, column, kept, statuses in expected(run, scan, name):
        cell = scan.cells.low[row, column], scan.cells.high[row, column]
        np.testing.assert_array_equal(cell, (kept.min(), kept.max()) if len(kept) else (np.nan, np.nan))
        flags = scan.cells.flags[row, column]
        assert bool(flags & NONFINITE) == ("nonfinite" in statuses)
        assert bool(flags & MISSING) == bool(statuses & set(MISSING_STATUSES))


def test_a_growing_run_is_read_on(tmp_path, monkeypatch):
    """What was read stays, new steps come to it, and columns get wider; at each moment it is the map of what is there."""
    monkeypatch.setattr(maps, "COLUMNS", 8)
    scan = Scan(quantity("rms"), "used")
    with made.store(tmp_path / "run", roll=50) as to:
        run = Run(tmp_path / "run")
        for first in (0, 3, 11, 60):
            for record in made.training(7, first=first):
                to.write(record)
            to.flush()
            scanned(run, scan=scan)
            for row, column, kept, _ in expected(run, scan, "rms"):
                if len(kept):
                    assert scan.cells.low[row, column] == kept.min()
                    assert scan.cells.high[row, column] == kept.max()
    assert scan.cells.width == 16


def test_a_resumed_run_is_read_again(tmp_path):
    """Steps that a later lens has replaced do not stay on the map."""
    made.write(tmp_path / "run", made.training(20))
    run, scan = Run(tmp_path / "run"), Scan(quantity("rms"), "used")
    scanned(run, scan=scan)
    before = scan.cells.low.copy()
    made.write(tmp_path / "run", made.training(5, first=10, seed=1), settings={"first_step": 10})
    scanned(run, scan=scan)
    assert scan.cells.shape[1] == 15
    np.testing.assert_array_equal(scan.cells.low[:, :10], before[:, :10])
    assert not np.array_equal(scan.cells.low[:, 10:], before[:, 10:15])


def test_an_empty_run_has_an_empty_map(tmp_path):
    """Before the first step there is nothing, and it is complete."""
    with made.store(tmp_path / "run"):
        scan = scanned(Run(tmp_path / "run"))
    assert scan.cells.shape == (0, 0)


def test_an_answer_comes_in_time_and_says_how_far_it_is(tmp_path, monkeypatch):
    """A request ends after a piece when its time is over; asked again, it goes on until complete."""
    monkeypatch.setattr(maps, "ROWS", 10)
    run, shares = Run(made.write(tmp_path / "run", made.training(30))), []
    several = Maps()
    while not shares or shares[-1] < 1:
        header, arrays = several.scan(run, quantity("rms"), "used", time.monotonic())
        shares.append(header["share"])
        assert header["complete"] == (shares[-1] == 1)
    assert len(shares) > 5
    assert shares == sorted(shares)
    assert arrays["values"].shape == arrays["flags"].shape == (header["rows"], header["columns"])


def test_the_least_used_maps_go_when_memory_is_short(tmp_path):
    """No more is kept than allowed, but for the newest."""
    run = Run(made.write(tmp_path / "run", made.training(30)))
    several = Maps(max_bytes=2500)
    for name in maps.QUANTITIES:
        several.scan(run, quantity(name), "used", time.monotonic() + 60)
        assert sum(scan.nbytes for scan in several._scans.values()) <= 2500
    assert list(several._scans)[-1][1] == "agreement"


def test_an_unknown_quantity_is_named():
    """The error says which there are."""
    with pytest.raises(ArgumentError, match="rms"):
        quantity("rmss")


def test_numbers_are_coded_within_half_a_percent():
    """On a logarithmic scale a code decodes to within 0.3 %, whatever its size; zero and nothing have codes of their own."""
    values = np.array([1e-30, 3e-8, 0.123, 5.0, 7e20])
    np.testing.assert_allclose(10.0 ** (encoded(values, log=True) / PER_DECADE), values, rtol=3e-3)
    assert encoded(np.array([0.0, np.nan]), log=True).tolist() == [ZERO, NOTHING]
    linear = np.array([-1.0, -0.123, 0.0, 1.0, np.nan])
    decoded = encoded(linear, log=False)
    np.testing.assert_allclose(decoded[:4] / PER_ONE, linear[:4], atol=2e-5)
    assert decoded[4] == NOTHING
