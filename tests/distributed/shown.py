"""What the first rank's dashboard shows of a training, while it runs."""

import threading
from unittest import mock

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradlens
import gradlens.store.store  # before the ranks are forked
from gradlens.watching import process_group
from gradlens.writers import tags
from tests.distributed.made import batches, folder, loss, mine, model
from tests.writers.reading import points

NORM, NOISE = f"{tags.HEALTH}/gradient_norm", f"{tags.HEALTH}/noise_scale"
NUMBERS = (NORM, f"{tags.DIRECTION}/increase_share", f"{tags.UPDATE}/update_ratio")


def dashboard(run):
    """What the dashboard has, by tag."""
    (path,) = run.glob("events.out.tfevents.*")
    return points(path)


def numbers(run):
    """The numbers of some tags, by step."""
    there = dashboard(run)
    return {tag: dict(there.get(tag, ())) for tag in (*NUMBERS, NOISE)}


class Followed:
    """The group's store, and the threads that use it."""

    def __init__(self, store, threads):
        self._store, self._threads = store, threads

    def __getattr__(self, name):
        self._threads.add(threading.current_thread().name)
        return getattr(self._store, name)


def train(net, data, run, **arguments):
    """A watched training; what the dashboard has before it is closed, and which threads have used the group's store."""
    threads = set()

    def followed(name, real=process_group.store):
        connect = real(name)
        return lambda: Followed(connect(), threads)

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with mock.patch.object(process_group, "store", followed), gradlens.watch(net, optimizer, run=run, **arguments) as lens:
        for x in data:
            optimizer.zero_grad()
            loss(net, x).backward()
            optimizer.step()
        lens.flush()
        if process_group.count() > 1:
            distributed.barrier()  # what the others have sent is there
            lens.flush()
        live = numbers(run) if process_group.rank() == 0 else None
    if process_group.count() > 1:
        distributed.barrier()
    return live, threads


def pooled():
    """Each rank has a part of each parameter."""
    net, run = model(), folder("pooled")
    fully_shard(net)
    live, threads = train(net, mine(batches()), run)
    return live, threads, gradlens.open_run(run).ranks()


def replicated():
    """Each rank's own gradients are read too."""
    net, run = DistributedDataParallel(model()), folder("replicated")
    live, threads = train(net, mine(batches()), run, stage=("backward", "reduced", "used"))
    return live, threads, gradlens.open_run(run).noise_scale().rows
