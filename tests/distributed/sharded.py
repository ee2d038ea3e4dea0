"""What tests of both kinds of FSDP train, and what its tables are held to."""

from contextlib import contextmanager, nullcontext

import numpy as np
import torch

import gradlens
from gradlens import fields
from gradlens.pooling import pool
from tests.distributed.made import Keep, exact_batches, loss, model, snapshots, train, weights

READ = ("reduced", "used")


def exact():
    """In float64, so that the order in which ranks are added up does not show."""
    return model().double()


@contextmanager
def unsynchronised(net):
    """Backwards whose gradients stay on this rank: FSDP2 has a switch for it, FSDP1 a block; in one process they do."""
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(False)
        yield
        net.set_requires_gradient_sync(True)
    else:
        with net.no_sync() if hasattr(net, "no_sync") else nullcontext():
            yield


def accumulate(net, batches, stages, watched):
    """Each step has three micro-batches; the first two are not synchronised."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    keep = Keep()
    lens = gradlens.watch(net, optimizer, stage=stages, writers=[keep], rules=()) if watched else None
    for _ in range(3):
        optimizer.zero_grad()
        for i, x in enumerate(batches):
            with unsynchronised(net) if i < 2 else nullcontext():
                loss(net, x).backward()
        optimizer.step()
    if watched:
        lens.close()
    return keep, weights(net)


def check(ranks, wanted, rtol, stages=READ, columns=fields.SUMMARY, used=fields.SCALARS):
    """The ranks' tables, pooled, are those of one process: all columns, and the places of the most sensitive weights."""
    tables = [{(str(s.stage), s.step): s for s in snapshots(records)} for records in ranks]
    assert set(tables[0]) == {(stage, step) for stage in stages for step in wanted}
    for stage, step in tables[0]:
        pooled, whole = pool([table[stage, step] for table in tables]), wanted[step]
        assert pooled.ranks == len(ranks)
        assert pooled.parameters == whole.parameters
        assert pooled.status.tolist() == whole.status.tolist()
        for field in used if stage == "used" else columns:
            seen, real = pooled.columns[field.name], whole.columns[field.name]
            if field.dtype == "int64":
                np.testing.assert_array_equal(seen, real, err_msg=field.name)
            else:
                np.testing.assert_allclose(seen, real, rtol=rtol, atol=1e-12, err_msg=field.name)
        np.testing.assert_array_equal(pooled.histogram, whole.histogram)
        np.testing.assert_array_equal(pooled.top.index, whole.top.index)
        np.testing.assert_allclose(pooled.top.partial, whole.top.partial, rtol=10 * rtol, atol=1e-9)


def reference(make=exact, x=exact_batches, steps=train):
    """The same training in one process: its `used` tables by step."""
    keep, _ = steps(make(), x(), ("backward", "used"), True)
    return {s.step: s for s in keep.snapshots if s.stage == "used"}
