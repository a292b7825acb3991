"""Random runs, each equal to one device or refused before it starts. RANDOM_RUNS=400 draws so many in all.

A run costs 1 CPU second on one rank, 2 on two, 5 on four and 10 to 15 on six or eight: most of it is DTensor, which
works out each new shape once. So 20 are drawn in `make test` (40 CPU seconds), and 180 more in `make test-all` (7
minutes): 60 on up to eight ranks and 120 on up to four. RANDOM_RUNS=half, of .ci/run, takes the half of these 180 whose
turn it is: each commit has the other one.
"""

import gc
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count, islice
from typing import Any
from unittest.mock import patch

import pytest
from torch.distributed import ProcessGroup, new_group

from benchmarks.support_matrix import turn
from src.distributed.process.rank_context import RankContext
from src.errors import PlanError
from src.planning.plan import plan
from src.run import Run
from src.tasks.verify.config import Verify
from src.tasks.verify.rank import certify
from tests.distributed.random_runs import random_run, words
from tests.ranks import RankPool

FEW = range(40, 60)  # with one run on six ranks and none on eight
ASKED = os.environ.get("RANDOM_RUNS", "200")
RUNS = 200 if ASKED == "half" else int(ASKED)
WIDE = 80  # seeds from here on are drawn for at most four ranks
KEY = re.compile(r"\b(model|parallel|precision|recompute|task|data)\.[a-z]")
CONVINCING = 0.6  # a plan that refused everything would be right as well


@contextmanager
def one_group_for_the_same_ranks() -> Iterator[None]:
    """Runs of one world share the process groups of their meshes: each has threads that wake 100 times a second."""
    made: dict[tuple[int, ...], ProcessGroup] = {}

    def once(ranks: Sequence[int], **how: Any) -> ProcessGroup:
        if (group := made.get(tuple(ranks))) is None:
            group = made[tuple(ranks)] = new_group(ranks=ranks, **how)
        return group

    gc.freeze()  # what is here is looked at no more between two runs: a second each
    with patch("torch.distributed.device_mesh.new_group", once):
        yield
    gc.unfreeze()


def differences(world: int, runs: Mapping[int, Run]) -> dict[int, str]:
    """On one rank of the runs' world: what is wrong with each, by seed."""
    found, ranks = {}, RankContext.join("cpu", world, timeout_seconds=120)
    with one_group_for_the_same_ranks():
        for seed, run in runs.items():
            assert isinstance(run.task, Verify)
            try:
                certificate = certify(run.task, run, ranks, {})
            except Exception as error:
                raise AssertionError(f"seed {seed}, {words(run)}") from error
            if certificate.failed:
                found[seed] = f"{words(run)}: {certificate.problem()}"
    return found


def refusals(run: Run) -> tuple[str, ...]:
    """The plan's own words; none where it accepts the run."""
    try:
        plan(run)
    except PlanError as error:
        return error.problems
    return ()


def legal(seeds: Sequence[int]) -> dict[int, dict[int, Run]]:
    """The runs that the plan accepts, by world and seed. Of each other one every reason is a line that names a key."""
    found: dict[int, dict[int, Run]] = {}
    for seed in seeds:
        run = random_run(seed)
        lines = refusals(run)
        assert all(KEY.search(line) and "\n" not in line for line in lines), lines
        if not lines:
            found.setdefault(run.parallel.world, {})[seed] = run
    assert sum(map(len, found.values())) > CONVINCING * len(seeds)
    return found


def many() -> list[int]:
    """All seeds but FEW, or the half of them whose turn it is."""
    narrow = (seed for seed in count(WIDE) if random_run(seed).parallel.world <= 4)
    seeds = chain(range(min(WIDE, RUNS)), islice(narrow, max(RUNS - WIDE, 0)))
    found = [seed for seed in seeds if seed not in FEW]
    return found[turn() % 2 :: 2] if ASKED == "half" else found


def test_a_seed_is_a_run() -> None:
    assert random_run(7) == random_run(7)
    drawn = [random_run(seed) for seed in range(60)]
    assert {run.parallel.world for run in drawn} == {1, 2, 3, 4, 6, 8}
    assert {run.model.family for run in drawn} == {"llama3", "deepseek_v3", "qwen3"}
    for axis in ("pipeline", "replicate", "shard", "context", "tensor", "expert"):
        assert any(getattr(run.parallel, axis) > 1 for run in drawn), axis


def equal_or_refused(ranks: RankPool, seeds: Sequence[int]) -> None:
    for world, runs in sorted(legal(seeds).items()):
        assert ranks(world, differences, world, runs) == [{}] * world


def test_equal_to_one_device_or_refused(ranks: RankPool) -> None:
    equal_or_refused(ranks, FEW)


@pytest.mark.slow
def test_many_are_equal_to_one_device_or_refused(ranks: RankPool) -> None:
    equal_or_refused(ranks, many())
