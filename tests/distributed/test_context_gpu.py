"""Joined attention with the kernels of a GPU: as near to the truth as one device's attention in the same precision."""

from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from src.distributed.context.attention_kernels import Cudnn, FlashAttention4, fastest
from src.distributed.context.ring_attention import attention, cut, gather
from tests.ranks import RankPool


def attended(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Result and gradients of causal attention on one device."""
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in given if x.grad is not None)]


def errors(rotate: str, width: int, value_width: int) -> tuple[str, list[tuple[float, float]]]:
    """The kernel, and largest errors against fp32 of the joined and of the whole attention: result, q, k, v."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl", device_id=torch.device("cuda", rank))
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 8, 2048, width), (2, 2, 2048, width), (2, 2, 2048, value_width), (2, 8, 2048, value_width)]
    given = [torch.randn(shape, generator=generator).bfloat16().cuda() for shape in shapes]
    # Stored as a model stores them: (batch, length, heads, width).
    given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    truth, whole = attended(*(x.float() for x in given)), attended(*given)
    *mine, grad = (cut(x, rank, ranks, dim=2) for x in given)
    mine = [x.requires_grad_() for x in mine]
    out, _ = attention(*mine, None, group.group_name, rotate)
    out.backward(grad)
    joined = [out.detach(), *(x.grad for x in mine)]
    gathered = gather(mine[1].detach(), 2, group.group_name)
    assert torch.equal(gathered, given[1])
    pairs = []
    for exact, one, part in zip(truth, whole, joined, strict=True):
        exact, one = (cut(x, rank, ranks, dim=2).float() for x in (exact, one))
        pairs.append((float((part.float() - exact).abs().max()), float((one - exact).abs().max())))
    kernel = fastest(*mine).__name__
    dist.destroy_process_group(group)
    return kernel, pairs


@pytest.mark.gpu
@pytest.mark.parametrize("rotate", ["allgather", "alltoall"])
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (128, 128), (192, 128)])
def test_joined_attention_is_as_near_as_whole(ranks: RankPool, rotate: str, width: int, value_width: int) -> None:
    count = min(4, torch.cuda.device_count())
    for kernel, pairs in ranks(count, errors, rotate, width, value_width):
        assert kernel != "PlainKernel"
        for joined, whole in pairs:
            assert joined <= 2 * whole + 1e-3
        if torch.cuda.get_device_capability() == (9, 0) and width <= 128:
            assert kernel == (FlashAttention4 if find_spec("flash_attn") else Cudnn).__name__
