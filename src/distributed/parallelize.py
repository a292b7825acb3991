"""The order in which a layout is applied to a plain model. Each line leaves the names of the parameters as they
were.
"""

import torch

from src.distributed.compile import Compile
from src.distributed.context.context_parallel import split_context
from src.distributed.expert.expert_parallel import split_experts
from src.distributed.expert.stopwatch import watch
from src.distributed.fsdp.one_device import fuse_swiglu
from src.distributed.fsdp.shard import shard
from src.distributed.mesh import Mesh
from src.distributed.precision.config import Precision
from src.distributed.recompute import Recompute
from src.distributed.tensor.tensor_parallel import split_tensor
from src.models.attention.flash_attention import attends_within_documents
from src.models.decoder import Decoder


def parallelize(model: Decoder, mesh: Mesh, precision: Precision, recompute: Recompute, compile: Compile) -> None:
    """Apply a layout to a model: tensor, expert and context parallelism, recompute, compile, FSDP, in this order. In
    place, on the meta device.
    """
    if (float8 := precision.float8) is not None:
        float8.convert(model, mesh.degrees.tensor, mesh.whole.device_type)
    divided, exchanged = mesh.degrees.divides_tokens, float8 is not None and float8.exchanged
    split_tensor(model, mesh.tensor, divided_tokens=divided, float8=exchanged)
    if model.config.routed:
        mesh.spread_experts()  # by all ranks, also where a stage of a pipeline has no expert
        split_experts(model, mesh)
    split_context(model, mesh.context, mesh.degrees)
    model.by_starts = mesh.degrees.context == 1 and not compile.graph and by_starts(model, precision)
    experts_apart = mesh.degrees.expert > 1
    recompute.apply_within(model, experts_apart=experts_apart)
    compile.apply(
        model,
        budget=recompute.budget,
        round_each_step=float8 is not None and float8.recipe != "tensorwise",
        pipeline_products=mesh.degrees.async_tensor,
        experts_apart=experts_apart,
    )
    recompute.apply_around(model)
    if not mesh.degrees.on_one_device:
        shard(model, mesh, precision)
    elif recompute.mode not in ("selective", "budget"):  # which keep, or weigh, the products one by one
        fuse_swiglu(model, precision)
    watch(model, mesh)


def by_starts(model: Decoder, precision: Precision) -> bool:
    """Whether the fastest attention here wants to know where documents start, and needs no block mask."""
    config, dtype = model.config, getattr(torch, precision.compute)
    documents_alone = config.within_documents and config.fixed_block is None
    return documents_alone and attends_within_documents(config.head_widths, dtype)
