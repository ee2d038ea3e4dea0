"""The process group, as far as gradlens asks it."""

import pytest
import torch.distributed as distributed

from gradlens.watching import process_group


@pytest.fixture
def group():
    """`group(store)`: a group of this one process."""

    def make(store):
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    yield make
    distributed.destroy_process_group()


def test_without_a_group_there_is_one_process():
    """Nothing has to be initialised."""
    assert (process_group.count(), process_group.rank()) == (1, 0)


def test_each_call_gets_a_part_of_the_store_of_its_own(group):
    """What one run leaves in the store is not another's, and both are apart from the group's own keys."""
    server = distributed.TCPStore("localhost", 0, 1, True, wait_for_workers=False)
    group(server)
    first, second, other = process_group.store("run")(), process_group.store("run")(), process_group.store("another")()
    first.set("a", "1")
    assert first.get("a") == b"1"
    assert not second.check(["a"])
    assert not other.check(["a"])
    assert not server.check(["a"])


def test_a_group_that_met_in_a_file_has_no_store_for_us(group, tmp_path):
    """It would keep every value ever set; the dashboard is of one rank then."""
    group(distributed.FileStore(str(tmp_path / "meet"), 1))
    assert process_group.store("run") is None
