"""Tables of several ranks as one: pieces merge, copies stand for each other."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gradlens import fields, kernels
from gradlens.errors import ArgumentError
from gradlens.pooling import pool
from gradlens.records import PARTIAL, Parameters, Status
from gradlens.statistics.table import Piece, Table
from gradlens.statistics.transfer import Transfer


def held(tensor, piece):
    """What a rank holds of the tensor."""
    if piece in ("", PARTIAL):
        return tensor
    if piece.startswith("@"):
        tensor, piece = tensor.reshape(-1), piece[1:]
    return tensor[tuple(slice(*map(int, part.split(":"))) for part in piece.split(","))]


def snapshot(tensors, pieces=(), rank=0, notes=(), step=0):
    """The table of a rank that holds the given pieces of named tensors."""
    pieces = tuple(pieces) or ("",) * len(tensors)
    parameters = Parameters(
        tuple(tensors),
        tuple(tuple(t.shape) for t in tensors.values()),
        tuple(str(t.dtype).removeprefix("torch.") for t in tensors.values()),
        pieces,
    )
    table = Table(step, 0, "reduced", parameters, time=0.0, notes=list(notes), rank=rank)
    here = [held(tensor, piece) for tensor, piece in zip(tensors.values(), pieces, strict=True)]
    rows = [i for i in range(len(here)) if not notes or notes[i] is None]
    table.pieces = [Piece(rows, kernels.summarize([here[i] for i in rows], [2 * here[i] for i in rows]))] if rows else []
    return table.unpack(Transfer(table.pack()).wait(), {"loss": 1.5})


def gradients():
    torch.manual_seed(0)
    tensors = {"w": torch.randn(7, 6), "b": torch.randn(5), "z": torch.randn(4, 3, dtype=torch.complex64)}
    tensors["w"][0, :3] = torch.tensor([0.0, torch.nan, torch.inf])
    return tensors


def same(pooled, whole):
    assert pooled.names == whole.names
    assert pooled.parameters.shapes == whole.parameters.shapes
    for field in fields.SCALARS:
        compare = np.testing.assert_array_equal if field.dtype == "int64" else np.testing.assert_allclose
        compare(pooled.columns[field.name], whole.columns[field.name], err_msg=field.name)
    for name in fields.QUANTILES:
        np.testing.assert_allclose(pooled.column(name), whole.column(name), err_msg=name)
    np.testing.assert_array_equal(pooled.histogram, whole.histogram)
    np.testing.assert_array_equal(pooled.top.index, whole.top.index)
    np.testing.assert_array_equal(pooled.top.partial, whole.top.partial)
    np.testing.assert_array_equal(pooled.top.value, whole.top.value)
    assert pooled.status.tolist() == whole.status.tolist()


@pytest.mark.parametrize(
    "shards",
    [
        [("0:4,0:6", "0:3", "0:2,0:3"), ("4:7,0:6", "3:5", "2:4,0:3")],
        [("0:7,0:1", "0:5", "0:4,0:2"), ("0:7,1:6", "5:5", "0:4,2:3")],  # columns, and a rank with nothing
        [("0:4,0:3", "0:2", "0:1,0:3"), ("0:4,3:6", "2:3", "1:2,0:3"), ("4:7,0:3", "3:4", "2:4,0:1"),
         ("4:7,3:6", "4:5", "2:4,1:3")],
        [("@0:19", "@0:0", "@0:5"), ("@19:42", "", "@5:12")],  # of what was flattened
    ],
)  # fmt: skip
def test_pieces_pool_to_the_table_of_the_whole(shards):
    """Rows of disjoint pieces give the row of the whole tensor, the top weights with their places in it."""
    tensors = gradients()
    tables = [snapshot(tensors, pieces, rank) for rank, pieces in enumerate(shards)]
    pooled = pool(tables[::-1])
    same(pooled, snapshot(tensors))
    assert (pooled.rank, pooled.ranks, pooled.loss) == (0, len(shards), 1.5)


def test_copies_count_once():
    """Ranks that hold all of a tensor, or the same piece of it, have one row between them."""
    tensors = gradients()
    pieces = [("0:4,0:6", "", ""), ("4:7,0:6", "", "")]
    tables = [snapshot(tensors, pieces[rank % 2], rank) for rank in range(4)]
    pooled = pool(tables)
    same(pooled, snapshot(tensors))
    assert pooled.ranks == 4


def test_summands_are_not_pooled():
    """Of a tensor that is a sum over ranks, the row of the lowest rank stays as it is, and stays marked."""
    tensors = {"w": torch.ones(3)}
    other = {"w": torch.full((3,), 5.0)}
    pooled = pool([snapshot(other, (PARTIAL,), 1), snapshot(tensors, (PARTIAL,), 0)])
    assert pooled.value("sum", "w") == 3
    assert pooled.parameters.pieces == (PARTIAL,)


def test_scattered_pieces_are_not_pooled():
    """They may be copies or not: the lowest rank's row stays, as what it is."""
    first = replace(snapshot({"w": torch.ones(2)}), parameters=Parameters(("w",), ((4,),), ("float32",), ("~2",)))
    second = replace(snapshot({"w": torch.full((2,), 5.0)}, rank=1), parameters=first.parameters)
    pooled = pool([second, first])
    assert pooled.value("sum", "w") == 2
    assert pooled.parameters.pieces == ("~2",)


def test_a_parameter_of_one_rank_has_its_row():
    """Ranks may watch different parameters, as under pipeline parallelism."""
    first, second = {"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.full((3,), 2.0)}
    pooled = pool([snapshot(first), snapshot(second, rank=1)])
    assert pooled.names == ("a", "b")
    assert pooled.column("sum").tolist() == [2, 6]


def test_an_empty_piece_has_no_say_in_the_status():
    """The parameter is what the ranks with entries say, and the worst of them counts."""
    tensors = {"w": torch.ones(3), "v": torch.tensor([1.0, torch.nan])}
    pooled = pool([snapshot(tensors, ("0:3", "0:1")), snapshot(tensors, ("3:3", "1:2"), 1)])
    assert pooled.status.tolist() == [Status.OK, Status.NONFINITE]
    for word in ("absent", "undefined"):
        parts = [snapshot(tensors, ("0:3", ""), 0, notes=[word] * 2), snapshot(tensors, ("3:3", ""), 1)]
        assert pool(parts).status.tolist() == [word, word]
        assert pool(parts).value("zero", "w") == 3
    nobody = [snapshot(tensors, ("3:3", "2:2"), rank, notes=["absent"] * 2) for rank in (0, 1)]
    assert pool(nobody).status.tolist() == ["absent", "absent"]


def test_tables_of_different_moments_are_refused():
    """Pooling is over space; succession over time is another verb."""
    tensors = gradients()
    with pytest.raises(ArgumentError, match="one step, backward and stage"):
        pool([snapshot(tensors), snapshot(tensors, step=1)])
    with pytest.raises(ArgumentError, match="one step"):
        pool([])


def test_the_first_of_one_is_itself():
    """One table is its own pool."""
    only = snapshot(gradients())
    assert pool([only]) is only
