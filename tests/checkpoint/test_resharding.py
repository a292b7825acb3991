"""One state, any mesh: what one layout writes, every other reads bit for bit."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.futures import Future

from src.checkpoint.metadata import PatientReader
from src.checkpoint.state import Snapshot
from src.checkpoint.store import Store
from tests.checkpoint.options import options
from tests.ranks import RankPool

# (replicate, shard, tensor) by name; their product is the world.
LAYOUTS = {
    "single": (1, 1, 1),
    "tensor 2": (1, 1, 2),
    "shard 4": (1, 4, 1),
    "shard 2, tensor 2": (1, 2, 2),
    "replicate 2, shard 2": (2, 2, 1),
    "replicate 3": (3, 1, 1),
}


class Block(nn.Module):
    """Sizes that no degree divides (10, 7, 3) beside some that all do."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 10)
        self.down = nn.Linear(10, 12, bias=False)
        self.norm = nn.LayerNorm(7)
        self.tiny = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(5, dtype=torch.int64))


def build(layout: str) -> Block:
    replicate, shard, tensor = LAYOUTS[layout]
    model = Block()
    mesh = init_device_mesh("cpu", (replicate, shard, tensor), mesh_dim_names=("replicate", "shard", "tensor"))
    if tensor > 1:
        parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if replicate > 1:
        fully_shard(model, mesh=mesh["replicate", "shard"])
    elif shard > 1:
        fully_shard(model, mesh=mesh["shard"])
    return model


def expected(seed: int) -> dict[str, Tensor]:
    """The whole tensors, made without any mesh, by the names of the state."""
    generator = torch.Generator().manual_seed(seed)
    full: dict[str, Tensor] = {}
    for name, parameter in Block().named_parameters():
        full[f"model.{name}"] = torch.randn(parameter.shape, generator=generator)
        full[f"optimizer.{name}.exp_avg"] = torch.randn(parameter.shape, generator=generator).bfloat16()
        full[f"optimizer.{name}.exp_avg_sq"] = torch.rand(parameter.shape, generator=generator)
        full[f"optimizer.{name}.step"] = torch.tensor(float(seed))
    full["model.seen"] = torch.randint(-(2**62), 2**62, (5,), generator=generator)
    return full


def state(model: Block) -> dict[str, Any]:
    optimizer = {
        name: {
            "exp_avg": torch.zeros_like(parameter, dtype=torch.bfloat16),
            "exp_avg_sq": torch.zeros_like(parameter),
            "step": torch.zeros(()),
        }
        for name, parameter in model.named_parameters()
    }
    return {"model": model.state_dict(), "optimizer": optimizer, "step": 0}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def named(tree: dict[str, Any]) -> dict[str, Tensor]:
    found = {f"model.{name}": tensor for name, tensor in tree["model"].items()}
    for name, moments in tree["optimizer"].items():
        found |= {f"optimizer.{name}.{key}": tensor for key, tensor in moments.items()}
    return found


def put(whole: Tensor, target: Tensor) -> None:
    """Copy this rank's part of `whole`, cut by DTensor's own arithmetic: first for tensor, then for shard."""
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    mesh: DeviceMesh = target.device_mesh
    part = whole
    order = sorted(range(mesh.ndim), key=lambda axis: (mesh.mesh_dim_names or ())[axis] != "tensor")
    for axis in order:
        placement = target.placements[axis]
        if placement.is_replicate():
            continue
        parts = part.chunk(mesh.size(axis), placement.dim)  # type: ignore[attr-defined]
        rank = mesh.get_local_rank(axis)
        part = parts[rank] if rank < len(parts) else part.narrow(placement.dim, 0, 0)  # type: ignore[attr-defined]
    target.to_local().copy_(part)


def write(folder: Path, layout: str, seed: int) -> list[str]:
    tree = state(build(layout))
    with torch.no_grad():
        for name, target in named(tree).items():
            put(expected(seed)[name], target.detach())
    store = Store(folder, options())
    store.save(seed, {**tree, "step": seed}, {})
    store.finish()
    return sorted({str(tensor.placements) for tensor in tree["model"].values() if isinstance(tensor, DTensor)})


def read(folder: Path, layout: str, seed: int) -> list[str]:
    """Names of what is not bit for bit as expected; empty is right."""
    model = build(layout)
    store = Store(folder, options())
    path = store.newest()
    assert path is not None
    tree = store.load(path, state(model))
    wrong = []
    for name, tensor in named(tree).items():
        right = tensor.detach().clone().fill_(77)
        put(expected(seed)[name], right)
        if not torch.equal(local(tensor), local(right)) or tensor.dtype != expected(seed)[name].dtype:
            wrong.append(name)
    for name, parameter in model.named_parameters():  # in place: the model itself has the numbers now
        if not torch.equal(local(parameter), local(tree["model"][name])):
            wrong.append(f"{name} in the model")
    assert tree["step"] == seed
    return wrong


def world(layout: str) -> int:
    replicate, shard, tensor = LAYOUTS[layout]
    return replicate * shard * tensor


@pytest.mark.slow
@pytest.mark.parametrize("source", list(LAYOUTS))
def test_every_layout_reads_what_any_layout_wrote(ranks: RankPool, tmp_path: Path, source: str) -> None:
    placements = ranks(world(source), write, tmp_path, source, 3)[0]
    assert any("_StridedShard" in text for text in placements) == (source == "shard 2, tensor 2")
    for target in LAYOUTS:
        assert ranks(world(target), read, tmp_path, target, 3) == [[]] * world(target), (source, target)


def staged_bytes(layout: str) -> tuple[int, int]:
    """(what this rank copies before a save, the bytes of the whole state's sharded or replicated parameters)."""
    parameters = {name: parameter.detach() for name, parameter in build(layout).named_parameters()}
    snapshot = Snapshot(parameters, coordinator=False, copy=True)
    copied = [snapshot.lookup_object(item.index) for item in snapshot.create_local_plan().items]
    return sum(tensor.nbytes for tensor in copied), sum(parameter.nbytes for parameter in Block().parameters())


@pytest.mark.parametrize("layout", ["shard 4", "replicate 2, shard 2", "replicate 3"])
def test_replicas_share_the_copying(ranks: RankPool, layout: str) -> None:
    results = ranks(world(layout), staged_bytes, layout)
    whole = results[0][1]
    assert sum(copied for copied, _ in results) == whole
    assert max(copied for copied, _ in results) < 0.6 * whole


def read_bytes(path: Path, layout: str, seed: int) -> tuple[int, list[str]]:
    """(bytes of tensors that this rank asks its reader for, what is wrong afterwards)."""
    asked: list[int] = []
    whole = PatientReader.read_data

    def counted(self: PatientReader, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        asked.extend(planner.resolve_tensor(item).nbytes for item in plan.items)
        return whole(self, plan, planner)

    with patch.object(PatientReader, "read_data", counted):
        wrong = read(path, layout, seed)
    return sum(asked), wrong


@pytest.mark.parametrize("layout", ["replicate 2, shard 2", "replicate 3"])
def test_replicas_share_the_reading(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    """Each byte is read from the disk once, and told to the other replicas."""
    ranks(1, write, tmp_path, "single", 3)
    ((whole, _),) = ranks(1, read_bytes, tmp_path, "single", 3)
    told = ranks(world(layout), read_bytes, tmp_path, layout, 3)
    assert [wrong for _, wrong in told] == [[]] * world(layout)
    assert max(read for read, _ in told) < 0.6 * whole
    assert sum(read for read, _ in told) < 1.2 * whole, "small numbers beside them are read by all"
