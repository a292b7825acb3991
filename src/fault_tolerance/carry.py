"""Moves a state between replica groups: each rank sends its shards to the rank of the same number in another group."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Tree = dict[str, Any]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, detached and without its mesh, which has no meaning in another group."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def shards(tree: Tree) -> Tree:
    """The same tree with each tensor replaced by this rank's shard of it, sharing memory."""
    return {
        key: shards(each) if isinstance(each, dict) else local(each) if isinstance(each, Tensor) else each
        for key, each in tree.items()
    }


@torch.no_grad()
def fill(live: Tree, given: Tree) -> Tree:
    """Copy the tensors of `given` (`shards` of another group) into the shards of `live`; returns `given`, for its
    plain values.
    """
    assert live.keys() == given.keys(), f"{sorted(live.keys() ^ given.keys())} is known to one group only"
    for key, mine in live.items():
        if isinstance(mine, dict):
            fill(mine, given[key])
        elif isinstance(mine, Tensor):
            local(mine).copy_(given[key])
    return given
