"""What the pool of workers says of ranks that fail."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.ranks import CrashError, RankError, Ranks


@pytest.fixture
def pool() -> Iterator[Ranks]:
    """Not the one that all tests share, which forgives one crash only."""
    ranks = Ranks()
    yield ranks
    ranks.close()


def crash(folder: Path, times: int) -> int:
    """Rank 1 crashes that many times; then, how often it was tried."""
    rank = int(os.environ["RANK"])
    dist.barrier()  # or rank 0 may have left while rank 1 still connects to it
    tried = len(list(folder.iterdir()))
    if rank == 1 and tried < times:
        (folder / str(tried)).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return tried


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def refuse() -> None:
    raise ValueError("the weights are bad")


def test_one_crash_is_a_warning_and_the_second_an_error(
    pool: Ranks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="rank 1 died of SIGSEGV in crash; run again in new workers"):
        assert pool(2, crash, tmp_path, 1)[1] == 1
    assert "in crash" in capfd.readouterr().err  # the stack of the rank
    with pytest.raises(CrashError, match="rank 1 died of SIGSEGV in crash"):
        pool(2, crash, tmp_path, 2)


def test_other_ends_are_errors_at_once(pool: Ranks) -> None:
    with pytest.raises(RankError, match="rank 0 died of SIGKILL in die"):
        pool(1, die, signal.SIGKILL)
    with pytest.raises(RankError, match=r"(?s)rank 0 of 1 in refuse:.*ValueError: the weights are bad"):
        pool(1, refuse)
