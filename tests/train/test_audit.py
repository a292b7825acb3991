"""A run whose ranks do not take the samples of each step, each once, ends at the first such step, and says why."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from src.checkpoint.folder import complete
from src.data.batches import Batch, Batches
from src.distributed.collectives import limbs, of_limbs
from src.errors import SampleError
from src.tasks.pretrain import rank as pretrain
from src.train import audit
from src.train.audit import spans
from src.train.resume import resume
from src.train.step.stepper import Stepper
from tests.end_to_end.lives import TINY, Shot, live, opened, series
from tests.ranks import RankPool


def on_rank_one() -> bool:
    return os.environ["RANK"] == "1"


@contextmanager
def same_share() -> Iterator[None]:
    """All data ranks take the samples of the first."""
    with patch.object(pretrain, "Batches", lambda *args, **options: Batches(*args, **options | {"rank": 0})):
        yield


@contextmanager
def twice() -> Iterator[None]:
    """A rank takes a sample twice, and another one not at all."""
    step = Batches.step

    def broken(batches: Batches, *args: Any) -> list[Batch]:
        made = step(batches, *args)
        return [made[0]] * len(made) if on_rank_one() else made

    with patch.object(Batches, "step", broken):
        yield


@contextmanager
def a_step_ahead() -> Iterator[None]:
    """All ranks are one step further in the data than in the run."""
    prefetch = Batches.prefetch
    shifted = lambda batches, position, steps: prefetch(batches, position + batches.global_batch, steps)  # noqa: E731
    with patch.object(Batches, "prefetch", shifted):
        yield


@contextmanager
def misplaced() -> Iterator[None]:
    """A rank resumes at another position than the rest."""

    def broken(state: Any, *args: Any) -> str:
        told = resume(state, *args)
        state.position += 4 * on_rank_one()
        return told

    with patch.object(pretrain, "resume", broken):
        yield


@contextmanager
def another_twin() -> Iterator[None]:
    """Of two ranks that share a sample, one takes the next."""
    batch = Batches._batch
    other = lambda batches, split, samples: batch(batches, split, samples + on_rank_one())  # noqa: E731
    with patch.object(Batches, "_batch", other):
        yield


def broken_life(folder: Path, how: Callable[[], Any]) -> str | bool | tuple[str, ...]:
    with how(), patch.object(audit, "BLAMELESS_SECONDS", 0.0):
        try:
            return live(folder)
        except SampleError as error:
            return str(error)


def run_of(tmp_path: Path, layout: str, *argv: str) -> Path:
    quick = ("data=synthetic", "data.documents=100", "task.steps=4", "checkpoint.every=2", f"root={tmp_path}")
    return opened(*TINY, *quick, f"parallel={layout}", *argv)


# Two data ranks, two micro-batches of one sample each: rank 0 has samples 0 and 2 of a step's four, rank 1 has 1 and 3.
@pytest.mark.parametrize(
    ("how", "layout", "words"),
    [
        (same_share, "ddp2", ("data rank 0 took 0, 2, all its own", "data rank 1 took 0, 2 instead of 1, 3")),
        (twice, "fsdp2", ("data rank 0 took 0, 2, all its own", "data rank 1 took 1, 1 instead of 1, 3")),
        (a_step_ahead, "fsdp2", ("data rank 0 took 4, 6 instead of 0, 2", "data rank 1 took 5, 7 instead of 1, 3")),
        (
            another_twin,
            "tp2",
            ("data rank 0 took 0 to 3, all its own", "data rank 0 took 1 to 4 instead of 0 to 3"),
        ),
    ],
)
def test_a_broken_share_ends_the_run_at_its_first_step(
    ranks: RankPool, tmp_path: Path, how: Callable[[], Any], layout: str, words: Sequence[str]
) -> None:
    folder = run_of(tmp_path, layout)
    told = ranks(2, broken_life, folder, how)
    for each, own in zip(told, words, strict=True):
        assert each.startswith("step 1 is of samples 0 to 3, checksum ")
        assert own in each
    assert (complete(folder / "checkpoints"), series(folder)) == ([], {})  # nothing of it is kept


def test_a_rank_that_resumes_elsewhere_ends_the_run(ranks: RankPool, tmp_path: Path) -> None:
    folder = run_of(tmp_path, "fsdp2")
    assert ranks(2, live, folder, Shot("step", at=1)) == [False, False]
    told = ranks(2, broken_life, folder, misplaced)
    assert told[0].startswith("step 3 is of samples 8 to 11, checksum ")
    assert told[1].startswith("step 3 is of samples 12 to 15, checksum ")
    assert [each.name for each in complete(folder / "checkpoints")] == ["step_00000002"]
    assert ranks(2, live, folder) == [True, True]


def reductions(folder: Path) -> list[tuple[str, int]]:
    """All-reduces of a rank's steps: dtype and elements."""
    found, compute, reduce = list[tuple[str, int]](), Stepper.__call__, dist.all_reduce

    def step(*args: Any, **options: Any) -> Any:
        with patch.object(dist, "all_reduce", counted):
            return compute(*args, **options)

    def counted(values: Any, *args: Any, **options: Any) -> Any:
        found.append((str(values.dtype), values.numel()))
        return reduce(values, *args, **options)

    with patch.object(Stepper, "__call__", step):
        assert live(folder) is True
    return found


@pytest.mark.parametrize("layout", ["fsdp2", "cp2", "pp2"])
def test_a_right_run_is_audited_without_a_collective_more(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    """The checksum's two limbs beside the tokens; loss, norm and votes to stop."""
    for found in ranks(2, reductions, run_of(tmp_path, layout, "task.steps=2")):
        assert found == [("torch.float64", 3), ("torch.float32", 3)] * 2


def test_limbs_are_exact() -> None:
    values = [2**64 - 1, 2**63 + 12345, 0, 2**32, 2**32 - 1] * 1000
    low, high = (sum(each) for each in zip(*map(limbs, values), strict=True))
    assert of_limbs(low, high) == sum(values) % 2**64
    most = 2**21 * (2**32 - 1)  # of all ranks
    assert most < 2**53
    assert of_limbs(float(most), float(most)) == 2**21 * (2**64 - 1) % 2**64


def test_spans() -> None:
    assert spans([3, 5, 6, 7, 9, 9, 1, 30]) == "3, 5 to 7, 9, 9 and 2 more"
    assert spans(range(4)) == "0 to 3"
