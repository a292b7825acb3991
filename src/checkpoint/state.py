"""A nested state as two flat maps: tensors, which DCP writes, and small values, which are kept as JSON.

Names join the keys of all levels by dots: {"model": {"norm.weight": t}} has "model.norm.weight". The keys of a dict
belong to the structure; everything that is neither dict nor tensor is a value.
"""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from src.errors import CheckpointError, some

REPLICAS = "replicate"  # the axis of a mesh whose ranks hold the same shards


@dataclass(frozen=True)
class Flat:
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def flatten(state: dict[str, Any]) -> Flat:
    flat = Flat({}, {})
    _visit(state, "", flat)
    return flat


def _visit(node: Any, name: str, flat: Flat) -> None:
    if isinstance(node, dict):
        for key, child in node.items():
            assert isinstance(key, str), f"{name}: the key {key!r} is not a string"
            _visit(child, f"{name}.{key}" if name else key, flat)
        return
    assert name not in flat.tensors, f"{name}: two entries have this name"
    assert name not in flat.values, f"{name}: two entries have this name"
    if isinstance(node, Tensor):
        flat.tensors[name] = node.detach()
    else:
        flat.values[name] = node


def fill(state: dict[str, Any], values: dict[str, Any], name: str = "") -> dict[str, Any]:
    """The same tree with the same tensors, and `values` in the place of its values."""
    tree: dict[str, Any] = {}
    for key, child in state.items():
        path = f"{name}.{key}" if name else key
        if isinstance(child, dict):
            tree[key] = fill(child, values, path)
        else:
            tree[key] = child if isinstance(child, Tensor) else values[path]
    return tree


def to_json(values: dict[str, Any]) -> str:
    """Exact for None, bool, int, str, finite and non-finite float, and lists of them; a tuple comes back as a list."""
    return json.dumps(values, indent=1, sort_keys=True)


def merge(texts: list[str]) -> str:
    """The union of the ranks' values; a value that differs between ranks would not survive another layout."""
    if len(set(texts)) == 1:
        return texts[0]
    merged: dict[str, Any] = {}
    for text in texts:
        for name, value in json.loads(text).items():
            known = merged.setdefault(name, value)
            same = to_json({name: known}) == to_json({name: value})  # text, for which nan equals nan
            assert same, f"{name}: {known!r} on one rank, {value!r} on another"
    return to_json(merged)


class Snapshot(DefaultSavePlanner):
    """The tensors of this rank as they are now, for DCP to write later.

    The plan is made from the live tensors; only their local shards are copied, so that no DTensor ever has to claim to
    live on a device that is not its mesh's.
    """

    def __init__(self, tensors: dict[str, Tensor], *, coordinator: bool, copy: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        mine = _share(tensors)
        self._local_plan = create_default_local_save_plan(mine, coordinator)
        shards = {name: _local(tensor) for name, tensor in mine.items()}
        self._shards = _copy_to_host(shards) if copy else shards
        self.copied = copy

    @property
    def bytes(self) -> int:
        """Bytes of all tensors that this rank writes."""
        return sum(shard.nbytes for shard in self._shards.values())

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        del state_dict, storage_meta  # the tensors and the plan are there already
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        self.plan = self._local_plan
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._shards[index.fqn]


def _share(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this rank writes: ranks that hold the same shards split them by bytes, each computing the same split.

    DCP would drop the copies too, but only after they were staged: 8 replicas on a host would need 8 times its memory.
    A number beside a tensor that is cut, such as its count of steps, is written by the first of the ranks that cut it:
    28 % of what 4,096 ranks would ask for are such numbers.
    """
    share: dict[str, Tensor] = {}
    leads = {  # of entries with a tensor that is cut: whether this rank is the first of those that have it
        _entry(name): not any(coordinate)
        for name, tensor in tensors.items()
        if isinstance(tensor, DTensor) and (coordinate := tensor.device_mesh.get_coordinate()) is not None
    }
    # Bytes by replica. One count for each set of axes: along these, and only these, all ranks see the same sizes.
    loads: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for name, tensor in tensors.items():
        coordinate = tensor.device_mesh.get_coordinate() if isinstance(tensor, DTensor) else None
        if not isinstance(tensor, DTensor) or coordinate is None:
            if tensor.ndim or leads.get(_entry(name), True):
                share[name] = tensor
            continue
        mesh = tensor.device_mesh
        axes = tuple(axis for axis, placement in enumerate(tensor.placements) if placement.is_replicate())
        load = loads.setdefault((mesh, axes), [0] * math.prod(mesh.size(axis) for axis in axes))
        replica = 0
        for axis in axes:
            replica = replica * mesh.size(axis) + coordinate[axis]
        owner = load.index(min(load))
        load[owner] += tensor.to_local().nbytes
        if owner == replica:
            share[name] = tensor
    return share


@dataclass(frozen=True)
class SharedShard:
    """A shard that every replica of a mesh has."""

    shard: Tensor
    mesh: DeviceMesh
    reader: int  # which replica reads it, by its coordinate on the axis REPLICAS

    @property
    def read_here(self) -> bool:
        return self.mesh.get_local_rank(REPLICAS) == self.reader

    def tell(self) -> None:
        """Collective: what the reader has, in the others' place of it."""
        whole = self.shard.contiguous()  # the same storage, as a rule
        # Bytes: neither NCCL nor gloo carries every dtype of a state.
        dist.broadcast(whole.view(-1).view(torch.uint8), group=self.mesh.get_group(REPLICAS), group_src=self.reader)
        if whole.data_ptr() != self.shard.data_ptr():
            self.shard.copy_(whole)


def shared_shards(tensors: dict[str, Tensor]) -> dict[str, SharedShard]:
    """By name, the tensors that are cut alike in every replica, and that these can tell each other where they lie.

    Split by bytes among the replicas, each rank computing the same split.
    """
    found: dict[str, SharedShard] = {}
    loads: dict[DeviceMesh, list[int]] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor) or not _has_replicas(tensor):
            continue
        mesh, shard = tensor.device_mesh, tensor.to_local()
        if shard.numel() > 0 and shard.device.type == mesh.device_type:  # in all replicas alike
            load = loads.setdefault(mesh, [0] * mesh.get_group(REPLICAS).size())
            found[name] = SharedShard(shard, mesh, load.index(min(load)))
            load[found[name].reader] += shard.nbytes
    return found


def _has_replicas(tensor: DTensor) -> bool:
    mesh, names = tensor.device_mesh, tensor.device_mesh.mesh_dim_names or ()
    if mesh.get_coordinate() is None or REPLICAS not in names:
        return False
    axis = names.index(REPLICAS)
    return mesh.size(axis) > 1 and tensor.placements[axis].is_replicate()


def _entry(name: str) -> str:
    """What it is of: "optimizer.norm.weight" of "optimizer.norm.weight.step"."""
    return name.rpartition(".")[0]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copy_to_host(shards: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that later updates in place cannot reach; pinned, for the full speed of a GPU's bus."""
    copies: dict[str, Tensor] = {}
    devices: set[torch.device] = set()
    for name, shard in shards.items():
        copies[name] = torch.empty(shard.shape, dtype=shard.dtype, device="cpu", pin_memory=shard.is_cuda)
        copies[name].copy_(shard, non_blocking=shard.is_cuda)
        if shard.is_cuda:
            devices.add(shard.device)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return copies


def difference(flat: Flat, saved: Metadata, values: dict[str, Any], *, rounds: bool = False) -> "Fitting":
    """What is missing in the checkpoint, unexpected in it, or of another shape or dtype, for what this rank has.

    Sections (first words of names) that `flat` does not have at all were not asked for. `rounds`: another floating
    dtype is no difference.
    """
    entries = {n: e for n, e in saved.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}
    there = {**dict.fromkeys(entries, "tensor"), **dict.fromkeys(values, "value")}
    here = {**dict.fromkeys(flat.tensors, "tensor"), **dict.fromkeys(flat.values, "value")}
    sections = {_section(name) for name in here}
    missing = {name for name, kind in here.items() if there.get(name) != kind}
    unexpected = {name for name, kind in there.items() if here.get(name) != kind and _section(name) in sections}
    misfits = []
    for name, tensor in flat.tensors.items():
        if name in missing:
            continue
        shape, dtype = entries[name].size, entries[name].properties.dtype
        if rounds and tensor.is_floating_point() and dtype.is_floating_point:
            dtype = tensor.dtype
        expected, found = _describe(tensor.shape, tensor.dtype), _describe(shape, dtype)
        if expected != found:
            misfits.append(f"{name}: expected {expected}, found {found}")
    return Fitting(frozenset(missing), frozenset(unexpected), tuple(misfits))


def unlike(tensors: dict[str, Tensor], saved: Metadata) -> set[str]:
    """Names that the checkpoint has no tensor of, or one of another shape."""
    entries = {n: e.size for n, e in saved.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}
    return {name for name, tensor in tensors.items() if entries.get(name) != tensor.shape}


def _section(name: str) -> str:
    return name.split(".", 1)[0]


def _describe(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


@dataclass(frozen=True)
class Fitting:
    """Of some ranks: what the checkpoint lacks, what it has that none of them has a place for, what is otherwise."""

    missing: frozenset[str]
    unexpected: frozenset[str]
    misfits: tuple[str, ...]

    def joined(self, other: "Fitting") -> "Fitting":
        """Ranks of a pipeline have different names: unexpected is what no rank has a place for."""
        misfits = tuple(dict.fromkeys((*self.misfits, *other.misfits)))
        return Fitting(self.missing | other.missing, self.unexpected & other.unexpected, misfits)

    def check(self, path: Path) -> None:
        """CheckpointError where something does not fit."""
        problems = []
        if self.missing:
            problems.append(f"{path}: {_count(self.missing)} missing in it: {some(self.missing, most=8)}")
        if self.unexpected:
            names = some(self.unexpected, most=8)
            problems.append(f"{path}: {_count(self.unexpected)} in it that this run has no place for: {names}")
        problems += [f"{path}: {misfit}" for misfit in self.misfits]
        if problems:
            raise CheckpointError(problems)


def refuse_unlike(path: Path, names: Collection[str]) -> None:
    """CheckpointError for tensors that have to be there in their shape, and are not."""
    if names:
        raise CheckpointError(f"{path}: {_count(names)} not in it in this shape: {some(names, most=8)}")


def _count(names: Collection[str]) -> str:
    return f"{len(names)} {'entry' if len(names) == 1 else 'entries'}"
