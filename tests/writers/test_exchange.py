"""The tables of all ranks in one dashboard: through a real store, in one process."""

import time

import numpy as np
import pytest
import torch
from torch.distributed import HashStore, PrefixStore, TCPStore

from gradlens import kernels
from gradlens.errors import GradlensWarning
from gradlens.noise import estimate
from gradlens.pooling import pool
from gradlens.records import Finding, Parameters, Severity
from gradlens.statistics.table import Piece, Table
from gradlens.statistics.transfer import Transfer
from gradlens.testing import RecordingWriter
from gradlens.writers import exchange
from gradlens.writers.exchange import Pooled, Sender


@pytest.fixture
def store():
    """A store as the ranks of a job have it, over its own connection."""
    server = TCPStore("localhost", 0, 1, True, wait_for_workers=False)
    yield PrefixStore("run", server).clone()
    del server


def sending(store, rank, ranks):
    return Sender(lambda: store, rank, ranks)


def pooling(recorder, store, ranks, **arguments):
    return Pooled(recorder, lambda: store, ranks, **arguments)


def table(step, rank, tensors, pieces=(), stage="used", backward=0, scalars=None):
    """The snapshot of a rank that holds these."""
    shapes = tuple(tuple(t.shape) for t in tensors.values())
    if pieces:
        shapes = tuple((2 * shape[0], *shape[1:]) for shape in shapes)
    parameters = Parameters(tuple(tensors), shapes, ("float32",) * len(tensors), tuple(pieces))
    made = Table(step, backward, stage, parameters, time=float(step), rank=rank)
    made.pieces = [Piece(list(range(len(tensors))), kernels.summarize(list(tensors.values()), list(tensors.values())))]
    return made.unpack(Transfer(made.pack()).wait(), scalars or {"loss": 1.5})


def shards(step, ranks=2):
    """A step's snapshots, of two ranks that hold half of a matrix each."""
    torch.manual_seed(step)
    whole = torch.randn(8, 3)
    halves = whole.chunk(2)
    pieces = ["0:4,0:3", "4:8,0:3"]
    return [table(step, rank, {"w": halves[rank % 2]}, [pieces[rank % 2]]) for rank in range(ranks)]


def equal(a, b):
    assert (a.step, a.backward, str(a.stage), a.ranks, a.names) == (b.step, b.backward, str(b.stage), b.ranks, b.names)
    assert a.parameters == b.parameters
    for name, values in b.columns.items():
        np.testing.assert_array_equal(a.columns[name], values, err_msg=name)
    np.testing.assert_array_equal(a.histogram, b.histogram)
    for part in ("index", "partial", "value"):
        np.testing.assert_array_equal(getattr(a.top, part), getattr(b.top, part))
    assert a.status.tolist() == b.status.tolist()


def test_a_table_travels_whole():
    """What is unpacked is what was packed, every column, the histogram and the top weights too."""
    snapshot = shards(3)[1]
    there, _ = exchange.unpack(*exchange.pack(snapshot, [0]), snapshot.parameters)
    equal(there, snapshot)
    assert (there.rank, there.scalars, there.time) == (1, {"loss": 1.5}, 3.0)


def test_tables_are_pooled_in_the_order_of_steps(store):
    """Each step is handed on once both halves are there, and equals their pool."""
    recorder = RecordingWriter()
    pooled, sender = pooling(recorder, store, 2), sending(store, 1, 2)
    for step in range(5):
        own, other = shards(step)
        pooled.write(own)
        assert len(recorder.snapshots) == step
        sender.write(other)
        pooled.flush()
        equal(recorder.snapshots[-1], pool([own, other]))
    assert [s.step for s in recorder.snapshots] == [0, 1, 2, 3, 4]


def test_findings_pass_by(store):
    """A finding of the first rank does not wait."""
    recorder = RecordingWriter()
    pooling(recorder, store, 2).write(Finding("rule", 0, Severity.INFO, "seen"))
    assert [f.rule for f in recorder.findings] == ["rule"]


def test_copies_stay_where_they_are(store):
    """Once the first rank has said what it has, a rank of copies sends its moment and no row."""
    recorder = RecordingWriter()
    pooled, sender = pooling(recorder, store, 2), sending(store, 1, 2)
    sizes = []
    for step in range(3):
        own, other = (table(step, rank, {"w": torch.ones(300, 4)}) for rank in range(2))
        sender.write(other)
        sizes.append(sender._sent[-1][0])
        pooled.write(own)
    assert sizes[0] > 0
    assert sizes[1:] == [0, 0]
    assert [s.ranks for s in recorder.snapshots] == [2, 2, 2]
    equal(recorder.snapshots[2], pool([own, other]))


def test_the_store_does_not_grow(store):
    """After 200 steps it has as many keys as after the first ring, whether anybody reads or not."""
    sender = sending(store, 1, 2)
    counts = []
    for step in range(200):
        sender.write(shards(step)[1])
        counts.append(store.num_keys())
    assert counts[-1] == counts[exchange.SLOTS]


def test_large_tables_travel_in_parts_and_make_room(store, monkeypatch):
    """A value of the store is bounded, and so is what it holds of a rank: older tables are emptied."""
    monkeypatch.setattr(exchange, "PART", 500)
    recorder = RecordingWriter()
    sender = sending(store, 1, 2)
    other = shards(0)[1]
    size = len(exchange.pack(other, [0])[1])
    assert size > 500
    monkeypatch.setattr(sender, "_limit", 2 * size + size // 2)
    for step in range(6):
        sender.write(shards(step)[1])
    there = [bool(store.get(f"1/table/{slot}/0")) for slot in range(6)]
    assert there == [False] * 4 + [True] * 2
    pooled = pooling(recorder, store, 2)
    for step in range(6):
        pooled.write(shards(step)[0])
    assert [s.ranks for s in recorder.snapshots][-2:] == [2, 2]


def test_one_table_too_large_for_the_store_ends_the_sending(store, monkeypatch):
    """It is named once; the first rank goes on without."""
    sender = sending(store, 1, 2)
    monkeypatch.setattr(sender, "_limit", 10)
    with pytest.warns(GradlensWarning, match="rank 1 is no longer in the first rank's dashboard"):
        sender.write(shards(0)[1])
    sender.write(shards(1)[1])
    assert not store.check(["1/table/0"])


def test_a_silent_rank_is_waited_for_once(store):
    """After `patience` its part is left out and a finding says so; when it is back it is in again."""
    recorder = RecordingWriter()
    pooled, sender = pooling(recorder, store, 3, patience=0.1), sending(store, 1, 3)
    silent = sending(store, 2, 3)

    def step(number, *senders):
        own, *others = shards(number, 3)
        for each, other in zip((sender, silent), others, strict=True):
            if each in senders:
                each.write(other)
        pooled.write(own)

    step(0, sender)
    assert recorder.snapshots == []
    time.sleep(0.15)
    step(1, sender)
    assert [(s.step, s.ranks) for s in recorder.snapshots] == [(0, 2), (1, 2)]
    (finding,) = recorder.findings
    assert finding.rule == "ranks-missing"
    assert "1 rank (2)" in finding.seen
    step(2, sender)
    assert recorder.snapshots[-1].ranks == 2
    step(3, sender, silent)
    assert recorder.snapshots[-1].ranks == 3
    assert len(recorder.findings) == 1


def test_a_lost_part_leaves_its_step_out(store):
    """Where a rank's part of a step was lost the sums would be too small: the dashboard does without that step."""
    recorder = RecordingWriter()
    pooled, sender = pooling(recorder, store, 2), sending(store, 1, 2)
    for step in range(3):
        own, other = shards(step)
        if step != 1:
            sender.write(other)
        pooled.write(own)
    assert [(s.step, s.ranks) for s in recorder.snapshots] == [(0, 2), (2, 2)]


def test_a_rank_of_other_steps_does_not_silence_the_dashboard(store):
    """A rank that never has the first one's steps is left out for good after a while."""
    recorder = RecordingWriter()
    pooled, sender = pooling(recorder, store, 2), sending(store, 1, 2)
    for step in range(40):
        own, other = shards(step)
        if step % 2:
            sender.write(other)
        else:
            pooled.write(own)
    pooled.close()
    assert len(recorder.snapshots) == 20 - exchange.LOST
    assert {s.ranks for s in recorder.snapshots} == {1}


def test_fewer_steps_are_asked_for_when_too_much_comes(store, monkeypatch):
    """Every second step, then every fourth, on both sides alike; and all of them again when there is room."""
    clock = [0.0]
    monkeypatch.setattr(exchange.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(exchange, "RATE", 1)
    recorder = RecordingWriter()
    pooled, sender = pooling(recorder, store, 2), sending(store, 1, 2)
    for step in range(100):
        own, other = shards(step)
        sender.write(other)
        clock[0] += 0.3
        pooled.write(own)
    steps = [s.step for s in recorder.snapshots]
    assert {s.ranks for s in recorder.snapshots} == {2}
    assert steps[:8] == list(range(8))
    gaps = np.diff(steps)
    assert set(gaps) >= {1, 2, 4}
    assert (np.diff(gaps) >= 0).mean() > 0.8
    monkeypatch.setattr(exchange, "RATE", 1 << 40)
    for step in range(100, 200):
        own, other = shards(step)
        sender.write(other)
        clock[0] += 0.3
        pooled.write(own)
    assert np.diff([s.step for s in recorder.snapshots])[-10:].tolist() == [1] * 10
    assert {s.ranks for s in recorder.snapshots} == {2}


def test_each_rank_may_have_other_parameters(store):
    """As under pipeline parallelism: the pooled table has the rows of all."""
    recorder = RecordingWriter()
    pooled, sender = pooling(recorder, store, 2), sending(store, 1, 2)
    for step in range(3):
        sender.write(table(step, 1, {"b": torch.full((2,), 2.0)}))
        pooled.write(table(step, 0, {"a": torch.ones(3)}))
    assert [s.names for s in recorder.snapshots] == [("a", "b")] * 3
    assert recorder.snapshots[-1].column("sum").tolist() == [3, 4]


def test_parameters_that_change_are_described_anew(store):
    """Rows go on to mean what they say when the model changes on the way."""
    recorder = RecordingWriter()
    pooled, sender = pooling(recorder, store, 2), sending(store, 1, 2)
    for step in range(30):
        names = {f"p{step % 13}": torch.full((2,), float(step))}
        sender.write(table(step, 1, names))
        pooled.write(table(step, 0, {"a": torch.ones(3)}))
        assert recorder.snapshots[-1].names == ("a", f"p{step % 13}")
        assert recorder.snapshots[-1].column("sum").tolist() == [3, 2 * step]


def test_the_noise_scale_comes_from_the_ranks_own_gradients(store):
    """Their squared norms travel though their rows do not; it equals what the stored gradients give."""
    recorder = RecordingWriter()
    pooled, senders = pooling(recorder, store, 3), [sending(store, rank, 3) for rank in (1, 2)]
    torch.manual_seed(0)
    for step in range(3):
        own = [0.1 * torch.randn(50) + 1 for _ in range(3)]
        mean = torch.stack(own).mean(0)
        for rank, sender in enumerate(senders, start=1):
            sender.write(table(step, rank, {"w": own[rank]}, stage="backward"))
            sender.write(table(step, rank, {"w": mean}, stage="reduced"))
            sender.write(table(step, rank, {"w": mean}))
        pooled.write(table(step, 0, {"w": own[0]}, stage="backward"))
        pooled.write(table(step, 0, {"w": mean}, stage="reduced"))
        pooled.write(table(step, 0, {"w": mean}))
    noise = estimate([float(g.double().square().sum()) for g in own], averaged=float(mean.double().square().sum()))
    assert [s.stage for s in recorder.snapshots] == ["backward", "reduced", "used"] * 3
    assert [sent for sent, _ in senders[0]._sent][-3:] == [1 + 8 * len(exchange.ALONE), 0, 0]
    assert "noise_scale" not in recorder.snapshots[0].scalars
    gauged = pooled._noise
    assert gauged.last.backwards == 3
    whole, share = gauged.last.whole()
    assert share == 1
    assert 9 * whole.trace == pytest.approx(noise.trace, rel=1e-6)  # what a rank adds to the mean is a third of its own
    assert 9 * whole.signal == pytest.approx(noise.signal, rel=1e-6)
    assert recorder.snapshots[-1].scalars["noise_scale"] == pytest.approx(gauged.smoothed.scale())


class Broken(HashStore):
    """A store whose server is gone."""

    def set(self, key, value):
        raise ConnectionError("gone")

    def check(self, keys):
        raise ConnectionError("gone")


def test_a_broken_store_leaves_each_rank_to_itself():
    """Both sides say so once; the first rank's tables go on, but those of shards: they are not what they were."""
    recorder = RecordingWriter()
    pooled, sender = pooling(recorder, Broken(), 2), sending(Broken(), 1, 2)
    own, other = (table(0, rank, {"w": torch.ones(3)}) for rank in range(2))
    with pytest.warns(GradlensWarning, match="the dashboard shows the first rank alone: ConnectionError: gone"):
        pooled.write(own)
    with pytest.warns(GradlensWarning, match="rank 1 is no longer in the first rank's dashboard"):
        sender.write(other)
    pooled.write(table(1, 0, {"w": torch.ones(3)}))
    pooled.write(shards(2)[0])
    sender.write(shards(1)[1])
    pooled.close()
    assert [(s.step, s.ranks) for s in recorder.snapshots] == [(0, 1), (1, 1)]
    assert recorder.findings == []
    assert recorder.calls["close"] == 1


def test_closing_waits_for_what_is_on_its_way_but_not_for_ever(store, monkeypatch):
    """The last steps are handed on, whole if they can be."""
    monkeypatch.setattr(exchange, "PARTING", 0.2)
    recorder = RecordingWriter()
    pooled = pooling(recorder, store, 2)
    pooled.write(shards(0)[0])
    start = time.monotonic()
    pooled.close()
    assert time.monotonic() - start < 2
    assert recorder.records == []  # half of a matrix is no table of it
    assert recorder.calls["close"] == 1
