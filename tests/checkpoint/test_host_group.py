"""Agreements between ranks: who hears of what, in which order, and what all are told of one that fails."""

from typing import Any

import pytest
import torch.distributed as dist

from src.checkpoint.host_group import HostGroup, _above, _below
from src.errors import CheckpointError, DiskFullError
from tests.ranks import RankPool


@pytest.mark.parametrize("world", [1, 2, 3, 7, 8, 100, 4096])
def test_every_rank_is_heard_once_through_few_others(world: int) -> None:
    heard = [each for rank in range(world) for each in _below(rank, world)]
    assert sorted(heard) == list(range(1, world))
    assert all(_above(each) == rank for rank in range(world) for each in _below(rank, world))
    assert max(len(list(_below(rank, world))) for rank in range(world)) <= (world - 1).bit_length()


def agreements() -> dict[str, Any]:
    team = HostGroup()
    rank = team.rank
    return {
        "own": team.on_all(lambda: rank),
        "joined": team.joined(lambda: [rank], lambda first, second: first + second),
        "any": [team.any(lambda: rank == 2), team.any(lambda: False)],
        "spread": team.spread([10 * each for each in range(team.world)] if rank == 0 else None),
        "first": team.on_rank_zero(lambda: ("said by", rank)),
    }


@pytest.mark.parametrize("world", [1, 3, 4])
def test_what_ranks_have_reaches_rank_0_in_order(ranks: RankPool, world: int) -> None:
    found = ranks(world, agreements)
    assert [each["own"] for each in found] == list(range(world))
    assert [each["joined"] for each in found] == [list(range(world)), *[None] * (world - 1)]
    assert [each["any"] for each in found] == [[world > 2, False]] * world
    assert [each["spread"] for each in found] == [10 * rank for rank in range(world)]
    assert [each["first"] for each in found] == [("said by", 0)] * world


def failures() -> list[str]:
    team, told = HostGroup(), []
    rank = team.rank

    def fails(error: Exception, *on: int) -> None:
        if rank in on:
            raise error

    for action in (
        lambda: fails(CheckpointError(f"of {rank}"), 1, 2),
        lambda: fails(DiskFullError("no room"), 2),
        lambda: fails(OSError(5, "Input/output error", "a"), 1),
        lambda: fails(KeyError("ours"), 2),
    ):
        for method in (team.on_all, team.any, lambda act: team.joined(act, max)):
            try:
                method(action)
            except (CheckpointError, DiskFullError, RuntimeError) as error:
                told.append(f"{type(error).__name__}: {str(error).splitlines()[-1]}")
    dist.barrier()
    return told


def test_all_ranks_raise_what_one_has_failed_of(ranks: RankPool) -> None:
    first, *others = ranks(3, failures)
    assert others == [first] * 2
    words = ("CheckpointError: of 2", "DiskFullError: no room", "CheckpointError: a: Input/output error (rank 1)")
    assert first == [each for each in (*words, "RuntimeError: KeyError: 'ours'") for _ in range(3)]
