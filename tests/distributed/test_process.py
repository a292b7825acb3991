"""Joining and leaving, alone and in a world of ranks."""

import os
import select
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch.distributed as dist

from src.distributed.process.rank_context import LauncherEnv, RankContext, host_store, joined
from src.errors import PlanError
from tests.ranks import RankPool as Pool

ALONE = """
import torch, torch.distributed as dist
from src.distributed.process.rank_context import RankContext, joined
assert not joined()
ranks = RankContext.join("cpu", 1, timeout_seconds=30)
value = torch.ones(2)
dist.all_reduce(value)
ranks.set_timeout(5, [])
print(ranks.rank, ranks.world, ranks.local_rank, ranks.device, value.tolist())
ranks.leave(); ranks.leave()
print(dist.is_initialized())
"""
CLIENT = """
import torch, torch.distributed as dist
from src.distributed.process.rank_context import RankContext
ranks = RankContext.join("cpu", 2, timeout_seconds=30)
value = torch.tensor([ranks.rank + 1.0])
dist.all_reduce(value)
print(ranks.rank, ranks.local_world, value.item())
ranks.leave()
"""
KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**facts: object) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in KEYS}
    return kept | {key: str(value) for key, value in facts.items()}


def test_a_world_of_one_needs_no_environment() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines() == ["0 1 0 cpu [1.0, 1.0]", "False"], done.stderr


def test_ranks_meet_at_the_launchers_store_also_where_they_come_before_it() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env=environment(RANK=rank, LOCAL_RANK=rank, **shared, **agent),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    select.select([listener], [], [], 120.0)  # until one of them waits
    store = host_store(listener)
    assert [client.communicate(timeout=120)[0] for client in clients] == ["0 2 3.0\n", "1 2 3.0\n"]
    del store


def _join_existing(world: int) -> tuple[int, int, bool]:
    ranks = RankContext.join("cpu", world, timeout_seconds=30)
    dist.barrier()
    ranks.leave()
    return ranks.rank, ranks.world, dist.is_initialized()


def test_an_existing_group_is_used_and_left_alone(ranks: Pool) -> None:
    assert ranks(2, _join_existing, 2) == [(0, 2, True), (1, 2, True)]


def test_another_world_than_the_plans_is_refused_before_any_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = environment(RANK=0, WORLD_SIZE=3, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(PlanError, match=r"RANK is not set.* but the plan has 4 ranks"):
        RankContext.join("cpu", 4, timeout_seconds=1)
    for key in KEYS:
        if key in shown:
            monkeypatch.setenv(key, shown[key])
    with pytest.raises(PlanError, match="WORLD_SIZE=3, but the plan has 4 ranks"):
        RankContext.join("cpu", 4, timeout_seconds=1)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(PlanError, match="MASTER_ADDR: missing; 3 ranks cannot find each other"):
        RankContext.join("cpu", 3, timeout_seconds=1)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"RANK": 1}, ["WORLD_SIZE=None", "LOCAL_RANK=None"]),
        ({"RANK": "x", "WORLD_SIZE": 1}, ["RANK=x"]),
        ({"RANK": 2, "WORLD_SIZE": 2, "LOCAL_RANK": 0}, ["RANK=2 is not below"]),
    ],
)
def test_a_broken_environment_is_told_at_once(
    facts: dict[str, Any], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    assert not joined()
    assert LauncherEnv.read() == LauncherEnv(rank=0, world=1, local_rank=0, local_world=1)
    for key, value in facts.items():
        monkeypatch.setenv(key, str(value))
    assert joined()
    with pytest.raises(PlanError) as error:
        LauncherEnv.read()
    assert len(error.value.problems) == len(expected)
    for problem, start in zip(error.value.problems, expected, strict=True):
        assert problem.startswith(start)
