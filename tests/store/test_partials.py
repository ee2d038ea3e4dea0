"""Whole partials that were kept: written within an allowance, read back bit for bit, never believed without a check."""

import numpy as np
import pytest

from gradlens.errors import CorruptRunError, NothingCapturedError
from gradlens.store.partials import FOLDER, Kept, PartialStore
from gradlens.store.run import open_run
from gradlens.store.tables import Key
from tests.store import made


def kept(name="body.0.weight", shape=(3, 4), dtype="float32", piece="", stage="used", seed=0, count=None):
    """What a rank holds of a parameter."""
    draw = np.random.default_rng(seed)
    n = int(np.prod(shape)) if count is None else count
    return Kept((name, tuple(shape), dtype, piece), stage, draw.standard_normal(n), draw.standard_normal(n))


@pytest.fixture
def run(tmp_path):
    """A run of one segment."""
    return made.write(tmp_path / "run", made.training(5))


def write(run, steps, entries=None, key=None, **options):
    """A store that has written these steps."""
    store = PartialStore(run, key or Key(0, 0), **options)
    for step in steps:
        store.write(step, 0, entries or [kept(seed=step)])
    return store


def test_what_was_kept_is_read_back(run):
    """In the parameter's shape, with the precision of its dtype, of the last step or the last before one."""
    write(run, [0, 1, 3], [kept(), kept("head.bias", (4,), "float64", seed=1), kept("c", (2,), "complex64", count=4)])
    read = open_run(run)
    assert read.kept() == {"body.0.weight": [0, 1, 3], "head.bias": [0, 1, 3], "c": [0, 1, 3]}
    found = read.partials("body.0.weight")
    assert (found.step, found.stage, found.partial.shape) == (3, "used", (3, 4))
    np.testing.assert_array_equal(found.partial.ravel(), kept().partial.astype(np.float32))
    np.testing.assert_array_equal(found.value.ravel(), kept().value.astype(np.float32))
    np.testing.assert_array_equal(read.partials("head.bias").partial, kept("", (4,), seed=1).partial)
    assert read.partials("c").partial.shape == (2, 2)
    assert read.partials("body.0.weight", 2).step == 1
    assert read.partials("body.0.weight", 99).step == 3


def test_it_is_a_frame_of_weights(run):
    """With the columns of `lens.weights()`, one row a weight in order."""
    write(run, [0])
    frame = open_run(run).partials("body.0.weight").frame()
    assert list(frame["index"])[:5] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert list(frame["direction"]) == ["increase" if p < 0 else "decrease" for p in frame["partial"]]


def test_nothing_kept_says_what_to_do(run):
    """The call that would have kept it, or the names that there are."""
    with pytest.raises(NothingCapturedError, match=r"watch\(keep="):
        open_run(run).partials("body.0.weight")
    write(run, [0])
    with pytest.raises(NothingCapturedError, match=r"body\.0\.weight"):
        open_run(run).partials("body.0.wieght")
    assert made.write(run.parent / "other", made.training(1)).exists()
    assert open_run(run.parent / "other").kept() == {}


def test_files_stay_within_the_allowance(run):
    """Steps are thinned out as the run grows, over its whole length; the newest and the oldest stay."""
    one = 12 * 2 * 4 + 300
    store = write(run, range(100), allowance=10 * one)
    assert sum(path.stat().st_size for path in (run / FOLDER).iterdir()) <= 10 * one
    steps = open_run(run).kept()["body.0.weight"]
    assert steps[-1] == 99
    assert steps[0] < 40
    assert len(steps) >= 4
    assert store.growth > 1.2
    assert write(run, [], allowance=10 * one)._sizes.keys() == store._sizes.keys()


def test_a_resumed_run_replaces_its_steps(run):
    """Partials of steps that a later lens has replaced are not read."""
    write(run, [0, 2, 4])
    made.write(run, made.training(2, first=3), settings={"first_step": 3})
    assert open_run(run).kept() == {"body.0.weight": [0, 2]}
    write(run, [3], key=Key(1, 0))
    assert open_run(run).kept() == {"body.0.weight": [0, 2, 3]}


def test_shards_of_ranks_are_put_together(tmp_path):
    """Each rank's block at its place; what no rank kept is NaN."""
    run = tmp_path / "run"
    for rank in (0, 1):
        of = made.parameters(("a",), ((4, 2),), pieces=(f"{2 * rank}:{2 * rank + 2},0:2",))
        made.write(run, made.training(2, of=of, rank=rank), rank=rank, settings={"ranks": 2})
        piece = f"{2 * rank}:{2 * rank + 2},0:2"
        PartialStore(run, Key(0, rank)).write(1, 0, [kept("a", (4, 2), piece=piece, seed=rank, count=4)])
    found = open_run(run).partials("a")
    halves = [kept("a", count=4, seed=rank).partial.astype(np.float32).reshape(2, 2) for rank in (0, 1)]
    np.testing.assert_array_equal(found.partial, np.concatenate(halves))
    (next((run / FOLDER).glob("0000-rank1*"))).unlink()
    assert np.isnan(open_run(run).partials("a").partial[2:]).all()


def test_every_flipped_byte_is_an_error_or_changes_nothing(run):
    """No damage becomes a number: the error names the file."""
    write(run, [0])
    (path,) = (run / FOLDER).iterdir()
    whole = path.read_bytes()
    expected = open_run(run).partials("body.0.weight").partial
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with pytest.raises(CorruptRunError, match=path.name):
            open_run(run).partials("body.0.weight")
    for stop in (0, 5, 20, len(whole) - 1):
        path.write_bytes(whole[:stop])
        with pytest.raises(CorruptRunError, match=path.name):
            open_run(run).partials("body.0.weight")
    path.write_bytes(whole)
    np.testing.assert_array_equal(open_run(run).partials("body.0.weight").partial, expected)


@pytest.mark.parametrize(
    "entry",
    [
        kept(shape=(1 << 20, 1 << 20), count=2),
        kept(shape=(4,), count=3),
        kept(shape=(4,), piece="0:9", count=9),
        kept(stage="sideways"),
    ],
)
def test_hostile_files_are_refused(run, entry):
    """Shapes that would take all memory, counts that do not fit, pieces that do not lie within, unknown words."""
    write(run, [0], [entry])
    with pytest.raises(CorruptRunError):
        open_run(run).partials("body.0.weight")
