"""The first rank's dashboard shows what all ranks have, and no rank waits for another."""

import os
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from torch import distributed, nn

import gradlens
from gradlens.writers import exchange, tags
from tests.distributed.made import batches, folder, model
from tests.distributed.ranks import launch
from tests.distributed.shown import NOISE, NORM, NUMBERS, dashboard, train
from tests.distributed.test_ddp import four, two
from tests.distributed.test_fsdp2 import group as sharded
from tests.writers.reading import text

pytestmark = pytest.mark.distributed


COUNTS = pytest.mark.parametrize("count", [2, 4])


@COUNTS
@pytest.mark.situation(
    "rank segments, and the first rank's dashboard while training runs",
    note="shards are pooled: what is shown is what one process shows; the training threads do not touch the group's store",
)
def test_shards_are_pooled_while_training_runs(launched, tmp_path, count):
    """Before the run is closed its dashboard is that of the same model in one process; each rank has a segment."""
    ranks = launched(sharded, count)
    whole, _ = train(model(), batches(), tmp_path)
    live, *_ = ranks[0]["pooled"]
    for tag in NUMBERS:
        assert list(live[tag]) == [0, 1, 2]
        np.testing.assert_allclose(list(live[tag].values()), list(whole[tag].values()), rtol=1e-4, err_msg=tag)
    for result in ranks:
        _, threads, there = result["pooled"]
        assert there == list(range(count))
        assert threads
        assert "MainThread" not in threads


@pytest.mark.parametrize(("group", "count"), [(two, 2), (four, 4)], ids=["2", "4"])
@pytest.mark.situation(
    "the noise scale on the first rank's dashboard", note="what it shows is what the records of all ranks give afterwards"
)
def test_the_noise_scale_of_ranks_is_shown(launched, group, count):
    """What the dashboard shows while training runs is what the records of all ranks give afterwards."""
    live, threads, rows = launched(group, count)[0]["replicated"]
    assert [row.step for row in rows] == [0, 1, 2]
    wanted = {row.step: row.noise_scale for row in rows if not np.isnan(row.noise_scale)}
    assert wanted
    assert live[NOISE] == pytest.approx(wanted, rel=1e-5)
    assert "MainThread" not in threads


class Alone(nn.Module):
    """A parameter that only this rank has; its gradient is all ones."""

    def __init__(self):
        super().__init__()
        self.register_parameter(f"w{distributed.get_rank()}", nn.Parameter(torch.zeros(4)))

    def forward(self):
        return sum(p.sum() for p in self.parameters())


def steps(name, count, pause=0.0, dies=None):
    """Steps that no collective holds together; how long they took, and how long closing took."""
    net = Alone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    lens = gradlens.watch(net, optimizer, run=folder(name), rules=())
    start = time.monotonic()
    for step in range(count):
        if step == dies:
            lens.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause)
        optimizer.zero_grad()
        net().backward()
        optimizer.step()
    trained = time.monotonic()
    lens.close()
    return trained - start, time.monotonic() - trained


def _wait(path, there=True):
    while path.exists() != there:
        time.sleep(0.01)


def deadly():
    """One rank is slow; then one dies; then the first one dies, and with it the store. The second lives to tell."""
    warnings.simplefilter("ignore", gradlens.GradlensWarning)
    rank = distributed.get_rank()
    slow = steps("slow", 10, pause=0.05 * (rank == 1))
    distributed.barrier()
    exchange.PATIENCE = 0.5
    dead = steps("dead", 12, pause=0.1, dies=3 if rank == 2 else None)
    folder(f"done{rank}").write_text(str(slow[0]))
    if rank == 0:
        _wait(folder("done1"))
        steps("gone", 10, dies=3)
    _wait(folder("done0"))
    time.sleep(0.5)
    gone = steps("gone", 10, pause=0.02)
    shown = {name: dashboard(folder(name)) for name in ("slow", "dead")}
    norms = {name: dict(there[NORM]) for name, there in shown.items()}
    page = text(shown["dead"][tags.FINDINGS][-1])
    first = float(folder("done0").read_text())
    recorded = gradlens.open_run(folder("gone")).history()
    return first, dead, gone, norms, page, sorted(set(recorded[recorded["parameter"] == "w1"]["step"]))


@pytest.fixture(scope="module")
def survivor():
    """What the second of three ranks saw."""
    (result,) = launch(deadly, 3, dying=(0, 2))
    return result


@pytest.mark.situation("ranks with other parameters, one of them slow", note="none waits; the dashboard has all at the end")
def test_a_slow_rank_holds_no_other_up(survivor):
    """The first rank trains at its own pace, and its dashboard has all three ranks' tables when the run is closed."""
    first, _, _, norms, _, _ = survivor
    assert first < 0.45
    assert norms["slow"] == {step: pytest.approx(12**0.5) for step in range(10)}


@pytest.mark.situation("a rank dies", note="after five seconds the dashboard goes on without it, and a finding names it")
def test_a_dead_rank_is_gone_without(survivor):
    """After a while the dashboard goes on with the ranks that live, and says which is missing."""
    _, (trained, closed), _, norms, page, _ = survivor
    assert list(norms["dead"]) == list(range(12))
    seen = [round(value**2) for value in norms["dead"].values()]
    assert seen == [12] * 3 + [8] * 9
    assert "nothing of 1 rank" in page
    assert trained + closed < 10


@pytest.mark.situation(
    "the first rank dies, and the group's store with it", note="the others train on and keep their records"
)
def test_a_rank_outlives_the_first_one_and_its_store(survivor):
    """Where the store died with the first rank, the others train on, keep their records, and close in time."""
    _, _, (trained, closed), _, _, recorded = survivor
    assert recorded == list(range(10))
    assert trained + closed < 10
