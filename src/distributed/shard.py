"""FSDP2 (arXiv 2304.11277), HSDP and data parallelism through one wrapper, so there is one numerics path.

Gradients are summed, never averaged: the loss is already divided by the global number of tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from src.distributed.degrees import Degrees
from src.distributed.precision import Precision
from src.models.decoder import Decoder


def shard(model: Decoder, mesh: DeviceMesh, degrees: Degrees, precision: Precision) -> None:
    """Cut parameters over `mesh`: the embedding, each block, and norm with head are gathered as units of their own."""
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, precision.compute),
        reduce_dtype=getattr(torch, precision.reduce),
        cast_forward_inputs=False,  # the rotary table stays fp32
    )
    always = degrees.reshard == "always"
    reshard = degrees.reshard != "never"
    blocks = model.blocks()
    for block in blocks:
        # The last block is the first that the backward pass needs: letting go of it would gather it twice in a row.
        let_go = reshard and (always or block is not blocks[-1])
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=let_go)
    embedding = model.tok_embeddings
    head: list[nn.Module] = [module for module in (model.norm, model.output) if module is not None]
    tied = embedding is not None and model.output is not None and model.output.weight is embedding.weight
    if not tied:  # a shared matrix and all that uses it belong to one unit: the root
        if embedding is not None:
            fully_shard(embedding, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        if head:
            fully_shard(head, mesh=mesh, mp_policy=policy, reshard_after_forward=always)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=always)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def synchronise_gradients(model: nn.Module, wanted: bool, *, last: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks; without, they add up whole on each rank.

    `last`: no backward pass follows in this step, so FSDP may finish its reductions.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(wanted)
    model.set_is_last_backward(last)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Forward passes without a trace: no gradients, and gathered weights let go of, since no backward pass will."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
