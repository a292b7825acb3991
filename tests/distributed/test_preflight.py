"""Before a run: every rank is there and the first sum is right, or the node that is missing is named by all others."""

import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from src.distributed.process import preflight as module
from src.distributed.process.preflight import PreflightError, Presence, preflight, table
from src.distributed.process.rank_context import LauncherEnv, RankContext, leave_all
from tests.scale.fakes import played_collectives

NODES = ["n0", "n1"]


def started(rank: int, seconds: float) -> list[Presence] | tuple[str, str | None]:
    try:
        return preflight(LauncherEnv(rank, 4, rank % 2, 2), "cpu", 4, NODES, ("", 0), seconds)
    except PreflightError as error:
        return str(error), error.node


def together(present: list[int], seconds: float) -> list[list[Presence] | tuple[str, str | None]]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    with (
        patch.object(module, "_store", lambda *_given: store),
        patch.object(module, "_MARGIN_SECONDS", 0.0),
        played_collectives(4),
        ThreadPoolExecutor(4) as pool,
    ):
        return list(pool.map(lambda rank: started(rank, seconds), present))


def test_rank_0_is_told_of_all_and_each_other_of_itself() -> None:
    everybody = [Presence(rank, NODES[rank // 2], "cpu", 4) for rank in range(4)]
    assert together([3, 0, 2, 1], 20.0) == [everybody[3:], everybody, everybody[2:3], everybody[1:2]]
    assert table(everybody) == "n0: ranks 0-1 on cpu\nn1: ranks 2-3 on cpu"


@pytest.mark.parametrize(
    ("present", "words", "node"),
    [
        ([0, 1, 2], "no word for 0.6 s of 1 ranks; rank 3 on n1", "n1"),
        ([1, 0], "no word for 0.6 s of 2 ranks; rank 2 on n1", "n1"),
        ([2, 0, 3], "no word for 0.6 s of 1 ranks; rank 1 on n0", "n0"),
    ],
)
def test_who_is_missing_is_named_by_all_who_came(present: list[int], words: str, node: str) -> None:
    assert together(present, 0.2) == [(words, node)] * len(present)


def test_a_sum_that_is_wrong_is_told() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]

    def wrong(total: torch.Tensor) -> None:
        total.fill_(5.0)

    words = "rank 1 on n0: the ranks add up to 5, not 6"
    with played_collectives(4), patch.object(dist, "all_reduce", wrong), pytest.raises(PreflightError, match=words):
        module._add_up(store, LauncherEnv(1, 4, 1, 2), "cpu", NODES, 20.0, None, None)


def test_ranks_that_are_not_numbered_node_by_node_are_refused() -> None:
    """SLURM_DISTRIBUTION=cyclic: rank 1 is the first of the second node, and tensor ranks would be far apart."""
    words = "rank 1 is number 0 of its node, not 1: .* numbered node by node; .* distribution of tasks"
    with pytest.raises(PreflightError, match=words):
        preflight(LauncherEnv(1, 4, 0, 2), "cpu", 4, NODES, ("", 0), 0.2)


def joined_once(rank: int, port: int, traces: Path) -> tuple[int, float, bool, bool]:
    """A rank of a process of its own."""
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {key: str(value) for key, value in facts.items()}
    preflight(LauncherEnv.read(), "cpu", 2, ["n0"], ("127.0.0.1", port), 60.0, traces=traces)
    group = dist.group.WORLD
    ranks = RankContext.join("cpu", 2, timeout_seconds=30.0, traces=traces)
    same = dist.group.WORLD is group
    value = torch.tensor(float(rank))
    dist.all_reduce(value)
    ranks.leave()
    still = dist.is_initialized()
    leave_all()
    return ranks.rank, value.item(), same, still


def test_the_group_of_the_check_is_that_of_the_run(tmp_path: Path) -> None:
    """One rendezvous, and one NCCL world, a start. MASTER_PORT is not set: join() would miss it."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free, ProcessPoolExecutor(2, mp_context=context) as pool:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        told = [pool.submit(joined_once, rank, port, tmp_path / "traces") for rank in range(2)]
        assert [each.result(timeout=120) for each in told] == [(0, 1.0, True, True), (1, 1.0, True, True)]
