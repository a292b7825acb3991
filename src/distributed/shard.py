"""FSDP2 (arXiv 2304.11277), HSDP and data parallelism through one wrapper, so there is one numerics path.

Gradients are summed, never averaged: the loss is already divided by the global number of tokens.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

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
    # A GPU reads pinned pages fast and without waiting; without a GPU there is nothing to pin for.
    pinned = torch.cuda.is_available()
    offload = CPUOffloadPolicy(pin_memory=pinned) if degrees.cpu_offload else OffloadPolicy()
    wrap = partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=offload)
    always = degrees.reshard == "always"
    reshard = degrees.lets_go
    blocks = model.blocks()
    for block in blocks:
        # The last block is the first that the backward pass needs: letting go of it would gather it twice in a row.
        let_go = reshard and (always or block is not blocks[-1])
        wrap(block, reshard_after_forward=let_go)
    embedding = model.tok_embeddings
    head: list[nn.Module] = [module for module in (model.norm, model.output) if module is not None]
    tied = embedding is not None and model.output is not None and model.output.weight is embedding.weight
    units: list[Any] = list(blocks)
    if not tied:  # a shared matrix and all that uses it belong to one unit: the root
        if embedding is not None:
            units.insert(0, wrap(embedding, reshard_after_forward=reshard))
        if head:
            wrap(head, reshard_after_forward=always)
            units.append(head[0])  # stands for both
    wrap(model, reshard_after_forward=always)
    if degrees.prefetch > 1:
        _prefetch(units, degrees.prefetch)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _prefetch(units: list[FSDPModule], ahead: int) -> None:
    """`units` in the order of the forward pass: each sees to it that the next ones are gathered, in both passes."""
    for index, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + ahead])
        unit.set_modules_to_backward_prefetch(units[max(0, index - ahead) : index][::-1])


def synchronise_gradients(model: nn.Module, wanted: bool, *, last: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks; without, they add up whole on each rank.

    `last`: no backward pass follows in this step, so FSDP may finish its reductions.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(wanted)
    model.set_is_last_backward(last)
