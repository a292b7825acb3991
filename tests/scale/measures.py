"""What a world of ranks costs: each function plays it on fakes and counts."""

import json
import pickle
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from operator import or_
from pathlib import Path
from statistics import median_low
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.testing._internal.distributed.fake_pg import FakeStore as FakeGroupStore

from src.checkpoint.folder import CheckpointFile
from src.checkpoint.host_group import HostGroup, _above, _below, _Outcome
from src.checkpoint.metadata import Wanted, narrowed
from src.checkpoint.state import Snapshot
from src.checkpoint.writer import SavePlans
from src.cluster.diagnosis import hang
from src.data.mapped.piece_table import shard_name
from src.data.shards import TokenShards
from src.distributed.mesh import Mesh
from src.distributed.parallel_dims import ParallelDims
from src.distributed.process import preflight, twins
from src.distributed.process.rank_context import LauncherEnv
from tests.scale.fakes import FakeNetwork, FakeStore, counted_files, descriptors, played_collectives
from tests.scale.token_folder import token_folder
from tests.train.runs import changed, section

PER_NODE = 8
PIECES_PER_RANK = 16
TENSORS = 4  # of a state


def preflight_store(world: int) -> FakeStore:
    """The store after a preflight check of the whole world."""
    store = FakeStore()
    store.content["answer"] = json.dumps({"text": "", "node": None}).encode()
    nodes = [f"node{number:05d}" for number in range(-(-world // PER_NODE))]
    # Whether this machine may open so many files is none of the store's business.
    with played_collectives(world), patch.object(preflight, "prepare_connections"):
        for rank in reversed(range(world)):
            facts = LauncherEnv(rank, world, rank % PER_NODE, PER_NODE)
            with patch.object(preflight, "_store", lambda *_given, rank=rank: store.of(rank)):
                found = preflight.preflight(facts, "cpu", world, nodes, ("", 0), 20.0)
            assert len(found) == (world if rank == 0 else 1), "rank 0 is told of all"
    return store


def preflight_operations(world: int) -> int:
    return max(count for rank, count in preflight_store(world).operations.items() if rank > 0)


def preflight_operations_of_rank_0(world: int) -> int:
    return preflight_store(world).operations[0]


def preflight_bytes_of_rank_0(world: int) -> int:
    return preflight_store(world).bytes[0]


@contextmanager
def fake_world(world: int, rank: int = 0) -> Iterator[Counter[str]]:
    """A rank of a world of torch's fake process groups; counts calls of new_group."""
    calls: Counter[str] = Counter()
    new_group = dist.new_group

    def counted(*given: Any, **named: Any) -> Any:
        calls["new_group"] += 1
        return new_group(*given, **named)

    dist.init_process_group("fake", store=FakeGroupStore(), rank=rank, world_size=world)
    try:
        with patch.object(dist, "new_group", counted), patch("torch.distributed.device_mesh.new_group", counted):
            yield calls
    finally:
        dist.destroy_process_group()


def layout(world: int) -> ParallelDims:
    """Matrices over the GPUs of a node, parameters over all nodes."""
    return changed(section("parallel", "single"), tensor=PER_NODE, shard=world // PER_NODE)


def mesh_groups(world: int) -> int:
    with fake_world(world) as calls:
        Mesh(layout(world), "cpu")
    return calls["new_group"]


def twin_groups(world: int) -> int:
    ranks = range(world)
    parts = [ranks[first : first + PER_NODE] for first in range(0, world, PER_NODE)]
    quick = {name: lambda *_given: 1.0 for name in ("product_seconds", "copy_seconds", "best_seconds")}
    with fake_world(world) as calls, patch.multiple(twins, SUM_BYTES=4, **quick), patch.object(dist, "gather_object"):
        twins.measured(0, "node", "cpu", torch.device("cpu"), parts)
    return calls["new_group"]


@cache
def opened(world: int) -> tuple[int, int]:
    """Calls of the file system by a rank that opens a corpus whose pieces grow with the world, and bytes of its memory
    at most.
    """
    with tempfile.TemporaryDirectory() as place:
        token_folder(Path(place), PIECES_PER_RANK * world, 4)
        with counted_files() as calls:
            found = TokenShards(Path(place))
        assert found.tokens("train") == 4 * PIECES_PER_RANK * world
        with peak_memory() as peak:  # by now what a first use imports is there
            TokenShards(Path(place))
        return sum(calls.values()), peak[0]


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """KiB that Python's objects take at most while the block runs, beside those of before. In steps of 64, since some
    bytes are names of folders. A tensor's numbers are not counted.
    """
    found: list[int] = []
    tracemalloc.start()
    try:
        yield found
        found.append(-(-tracemalloc.get_traced_memory()[1] // 65_536) * 64)
    finally:
        tracemalloc.stop()


def opening_data(world: int) -> int:
    return opened(world)[0]


def opening_data_memory(world: int) -> int:
    return opened(world)[1]


def reading_data(world: int) -> int:
    """Descriptors of a rank that has read from as many shards as there are ranks."""
    with tempfile.TemporaryDirectory() as place:
        token_folder(Path(place), world, 4)
        for number in range(world):
            (Path(place) / shard_name(number, "train")).write_bytes(bytes(8))
        before, opened = descriptors(), TokenShards(Path(place))
        for number in range(world):
            assert len(opened.read("train", 4 * number, 4)) == 4
        return descriptors() - before


def agreement(world: int) -> FakeNetwork:
    """Names and checksums of what each rank has written of a checkpoint, told to rank 0."""
    network = FakeNetwork(world)
    for rank in reversed(range(world)):
        team = HostGroup(network.of(rank))
        files = team.joined(lambda rank=rank: {f"__{rank}_0.distcp": CheckpointFile(1 << 30, "0123abcd")}, or_)
    assert files is not None
    assert len(files) == world
    return network


def agreement_peers(world: int) -> int:
    return max(len(peers) for peers in agreement(world).peers.values())


def agreement_bytes(world: int) -> int:
    """What half of all ranks receive at most."""
    received = agreement(world).received
    return median_low(received[rank] for rank in range(world))


def agreement_bytes_of_rank_0(world: int) -> int:
    return agreement(world).received[0]


def plan_of(rank: int, world: int) -> SavePlan:
    """Some rows of each tensor of a state that is cut over all ranks."""
    shape, whole = torch.Size((2, 8)), torch.Size((2 * world, 8))
    offset = torch.Size((2 * rank, 0))
    data = TensorWriteData(ChunkStorageMetadata(offset, shape), TensorProperties(dtype=torch.float32), whole)
    names = [f"model.layers.{number}.weight" for number in range(TENSORS)]
    return SavePlan([WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=data) for name in names])


@cache
def resumed(world: int) -> tuple[int, int]:
    """Of a state that is cut over all ranks: bytes of DCP's metadata that the first rank of a node tells another, and
    KiB that it takes to make what all of its node are told.
    """
    whole, shape = torch.Size((2 * world, 8)), torch.Size((2, 8))
    chunks = [ChunkStorageMetadata(torch.Size((2 * rank, 0)), shape) for rank in range(world)]
    names = [f"model.layers.{number}.weight" for number in range(TENSORS)]
    places: dict[Any, Any] = {
        MetadataIndex(name, chunk.offsets): _StorageInfo(f"__{rank}_0.distcp", 64 * number, 64)
        for number, name in enumerate(names)
        for rank, chunk in enumerate(chunks)
    }
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), whole, chunks)
    saved = Metadata(dict.fromkeys(names, entry), storage_data=places)
    wants: list[Wanted] = [dict.fromkeys(names, (whole, [chunk])) for chunk in chunks[:PER_NODE]]
    narrowed(saved, wants)  # what a first use imports
    with peak_memory() as peak:
        found = narrowed(saved, wants)
    assert all(len(each.storage_data) == TENSORS for each in found)
    return len(pickle.dumps(found[1])), peak[0]


def resume_metadata(world: int) -> int:
    return resumed(world)[0]


def resume_memory(world: int) -> int:
    return resumed(world)[1]


def below(rank: int, world: int) -> int:
    """Ranks whose words pass through this one, itself included."""
    return 1 + sum(below(each, world) for each in _below(rank, world))


class SavingWorld:
    """All ranks of a run that saves again and again."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.plans: list[SavePlans] = []
        self.network = FakeNetwork(world)
        self.memory: list[int] = []  # KiB of rank 0, by save

    def save(self) -> FakeNetwork:
        """What it took."""
        self.network = FakeNetwork(self.world)
        fresh = not self.plans
        self.plans = self.plans or [SavePlans(HostGroup(self.network.of(rank))) for rank in range(self.world)]
        for rank in reversed(range(1, self.world)):
            self._save(rank, fresh)
        with peak_memory() as peak:
            self._save(0, fresh)
        self.memory += peak
        return self.network

    def _save(self, rank: int, fresh: bool) -> None:
        wire = self.network.of(rank, lambda: _Outcome(None))
        self.plans[rank]._team._wire = wire
        plan = plan_of(rank, self.world)
        if fresh and rank > 0:  # what the one above will pass on, which has not had its turn
            self.network.send(_above(rank), rank, pickle.dumps([plan] * below(rank, self.world)))
        snapshot = Snapshot({}, coordinator=rank == 0, copy=False)
        snapshot._local_plan = plan
        writer = FileSystemWriter(self.folder, sync_files=False)
        agreed = self.plans[rank].agree(snapshot, writer)
        places = [_StorageInfo(f"__{rank}_0.distcp", 64 * number, 64) for number in range(TENSORS)]
        pairs = zip(agreed.items, places, strict=True)
        self.plans[rank].finish([WriteResult(item.index, 64, place) for item, place in pairs], writer)


@cache
def saves(world: int) -> tuple[FakeNetwork, FakeNetwork, list[int]]:
    """The first one, a later one, and the memory that each takes of rank 0."""
    with tempfile.TemporaryDirectory() as place:
        run = SavingWorld(world, Path(place))
        return run.save(), run.save(), run.memory


def first_save_of_rank_0(world: int) -> int:
    return saves(world)[0].received[0]


def first_save_memory(world: int) -> int:
    return saves(world)[2][0]


def later_save(world: int) -> int:
    """Bytes of the rank that receives most."""
    return max(saves(world)[1].received.values())


def later_save_memory(world: int) -> int:
    return saves(world)[2][1]


def hanging(folder: Path, world: int) -> int:
    """Dumps of a world in which rank 3 left its node's collective out; returns how many there are."""
    everybody = str(list(range(world)))
    for rank in range(world):
        first = rank - rank % PER_NODE
        config = {"0": {"ranks": everybody}, "1": {"ranks": str(list(range(first, first + PER_NODE)))}}
        entries = [
            {"process_group": (name, words), "collective_seq_id": number, "profiling_name": "nccl:all_reduce"}
            | {"time_created_ns": number, "is_p2p": False}
            for name, words in (("0", "default_pg"), ("1", "tensor"))
            for number in range(1, 3 if (rank, name) != (3, "1") else 2)
        ]
        (folder / f"rank_{rank}").write_bytes(pickle.dumps({"entries": entries, "pg_config": config}))
    return world


@cache
def diagnosis(world: int) -> tuple[int, int, int]:
    """Dumps that were read, texts of a group's ranks that were parsed, and KiB that it took."""
    read, loads, parsed = hang.DumpFiles.__getitem__, json.loads, Counter[str]()

    def counted_read(files: hang.DumpFiles, rank: int) -> Any:
        parsed["dumps"] += 1
        return read(files, rank)

    def counted_loads(text: str) -> Any:
        parsed["texts"] += 1
        return loads(text)

    with tempfile.TemporaryDirectory() as place:
        hanging(Path(place), world)
        nodes = [f"node{rank // PER_NODE}" for rank in range(world)]
        with peak_memory() as peak:
            hang.find(Path(place), 0.0, nodes)
        with patch.object(hang.DumpFiles, "__getitem__", counted_read), patch.object(json, "loads", counted_loads):
            found = hang.find(Path(place), 0.0, nodes)
    assert found is not None
    assert found.words == "rank 3 (node node0) never entered all_reduce #2 of group tensor"
    return parsed["dumps"], parsed["texts"], peak[0]


def diagnosis_reads(world: int) -> int:
    """Beyond one for each dump."""
    return diagnosis(world)[0] - world


def diagnosis_texts(world: int) -> int:
    return diagnosis(world)[1]


def diagnosis_memory(world: int) -> int:
    return diagnosis(world)[2]
