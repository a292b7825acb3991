"""Replica groups that do not share the samples of a step end at the first step or exchange, and say who took what."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from src.checkpoint.folder import complete
from src.data.batches import Batches
from src.errors import SampleError
from src.fault_tolerance import local_sgd_groups, synchronous_groups
from src.fault_tolerance.table import Quorum, share
from src.runs.folder import RunFolder
from src.tasks.pretrain import rank as pretrain
from src.train import audit
from src.train.resume import resume
from tests.end_to_end.lives import TINY, live, opened, series
from tests.ranks import RankPool

GROUPS = ("fault_tolerance.groups=2", "data=synthetic", "data.documents=100", "task.steps=4", "checkpoint.every=2")


class Pair:
    """A membership of two groups of one rank that are always there, without a lighthouse."""

    failures, heal_seconds = 0, 0.0
    error: Exception | None = None

    def __init__(self, between: Any, *_: Any) -> None:
        self.group = between

    def start_quorum(self, *_: Any) -> Quorum:
        return Quorum(1, self.group.rank(), 2, healed=False)

    def outside(self) -> set[int]:
        return set()

    def allreduce(self, tensors: Sequence[Tensor], *_: Any) -> None:
        for tensor in tensors:
            self.group.allreduce([tensor]).wait()

    def vote(self, *, fine: bool) -> bool:
        return fine

    def leave(self) -> None:
        pass


@contextmanager
def right(_: int) -> Iterator[None]:
    yield


@contextmanager
def same_share(_: int) -> Iterator[None]:
    """All groups take the same half."""
    first = lambda _, size, micro_batches: share(0, size, micro_batches)  # noqa: E731
    with patch.object(synchronous_groups, "share", first), patch.object(local_sgd_groups, "share", first):
        yield


@contextmanager
def twice(number: int) -> Iterator[None]:
    """Group 1 takes a sample twice."""
    step = Batches.step
    with patch.object(Batches, "step", lambda *args: [step(*args)[0]] * 2) if number else right(0):
        yield


@contextmanager
def a_step_ahead(number: int) -> Iterator[None]:
    """Group 1 is a step further in the data than in the run."""
    step = Batches.step
    ahead = lambda batches, position, share: step(batches, position + 4, share)  # noqa: E731
    with patch.object(Batches, "step", ahead) if number else right(0):
        yield


@contextmanager
def misplaced(number: int) -> Iterator[None]:
    """Group 1 begins at another position."""

    def broken(state: Any, *args: Any) -> str:
        told = resume(state, *args)
        state.position += 4 * number
        return told

    with patch.object(pretrain, "resume", broken):
        yield


def life(folder: Path, how: Callable[[int], Any]) -> str | bool | tuple[str, ...]:
    """Of a group of one rank, which this rank of two becomes."""
    number, store = dist.get_rank(), _get_default_store()
    place = dist.PrefixStore("groups", store)  # type: ignore[attr-defined]
    between = dist.ProcessGroupGloo(place, number, 2, timedelta(seconds=120))
    dist.barrier()
    dist.destroy_process_group()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with (
        patch.dict(os.environ, alone | {"REPLICA_GROUP_ID": str(number), "TORCHFT_LIGHTHOUSE": "http://nowhere:1"}),
        patch.object(synchronous_groups, "Membership", partial(Pair, between)),
        patch.object(audit, "BLAMELESS_SECONDS", 0.0),
        how(number),
    ):
        try:
            return live(folder / "groups" / str(number))
        except SampleError as error:
            return str(error)


def run_of(tmp_path: Path, *argv: str) -> Path:
    folder = opened(*TINY, *GROUPS, f"root={tmp_path}", *argv)
    code = next((folder / "code").iterdir()).name
    for number in range(2):
        with RunFolder.rejoin(folder, code) as run:
            group = run.group(number)
        with RunFolder.rejoin(group, code) as own:
            own.begin(1)
    return folder


SYNCHRONOUS, APART = ("fault_tolerance=torchft",), ("fault_tolerance=diloco", "fault_tolerance.sync_steps=2")
STEP = "step 1 is of samples 0 to 3, checksum "
ROUND = "steps up to 2 are of samples 0 to 7, checksum "


# A step is of four micro-batches of one sample: group 0 has the first two, group 1 the rest.
@pytest.mark.parametrize(
    ("how", "argv", "words"),
    [
        pytest.param(
            same_share,
            SYNCHRONOUS,
            ((STEP, "group 0 took 0 to 1, all its own"), (STEP, "group 1 took 0 to 1, all its")),
            marks=pytest.mark.slow,
        ),
        (twice, SYNCHRONOUS, ((STEP, "group 0 took 0 to 1, all"), (STEP, "group 1 took 2, 2 instead of 2 to 3"))),
        (a_step_ahead, SYNCHRONOUS, ((STEP, "0 to 1, all"), (STEP, "group 1 took 6 to 7 instead of 2 to 3"))),
        (misplaced, SYNCHRONOUS, ((STEP, "0 to 1, all"), ("step 1 is of samples 4 to 7", "group 1 took 6 to 7, all"))),
        (same_share, APART, ((ROUND, "group 0 took micro-batches 0 to 1"), (ROUND, "group 1 took micro-batches 0 to"))),
    ],
)
def test_a_broken_share_ends_the_run(
    ranks: RankPool, tmp_path: Path, how: Callable[[int], Any], argv: tuple[str, ...], words: Any
) -> None:
    folder = run_of(tmp_path, *argv)
    for told, (which, own) in zip(ranks(2, life, folder, how), words, strict=True):
        assert told.startswith(which)
        assert own in told
    assert complete(folder / "checkpoints") == []


def test_groups_that_share_are_not_disturbed(ranks: RankPool, tmp_path: Path) -> None:
    folder = run_of(tmp_path, *SYNCHRONOUS)
    assert ranks(2, life, folder, right) == [True, True]
    assert list(series(folder)) == [1, 2, 3, 4]
