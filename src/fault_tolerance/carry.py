"""Trees of tensors on their way from one group to another: each rank sends what its twin holds, shard by shard."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Tree = dict[str, Any]


def local(tensor: Tensor) -> Tensor:
    """This rank's part, without its mesh, which means nothing in another group."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def shards(tree: Tree) -> Tree:
    """The same tree with the live local part of each tensor."""
    return {
        key: shards(each) if isinstance(each, dict) else local(each) if isinstance(each, Tensor) else each
        for key, each in tree.items()
    }


@torch.no_grad()
def fill(live: Tree, given: Tree) -> Tree:
    """Copy the tensors of `given` (another group's `shards`) into those of `live`; returns `given`, for its values."""
    assert live.keys() == given.keys(), f"{sorted(live.keys() ^ given.keys())} is known to one group only"
    for key, mine in live.items():
        if isinstance(mine, dict):
            fill(mine, given[key])
        elif isinstance(mine, Tensor):
            local(mine).copy_(given[key])
    return given
