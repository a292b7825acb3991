"""Of the metadata of a checkpoint one rank of a node reads all, and each rank hears what is about its own shards."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from src.checkpoint import metadata
from src.checkpoint.metadata import narrowed, wants_of
from src.checkpoint.state import flatten
from src.checkpoint.store import Store
from src.errors import CheckpointError
from tests.checkpoint.options import options
from tests.checkpoint.states import blank, equals, two_saves
from tests.ranks import RankPool


def on_nodes(rank: int, per_node: int, *, cyclic: bool = False) -> dict[str, str]:
    """`cyclic`: neighbours are on different nodes, of which there are as many as ranks on one."""
    return {"LOCAL_RANK": str(rank // per_node if cyclic else rank % per_node), "LOCAL_WORLD_SIZE": str(per_node)}


def loading(folder: Path, per_node: int, trusted: bool, cyclic: bool = False) -> tuple[int, bool, int]:
    """How often this rank has read metadata, whether all was loaded, and of how many places it was told."""
    rank, reads, told = int(os.environ["RANK"]), list[Any](), list[Metadata]()
    kind = metadata.PatientReader if trusted else metadata.RestrictedReader
    whole = kind._read_metadata

    def counted(reader: Any, *given: Any, **named: Any) -> Metadata:
        reads.append(reader)
        return whole(reader, *given, **named)

    class Watched(Store):
        def _reader(self, path: Path, tensors: dict[str, torch.Tensor]) -> Any:
            reader = super()._reader(path, tensors)
            told.append(reader.read_metadata())
            return reader

    with patch.dict(os.environ, on_nodes(rank, per_node, cyclic=cyclic)), patch.object(kind, "_read_metadata", counted):
        store = Watched(folder, options(trusted=trusted))
        tree = store.load(folder / "step_00000010", blank())
    return len(reads), equals(tree, 1), len(told[0].storage_data)


@pytest.mark.parametrize(("world", "per_node", "trusted"), [(4, 2, False), (3, 2, False), (4, 4, True), (2, 1, False)])
def test_one_rank_of_a_node_reads_the_metadata(
    ranks: RankPool, tmp_path: Path, world: int, per_node: int, trusted: bool
) -> None:
    """Also those that another number of ranks has written."""
    ranks(4, two_saves, tmp_path)
    found = ranks(world, loading, tmp_path, per_node, trusted)
    assert [reads for reads, _, _ in found] == [int(rank % per_node == 0) for rank in range(world)]
    assert all(equal for _, equal, _ in found)
    if world == 4:  # of 4 cut tensors its own part, and the 2 that are whole
        assert [places for _, _, places in found] == [6] * 4


def test_ranks_that_are_not_numbered_node_by_node_read_each_for_itself(ranks: RankPool, tmp_path: Path) -> None:
    """SLURM's --distribution=cyclic: rank 1 leads its node, where rank 0 would wait for it as one of its own."""
    ranks(4, two_saves, tmp_path)
    found = ranks(4, loading, tmp_path, 2, False, True)
    assert [(reads, equal) for reads, equal, _ in found] == [(1, True)] * 4


def refused(folder: Path) -> list[str]:
    rank = int(os.environ["RANK"])
    with patch.dict(os.environ, on_nodes(rank, 2)):
        store = Store(folder, options(verify="size"))
        try:
            store.load(folder / "step_00000010", blank())
        except CheckpointError as error:
            return list(error.problems)
    return []


def test_what_one_rank_cannot_read_all_ranks_refuse(ranks: RankPool, tmp_path: Path) -> None:
    ranks(2, two_saves, tmp_path)
    file = tmp_path / "step_00000010/.metadata"
    file.write_bytes(b"\x80" * len(file.read_bytes()))
    found = ranks(4, refused, tmp_path)
    assert all(words == found[0] and "corrupted" in words[0] for words in found)


def narrowing(folder: Path) -> dict[str, Any]:
    saved = metadata.read(folder / "step_00000010/.metadata")
    wants = wants_of(flatten(blank()).tensors)
    (one,) = narrowed(saved, [wants])
    other = {"model.a.weight": (torch.Size([9, 6]), wants["model.a.weight"][1])}
    (misfit,) = narrowed(saved, [other])
    return {
        "names": one.state_dict_metadata.keys() == saved.state_dict_metadata.keys(),
        "sizes": all(one.state_dict_metadata[name].size == saved.state_dict_metadata[name].size for name in wants),
        "subset": one.storage_data.items() <= saved.storage_data.items(),
        "misfit": len(misfit.storage_data),
    }


def test_a_rank_hears_of_every_shape_and_of_its_own_places(ranks: RankPool, tmp_path: Path) -> None:
    ranks(2, two_saves, tmp_path)
    expected = {"names": True, "sizes": True, "subset": True, "misfit": 0}
    assert ranks(2, narrowing, tmp_path) == [expected] * 2
