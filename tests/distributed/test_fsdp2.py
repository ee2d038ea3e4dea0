"""FSDP2 (`fully_shard`): each rank reads the shard that it holds of the averaged gradient."""

import numpy as np
import pytest
from torch.distributed.fsdp import fully_shard

from gradlens import fields
from gradlens.pooling import pool
from tests.distributed.made import batches, bits_equal, mine, model, train

pytestmark = pytest.mark.distributed


def sharded():
    """Watched and not; of four ranks the last has no entry of the last bias."""
    result = {}
    for watched in (True, False):
        net = model()
        fully_shard(net[0])
        fully_shard(net)
        keep, after = train(net, mine(batches()), ("reduced", "used"), watched)
        result[watched] = (keep.records, after)
    return result


def group():
    """All scenarios."""
    return {call.__name__: call() for call in (sharded,)}


def same(pooled, whole, rtol):
    assert pooled.names == whole.names
    assert pooled.parameters.shapes == whole.parameters.shapes
    for field in fields.COUNTS:
        np.testing.assert_array_equal(pooled.columns[field.name], whole.columns[field.name], err_msg=field.name)
    for name in ("square_sum", "abs_sum", "abs_max"):
        np.testing.assert_allclose(pooled.columns[name], whole.columns[name], rtol=rtol, err_msg=name)
    np.testing.assert_array_equal(pooled.top.index[:, :3], whole.top.index[:, :3])


@pytest.mark.trap(20)
@pytest.mark.parametrize("count", [2, 4])
def test_shards_pool_to_the_table_of_one_process(launched, count):
    """Shards' tables pool to the table of the whole, top weights by their global index; training is unchanged."""
    ranks = launched(group, count)
    whole, _ = train(model(), batches(), ("backward", "used"))
    records = []
    for result in ranks:
        seen, after = result["sharded"][True]
        bits_equal(after, result["sharded"][False][1])
        records.append({(s.stage, s.step): s for s in seen})
    assert sorted(records[0]) == sorted((stage, step) for stage in ("reduced", "used") for step in range(3))
    for stage, step in records[0]:
        pooled = pool([record[stage, step] for record in records])
        assert pooled.ranks == count
        same(pooled, whole.at("used")[step, 0], rtol=2e-5)
