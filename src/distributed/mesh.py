"""Device meshes of a layout and the data-parallel rank of each process.

Axes: pipeline, replicate, shard (FSDP), context, tensor; routed experts have a mesh of their own. Which ranks share
parameters, a sequence or samples is decided here and nowhere else.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from src.distributed.collectives import mesh_sum
from src.distributed.parallel_dims import ParallelDims
from src.distributed.process.subgroup import subgroup


class Mesh:
    """The ranks as a grid, outermost axis first: pipeline, replicate, shard, context, tensor.

    Neighbours on the innermost axis sit in one machine, so the chattiest axis is `tensor`. Axes of size 1 are kept:
    FSDP over one rank still gives mixed precision, and no caller asks whether an axis exists.
    """

    def __init__(self, degrees: ParallelDims, device_type: str, copies: int = 1) -> None:
        """Collective. `copies`: of the whole grid, unconnected; ranks outside this one's copy are not met."""
        assert dist.get_world_size() == degrees.world * copies, f"{dist.get_world_size()} ranks for {degrees.world}"
        self.degrees = degrees
        self.world = degrees.world
        axes = degrees.axes if copies == 1 else {"copy": copies} | degrees.axes
        self.whole = grid(device_type, axes)
        self.weights = self.whole
        if degrees.context > 1:
            # Ranks that share a sequence share the parameters too. A grid of its own: FSDP wants its axis and `tensor`
            # of one grid, and torch has no public way to join two axes of a grid.
            joined = {axis: size for axis, size in axes.items() if axis != "context"} | {"shard": degrees.fsdp}
            self.weights = grid(device_type, joined)
        self._spread: DeviceMesh | None = None
        self._stage: DeviceMesh | None = None

    def spread_experts(self) -> None:
        """Collective. Make the grid of routed experts, where they lie otherwise than all other weights.

        The same ranks in the same order. Those of `expert` are neighbours, and so are those of `expert_tensor`, who
        are the ranks of `tensor` where there are several.
        """
        if not self.degrees.experts_apart or self._spread is not None:
            return
        names = [name for name in self.whole.mesh_dim_names or () if name not in ("shard", "context", "tensor")]
        axes = {name: self.whole[name].size() for name in names}
        axes |= {name: getattr(self.degrees, name) for name in ("expert_shard", "expert", "expert_tensor")}
        self._spread = grid(self.whole.device_type, axes)

    @property
    def tensor(self) -> DeviceMesh | None:
        """The ranks that share every matrix; None when matrices are whole."""
        return self.weights["tensor"] if self.degrees.tensor > 1 else None

    @property
    def context(self) -> DeviceMesh | None:
        """The ranks that share every sequence; None when sequences are whole."""
        return self.whole["context"] if self.degrees.context > 1 else None

    @property
    def fsdp(self) -> DeviceMesh:
        """The mesh over which FSDP cuts parameters: 1-D (shard with context), or 2-D (replicate, shard) with HSDP."""
        return self.weights["replicate", "shard"] if self.degrees.replicate > 1 else self.weights["shard"]

    @property
    def experts_fsdp(self) -> DeviceMesh | None:
        """The mesh over which FSDP cuts routed experts; None: the same as for all other parameters."""
        grid = self._spread
        if grid is None:
            return None
        return grid["replicate", "expert_shard"] if self.degrees.replicate > 1 else grid["expert_shard"]

    @property
    def experts(self) -> DeviceMesh | None:
        """The ranks that divide the routed experts (axis `expert`), the matrices of each (`expert_tensor`), or both.

        None when every rank has all of all experts.
        """
        if self._spread is None:
            return self.tensor
        axes = tuple(axis for axis in ("expert", "expert_tensor") if getattr(self.degrees, axis) > 1)
        return self._spread[axes] if axes else None

    def sum_over_tokens(self, counts: Tensor) -> Tensor:
        """All-reduce token counts of routers, in place, over the ranks whose routers saw different tokens.
        Collective.
        """
        meshes = [self.fsdp] if not self.degrees.divides_tokens else [self.fsdp, self.weights["tensor"]]
        for mesh in meshes:
            mesh_sum(counts, mesh)
        return counts

    def stage_group(self) -> dist.ProcessGroup:
        """Collective. All ranks that hold this rank's stages between them, shards, parts and copies alike."""
        sizes = {name: self.whole[name].size() for name in self.whole.mesh_dim_names or ()}
        inner = [name for name, size in sizes.items() if size > 1 and name not in ("copy", "pipeline")]
        if len(inner) == 1:
            return self.whole[inner[0]].get_group()
        if self._stage is None:
            ranks = self.world // self.degrees.pipeline
            axes = {"stages": dist.get_world_size() // ranks, "stage": ranks}
            self._stage = grid(self.whole.device_type, axes)
        return self._stage["stage"].get_group()

    @property
    def pipeline(self) -> DeviceMesh:
        """The ranks that hold the stages of one model, in the order of `stages.owned`."""
        return self.whole["pipeline"]

    @property
    def data_ranks(self) -> int:
        """Number of ranks that read different samples."""
        return self.degrees.data_ranks

    @property
    def data_rank(self) -> int:
        """Which of them this one is; equal on ranks that share a sample."""
        return self.whole.get_local_rank("replicate") * self.degrees.shard + self.whole.get_local_rank("shard")

    @property
    def loss_copies(self) -> int:
        """Number of ranks that hold the same loss; each chunk of a cut sequence has its own."""
        return self.degrees.tensor

    @property
    def label_copies(self) -> int:
        """Number of ranks that hold the same batch, before sequences are cut."""
        return self.world // self.data_ranks

    def groups(self) -> list[dist.ProcessGroup]:
        """This rank's process group of every axis."""
        meshes = [self.whole] if self.weights is self.whole else [self.whole, self.weights]
        meshes += [each for each in (self._spread, self._stage) if each is not None]
        return [group for mesh in meshes for group in mesh.get_all_groups()]


def grid(device_type: str, axes: dict[str, int]) -> DeviceMesh:
    """Collective. All ranks in order, with a process group for each axis; axes of one rank share one group.

    `init_device_mesh` gives the same grid. With NCCL it splits a communicator once for each axis; elsewhere it calls
    for each group there is: 4,096 more for each axis of one, and each call walks over its ranks.
    """
    ranks = torch.arange(dist.get_world_size()).view(*axes.values())
    whole = dist.group.WORLD
    if ranks.numel() == 1 or (whole is not None and whole.bound_device_id is not None):
        return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    alone = subgroup(ranks.view(-1, 1).tolist(), "alone") if 1 in axes.values() else None
    groups = []
    for place, (name, size) in enumerate(axes.items()):
        parts = ranks.movedim(place, -1).reshape(-1, size).tolist()
        groups.append(alone if size == 1 and alone is not None else subgroup(parts, f"mesh_{name}"))
    return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=tuple(axes))
