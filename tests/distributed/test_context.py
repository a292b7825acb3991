"""A sequence cut over ranks trains as on one: the cut, the joined attention, whole models."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from src.distributed.exchange import attention, by_rank, cut, gather, in_order
from tests.ranks import Ranks


@pytest.mark.parametrize(
    ("rank", "held"), [(0, [0, 1, 14, 15]), (1, [2, 3, 12, 13]), (2, [4, 5, 10, 11]), (3, [6, 7, 8, 9])]
)
def test_a_rank_holds_its_head_and_its_tail(rank: int, held: list[int]) -> None:
    rows = torch.stack((torch.arange(16), torch.arange(16) + 100))
    assert cut(rows, rank, 4).tolist() == [held, [row + 100 for row in held]]


def test_ranks_hold_equal_work_and_everything_once() -> None:
    positions = torch.arange(48)
    shares = [cut(positions, rank, 3, dim=0) for rank in range(3)]
    assert len({int((share + 1).sum()) for share in shares}) == 1  # keys that causal queries see
    gathered = torch.cat(shares)
    assert torch.equal(in_order(gathered, 3), positions)
    assert torch.equal(by_rank(positions, 3), gathered)


def inputs(length: int, width: int, value_width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the result's gradient: 2 rows, 4 heads on 2 kv heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, length, width), (2, 2, length, width), (2, 2, length, value_width), (2, 4, length, value_width)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def joined(rotate: str, width: int, value_width: int, scale: float | None) -> float:
    """The largest difference of result and gradients from one device's, in fp64."""
    *given, grad = inputs(6 * dist.get_world_size(), width, value_width)
    whole = [x.clone().requires_grad_() for x in given]
    expected = F.scaled_dot_product_attention(*whole, is_causal=True, scale=scale, enable_gqa=True)
    expected.backward(grad)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = [cut(x, rank, ranks, dim=2).requires_grad_() for x in given]
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    out, _ = attention(*mine, scale, group, rotate)
    out.backward(cut(grad, rank, ranks, dim=2))
    pairs = [(out, expected), *((x.grad, y.grad) for x, y in zip(mine, whole, strict=True))]
    return max(float((x - cut(y, rank, ranks, dim=2)).abs().max()) for x, y in pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks_used", [2, 3, 4])
@pytest.mark.parametrize("rotate", ["allgather", "alltoall"])
def test_joined_attention_is_attention(ranks: Ranks, rotate: str, ranks_used: int) -> None:
    assert max(ranks(ranks_used, joined, rotate, 8, 8, None)) < 1e-12
    assert max(ranks(ranks_used, joined, rotate, 12, 8, 0.7)) < 1e-12  # values narrower than keys, another scale
