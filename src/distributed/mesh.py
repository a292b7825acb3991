"""Who talks to whom. Every question about groups and data ranks is asked here."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from src.distributed.degrees import Degrees


class Mesh:
    """The ranks as a grid, outermost axis first: pipeline, replicate, shard, context, tensor.

    Neighbours on the innermost axis sit in one machine, so the chattiest axis is `tensor`. Axes of size 1 are kept:
    FSDP over
    one rank still gives mixed precision, and no caller asks whether an axis exists.
    """

    def __init__(self, degrees: Degrees, device_type: str) -> None:
        assert dist.get_world_size() == degrees.world, f"{dist.get_world_size()} ranks for a plan of {degrees.world}"
        self.degrees = degrees
        self.world = degrees.world
        axes = degrees.axes
        self.whole = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    @property
    def tensor(self) -> DeviceMesh | None:
        """The ranks that share every matrix; None when matrices are whole."""
        return self.whole["tensor"] if self.degrees.tensor > 1 else None

    @property
    def fsdp(self) -> DeviceMesh:
        """Where parameters are cut: 1-D (shard), or 2-D (replicate, shard) when there are copies."""
        return self.whole["replicate", "shard"] if self.degrees.replicate > 1 else self.whole["shard"]

    @property
    def data_ranks(self) -> int:
        """How many ranks read different samples."""
        return self.degrees.data_ranks

    @property
    def data_rank(self) -> int:
        """Which of them this one is; equal on ranks that share a sample."""
        return self.whole.get_local_rank("replicate") * self.degrees.shard + self.whole.get_local_rank("shard")

    @property
    def loss_copies(self) -> int:
        """How many ranks of the world hold the same loss."""
        return self.world // self.data_ranks

    def groups(self) -> list[dist.ProcessGroup]:
        """This rank's process group of every axis."""
        return [self.whole.get_group(axis) for axis in self.degrees.axes]
