"""Process groups of a part of the ranks, made by one call a rank, however many parts there are."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def subgroup(parts: Sequence[Sequence[int]], words: str) -> dist.ProcessGroup:
    """Collective: the group of this rank's part. `parts`: of all ranks, each in one; `words`: for a diagnosis.

    torch's own loop makes every part's group on every rank, O(world) calls where a part is small: 21,648 for the mesh
    of 4,096 ranks. NCCL splits a communicator for all parts at once; elsewhere only the members of a part meet.
    """
    rank, whole = dist.get_rank(), dist.group.WORLD
    assert whole is not None, "there is a default group"
    mine = next(part for part in parts if rank in part)
    if len(mine) == dist.get_world_size():
        return whole
    if whole.bound_device_id is not None and torch.accelerator.is_available():
        group = dist.split_group(whole, [list(part) for part in parts], group_desc=words)
    else:
        group = dist.new_group(list(mine), use_local_synchronization=True, group_desc=words)
    assert group is not None, f"rank {rank} is in the group of {mine}"
    return group
