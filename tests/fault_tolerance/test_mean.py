"""Means over ranks that stand for groups, against sums made here; bytes against products made by hand."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from src.fault_tolerance.mean import BLOCK, CODECS, Exchange, Means, sent_bytes
from tests.ranks import RankPool

VALUES = 1000


def vector(group: int) -> Tensor:
    values = torch.randn(VALUES, generator=torch.Generator().manual_seed(group))
    return values * torch.logspace(-6, 3, VALUES)  # blocks of very different sizes


def mean_of(exchange: Exchange, contributors: int) -> Tensor:
    """On each rank of a world, which is a process group as torchft's are."""
    assert dist.group.WORLD is not None
    means = Means(exchange, 30.0, torch.device("cpu"))
    mine = vector(dist.get_rank()) if dist.get_rank() < contributors else torch.zeros(VALUES)
    try:
        return means.start(mine, contributors, dist.group.WORLD, dist.get_world_size()).result()
    finally:
        means.close()


@pytest.mark.parametrize("contributors", [2, 3])
def test_float32_is_the_mean_itself(ranks: RankPool, contributors: int) -> None:
    found = ranks(3, mean_of, "float32", contributors)
    by_hand = torch.stack([vector(group) for group in range(contributors)]).sum(0) / contributors
    assert all(torch.equal(each, by_hand) for each in found)


@pytest.mark.parametrize(("exchange", "bits"), [("bfloat16", 8), ("int8", 7)])
def test_fewer_bytes_are_rounded_twice_and_alike(ranks: RankPool, exchange: Exchange, bits: int) -> None:
    found = ranks(3, mean_of, exchange, 3)
    assert all(torch.equal(each, found[0]) for each in found)
    vectors = torch.stack([vector(group) for group in range(3)])
    largest = torch.nn.functional.pad(vectors, (0, 24)).view(3, -1, BLOCK).abs().amax(dim=2).repeat_interleave(BLOCK, 1)
    allowed = (largest.mean(0) + largest.mean(0)) * 2.0**-bits
    assert bool(((found[0] - vectors.mean(0)).abs() <= allowed[:VALUES]).all())
    assert not torch.equal(found[0], vectors.mean(0))


def test_one_group_sends_nothing_and_rounds_nothing() -> None:
    means = Means("int8", 30.0, torch.device("cpu"))
    found = means.start(vector(0), 1, None, 1).result()  # type: ignore[arg-type]
    means.close()
    assert torch.equal(found, vector(0))
    assert sent_bytes(VALUES, 1, "int8") == 0


def test_bytes_by_hand() -> None:
    # 1000 values in parts of whole blocks for 3 groups: 512 values each. Two parts leave a rank for the averages of
    # the others, and its own average leaves it twice.
    assert sent_bytes(1000, 3, "float32") == (2 + 2) * 512 * 4
    assert sent_bytes(1000, 3, "bfloat16") == (2 + 2) * 512 * 2
    assert sent_bytes(1000, 3, "int8") == (2 + 2) * (512 + 2 * 4)
    assert sent_bytes(0, 3, "float32") == 0


@pytest.mark.parametrize("exchange", ["float32", "bfloat16", "int8"])
def test_codecs_count_their_bytes_and_keep_what_is_not_finite(exchange: Exchange) -> None:
    codec, values = CODECS[exchange], vector(1).repeat(2)[: 4 * BLOCK].view(1, -1).clone()
    assert codec.encode(values).shape == (1, codec.bytes_of(4 * BLOCK))
    assert torch.equal(codec.decode(codec.encode(torch.zeros(2, BLOCK))), torch.zeros(2, BLOCK))
    for bad in (float("nan"), float("inf")):
        values[0, 300] = bad
        assert not bool(codec.decode(codec.encode(values)).isfinite().all())
