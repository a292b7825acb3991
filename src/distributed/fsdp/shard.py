"""FSDP2 (arXiv 2304.11277), HSDP and data parallelism through one wrapper, so there is one numerics path.

Gradients are summed, never averaged: the loss is already divided by the global number of tokens.
"""

from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from src.distributed.mesh import Mesh
from src.distributed.parallel_dims import ParallelDims
from src.distributed.precision.config import Precision
from src.models.decoder import Decoder
from src.models.moe.experts import Experts


def shard(model: Decoder, mesh: Mesh, precision: Precision) -> None:
    """Cut parameters: the embedding, each block, each module of multi-token prediction, and norm with head are gathered
    as units of their own.

    So are a block's routed experts where they lie on a grid of their own.
    """
    degrees = mesh.degrees
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, precision.compute),
        reduce_dtype=getattr(torch, precision.reduce),
        cast_forward_inputs=False,  # the rotary table stays fp32
    )
    # A GPU reads pinned pages fast and without waiting; without a GPU there is nothing to pin for.
    pinned = torch.cuda.is_available()
    offload = CPUOffloadPolicy(pin_memory=pinned) if degrees.cpu_offload else OffloadPolicy()
    wrap = partial(_wrap, grid=mesh.fsdp, mp_policy=policy, offload_policy=offload)
    always = degrees.reshard == "always"
    reshard = degrees.reshards_after_forward
    blocks = model.gathered_apart()
    units: list[list[Any]] = []
    for block in blocks:
        # The last block is the first that the backward pass needs: letting go of it would gather it twice in a row.
        let_go = reshard and (always or block is not blocks[-1])
        experts = [module for module in block.modules() if isinstance(module, Experts)]
        place = partial(_cut_of_experts, {each for module in experts for each in module.parameters()}, degrees)
        how: dict[str, Any] = {"reshard_after_forward": let_go, "shard_placement_fn": place}
        apart = experts if mesh.experts_fsdp is not None else []
        for unit in apart:
            _follow(block, wrap(unit, **how | {"grid": mesh.experts_fsdp}))
        wrap(block, **how)
        units.append([block, *apart])
    embedding = model.tok_embeddings
    head: list[nn.Module] = [module for module in (model.norm, model.output) if module is not None]
    tied = embedding is not None and model.output is not None and model.output.weight is embedding.weight
    if not tied:  # a shared matrix and all that uses it belong to one unit: the root
        if embedding is not None:
            units.insert(0, [wrap(embedding, reshard_after_forward=reshard)])
        if head:
            wrap(head, reshard_after_forward=always)
            units.append([head[0]])  # stands for both
    wrap(model, reshard_after_forward=always)
    # Without a word FSDP gathers as early as the host comes to it, and where experts are spread the host must wait.
    if degrees.prefetch > 1 or degrees.expert > 1:
        _prefetch(units, degrees.prefetch)


def _wrap(unit: nn.Module | list[nn.Module], grid: DeviceMesh, **how: Any) -> FSDPModule:
    """As `fully_shard`; of modules that are gathered together the first one speaks."""
    fully_shard(unit, mesh=grid, **how)
    made = unit[0] if isinstance(unit, list) else unit
    assert isinstance(made, FSDPModule)
    made.set_force_sum_reduction_for_comms(True)
    if grid.size() > 1:  # an only rank would divide all of its gradients by this 1
        made.set_gradient_divide_factor(1.0)
    return made


def _cut_of_experts(parameters: set[nn.Parameter], degrees: ParallelDims, parameter: nn.Parameter) -> Shard | None:
    """FSDP's placement: of dimension 0, but where there are too few experts: see `ParallelDims.cuts_inside`."""
    inside = parameter in parameters and degrees.cuts_inside(parameter.shape[0])
    return Shard(1) if inside else None


def _follow(block: nn.Module, unit: FSDPModule) -> None:
    """Gather `unit` with the block around it, in both passes.

    Hooks of its own would fire inside of what a recomputation repeats: it would gather twice, and torch's selective
    recomputation would stumble over operations that the first pass did not have.
    """
    state = unit._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    block.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
    block.register_forward_hook(state._post_forward)


def _prefetch(units: list[list[FSDPModule]], ahead: int) -> None:
    """`units` in the order of the forward pass: each sees to it that the next ones are gathered, in both passes.

    Of modules that are gathered one by one but needed together, the first stands for all.
    """
    for index, (unit, *_) in enumerate(units):
        unit.set_modules_to_forward_prefetch([*chain(*units[index + 1 : index + 1 + ahead])])
        unit.set_modules_to_backward_prefetch([*chain(*units[max(0, index - ahead) : index][::-1])])


def synchronise_gradients(model: nn.Module, wanted: bool, *, last: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks; without, they add up whole on each rank.

    `last`: no backward pass follows in this step, so FSDP may finish its reductions.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(wanted)
    model.set_is_last_backward(last)
