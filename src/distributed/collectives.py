"""All-reduces of small tensors: sums and maxima over a mesh or the world, whether a flag is set on any rank."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

LIMB_BITS = 32


def any_rank(flag: bool, device: torch.device) -> bool:
    """Collective: true everywhere when `flag` is true anywhere. Waits for the device."""
    votes = torch.tensor(float(flag), device=device)
    _reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def world_sum(values: Tensor) -> Tensor:
    """Collective: the element-wise sum over all ranks, in place, without waiting for the device."""
    return _reduce(values, dist.ReduceOp.SUM)


def world_max(values: Tensor) -> Tensor:
    """Collective: the element-wise maximum over all ranks, in place, without waiting for the device."""
    return _reduce(values, dist.ReduceOp.MAX)


def mesh_sum(values: Tensor, mesh: DeviceMesh) -> Tensor:
    """Collective: the element-wise sum over the ranks of `mesh`, in place, without waiting for the device."""
    for group in mesh.get_all_groups():
        _reduce(values, dist.ReduceOp.SUM, group)
    return values


def mesh_max(values: Tensor, mesh: DeviceMesh) -> Tensor:
    """Collective: the element-wise maximum over the ranks of `mesh`, in place, without waiting for the device."""
    for group in mesh.get_all_groups():
        _reduce(values, dist.ReduceOp.MAX, group)
    return values


def _reduce(values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None = None) -> Tensor:
    """In place; one rank has the result already."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=operation, group=group)
    return values


def limbs(value: int) -> tuple[float, float]:
    """A number modulo 2^64 as its low and high 32 bits: float64 numbers whose sums over ranks are exact.

    A limb is below 2^32 and float64 is exact to 2^53, so in any order of additions over up to 2^21 ranks.
    """
    return float(value % 2**LIMB_BITS), float(value >> LIMB_BITS)


def of_limbs(low: float, high: float) -> int:
    """The sum modulo 2^64 of numbers whose limbs add up to these."""
    return (int(low) + (int(high) << LIMB_BITS)) % 2**64
