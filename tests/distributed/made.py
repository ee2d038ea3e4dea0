"""What the ranks train, and how rows are compared."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed import distributed_c10d

import gradlens
from gradlens import fields, kernels


class Keep:
    """A writer that keeps what it gets."""

    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def flush(self):
        pass

    close = flush

    @property
    def snapshots(self):
        return [record for record in self.records if isinstance(record, gradlens.Snapshot)]

    @property
    def findings(self):
        return [record for record in self.records if isinstance(record, gradlens.Finding)]

    def at(self, stage):
        """The snapshots of a stage, by step and backward."""
        return {(s.step, s.backward): s for s in self.snapshots if s.stage == stage}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batches():
    torch.manual_seed(1)
    return torch.randn(3, 8, 6)


def mine(data):
    """This rank's share of each batch."""
    return data.chunk(distributed.get_world_size(), dim=1)[distributed.get_rank()]


def loss(net, x):
    return net(x).square().mean()


def local(tensor):
    """What this rank holds of a tensor."""
    return getattr(tensor, "_local_tensor", tensor).detach()


def weights(net):
    """This rank's weights, as arrays."""
    return [local(p).numpy().copy() for p in net.parameters()]


def train(net, data, stage, watched=True, **arguments):
    """Three steps; the records, and the final local weights."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    keep = Keep()
    lens = gradlens.watch(net, optimizer, stage=stage, writers=[keep], rules=(), **arguments) if watched else None
    for x in data:
        optimizer.zero_grad()
        loss(net, x).backward()
        optimizer.step()
    if lens is not None:
        lens.close()
    return keep, weights(net)


def folder(name):
    """A directory that all ranks see."""
    return Path(os.environ["GRADLENS_TEST_FOLDER"]) / name


def collectives(wrap, stage, data):
    """How many the process groups count over the steps, watched with all we have and not: of few parameters, and of many."""
    result = []
    for layers in (1, 50):
        counts = []
        for watched in (True, False):
            torch.manual_seed(0)
            net = wrap(nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers))))
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            first = _counted()
            lens = gradlens.watch(net, optimizer, stage=stage, run=folder(f"layers{layers}")) if watched else None
            for x in data:
                optimizer.zero_grad()
                loss(net, x).backward()
                if watched:
                    lens.weights(top=3)
                optimizer.step()
                if watched:
                    lens.table(), lens.report()
            if watched:
                lens.close()
            counts.append(_counted() - first)
        result.append(counts)
    return result


def _counted():
    return sum(group._get_sequence_number_for_group() for group in distributed_c10d._world.pg_map)


def bits_equal(a, b):
    assert len(a) == len(b)
    assert all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def numbers(snapshot):
    """Counts, moments, histogram and top partials of each row."""
    columns = [snapshot.columns[field.name] for field in fields.COUNTS + fields.MOMENTS]
    return {
        name: np.concatenate([[c[i] for c in columns], snapshot.histogram[i], snapshot.top.partial[i]])
        for i, name in enumerate(snapshot.names)
    }


def expected(tensors):
    """The same, of tensors by name."""
    parts = [slice(len(fields.COUNTS + fields.MOMENTS)), fields.HISTOGRAM, fields.TOP_PARTIAL]
    rows = kernels.summarize([local(t) for t in tensors.values()]).numpy()
    return {name: np.concatenate([row[part] for part in parts]) for name, row in zip(tensors, rows, strict=True)}


def same(seen, wanted, **tolerance):
    """Rows by name are equal, exactly unless a tolerance is given."""
    assert set(seen) == set(wanted)
    for name in wanted:
        if tolerance:
            np.testing.assert_allclose(seen[name], wanted[name], err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(seen[name], wanted[name], err_msg=name)


def gradients(net, x, k=1.0):
    """The partials of one backward at the weights as they are, by name, of this rank alone; no hook sees it."""
    params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    out = torch.func.functional_call(net, params, (x,)).square().mean() * k
    given = torch.autograd.grad(out, list(params.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), given, strict=True)}


def averaged(tensors):
    """Their mean over the ranks."""
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor.clone()
        distributed.all_reduce(result[name])
        result[name] /= distributed.get_world_size()
    return result


def records(ranks, name):
    """The records of a scenario by rank; with us training was the same as without."""
    for result in ranks:
        bits_equal(result[name][1], result[name][2])
    return [result[name][0] for result in ranks]


def exact_batches():
    """The batches in float64."""
    return batches().double()


def snapshots(records):
    """Those that are tables."""
    return [record for record in records if isinstance(record, gradlens.Snapshot)]
