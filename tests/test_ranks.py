"""What the pool of workers says of ranks that fail."""

import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests import ranks
from tests.ranks import CrashError, RankError, RankPool


@pytest.fixture
def pool() -> Iterator[RankPool]:
    """Not the one that all tests share, which forgives one crash only."""
    pool = RankPool()
    yield pool
    pool.close()


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
    pool: RankPool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="rank 1 died of SIGSEGV in crash; run again in new workers"):
        assert pool(2, crash, tmp_path, 1)[1] == 1
    assert "in crash" in capfd.readouterr().err  # the stack of the rank
    with pytest.raises(CrashError, match="rank 1 died of SIGSEGV in crash"):
        pool(2, crash, tmp_path, 2)


def test_other_ends_are_errors_at_once(pool: RankPool) -> None:
    with pytest.raises(RankError, match="rank 0 died of SIGKILL in die"):
        pool(1, die, signal.SIGKILL)
    with pytest.raises(RankError, match=r"(?s)rank 0 of 1 in refuse:.*ValueError: the weights are bad"):
        pool(1, refuse)


def process() -> int:
    return os.getpid()


def test_a_worker_that_died_between_two_calls_is_replaced(pool: RankPool) -> None:
    before = pool(2, process)
    os.kill(before[1], signal.SIGKILL)
    pool._workers[1][0].join()
    with pytest.warns(UserWarning, match="workers died of SIGKILL between two calls; all are replaced"):
        after = pool(2, process)
    assert not set(before) & set(after)


def test_a_pipe_that_breaks_as_work_is_sent_costs_no_call(pool: RankPool) -> None:
    """Its worker lives, as far as anyone can see, and rank 0 has its work already."""
    before = pool(2, process)
    here, there = pool._context.Pipe()
    there.close()
    pool._workers[1] = (pool._workers[1][0], here)
    assert not set(before) & set(pool(2, process))


class Twice(Connection):
    """Sends all twice: a worker that ends after the first leaves data unread, which resets its connection."""

    def send(self, obj: Any) -> None:
        super().send(obj)
        super().send(obj)


def test_a_connection_that_is_reset_is_a_death_and_fails_one_call(pool: RankPool) -> None:
    pool(1, process)
    worker, pipe = pool._workers[0]
    pool._workers[0] = (worker, Twice(os.dup(pipe.fileno())))
    pipe.close()
    with pytest.raises(RankError, match="rank 0 died of SIGKILL in die"):
        pool(1, die, signal.SIGKILL)
    assert len(pool(1, process)) == 1


def die_later() -> None:
    ranks._forget = lambda: os.kill(os.getpid(), signal.SIGKILL)  # the last thing that clean-up calls


def test_a_death_in_clean_up_fails_the_call_that_it_cleans_up_after(pool: RankPool) -> None:
    with pytest.raises(RankError, match="rank 0 died of SIGKILL in the clean-up after die_later"):
        pool(1, die_later)
    assert len(pool(1, process)) == 1


def meeting() -> str:
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return str(store.path)


def test_the_folder_of_stores_lives_as_long_as_the_workers(pool: RankPool) -> None:
    """A store's destructor looks for its file and then opens it: gone in between, it aborts. It may run calls later."""
    (first,), (second,) = pool(1, meeting), pool(1, meeting)
    folder = Path(first).parent
    assert first != second
    assert Path(second).parent == folder
    assert folder.is_dir()
    pool.close()
    assert not folder.exists()
