"""How a job that has saved is handed back to SLURM: nothing that nobody has requeued may end as a success."""

import errno
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from src.cluster.backend import JobStart
from src.cluster.local.side_by_side import SAVED
from src.cluster.slurm import packing, payload
from src.cluster.slurm.packing import PackedJob
from src.cluster.slurm.payload import QueuedJob
from src.cluster.slurm.scheduler import SlurmScheduler
from src.distributed.process.rank_context import LauncherEnv
from src.errors import UserError
from src.storage.patience import Patience

START = JobStart("7", 0, ("n1", "n2"))


class Left(BaseException):
    """Stands for the end of the process, with its code."""


@pytest.fixture(autouse=True)
def _inside_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(SlurmScheduler, "current_start", lambda _: START)
    monkeypatch.setattr(payload, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(packing, "_LOOK_SECONDS", 0.01)


@pytest.fixture
def handled() -> Iterator[Callable[[Callable[..., None]], None]]:
    """Sets the handler that submitit would have set."""
    before = signal.getsignal(signal.SIGUSR2)
    yield lambda handler: signal.signal(signal.SIGUSR2, handler)  # type: ignore[func-returns-value]
    signal.signal(signal.SIGUSR2, before)


def says(monkeypatch: pytest.MonkeyPatch, *ending: bool) -> None:
    """SLURM's answers on whether it is ending the job."""
    answers = iter(ending)
    monkeypatch.setattr(SlurmScheduler, "is_ending", lambda *_: next(answers))


def code(folder: Path, rank: int) -> int:
    job = QueuedJob(folder, "code", 2, folder, "cpu", 1.0)
    with pytest.raises(Left) as left:
        job._hand_over(LauncherEnv(rank, 2, rank, 2))
    (found,) = left.value.args
    assert isinstance(found, int)
    return found


def requeued(*_: Any) -> None:
    raise SystemExit(-1)  # as submitit's handler ends


def silent(*_: Any) -> None:
    raise subprocess.CalledProcessError(1, "scontrol")


def test_a_job_that_nobody_ends_is_requeued_and_all_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handled: Callable[[Callable[..., None]], None]
) -> None:
    handled(requeued)
    says(monkeypatch, False)
    assert code(tmp_path, rank=0) == 0
    assert code(tmp_path, rank=1) == 0, "rank 0 has let the others go"


def test_a_job_that_slurm_is_said_to_end_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handled: Callable[[Callable[..., None]], None]
) -> None:
    """It may change its mind: whoever wanted the nodes has gone. Then the batch script looks again, and requeues."""
    handled(requeued)
    says(monkeypatch, True)
    assert code(tmp_path, rank=0) == SAVED != 0
    assert code(tmp_path, rank=1) == 0


def test_a_requeue_that_fails_is_left_to_the_batch_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handled: Callable[[Callable[..., None]], None]
) -> None:
    handled(silent)
    says(monkeypatch, False)
    assert code(tmp_path, rank=0) == SAVED


def test_one_that_may_not_come_again_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handled: Callable[[Callable[..., None]], None]
) -> None:
    from submitit.core.utils import UncompletedJobError

    def never(*_: Any) -> None:
        raise UncompletedJobError("Job not requeued because: timed-out too many times.")

    handled(never)
    says(monkeypatch, False)
    with pytest.raises(UserError, match=r"saved, and Job not requeued .* or raise cluster\.requeues"):
        QueuedJob(tmp_path, "code", 2, tmp_path, "cpu", 1.0)._hand_over(LauncherEnv(0, 1, 0, 1))


def test_a_shared_node_is_requeued_once_slurm_no_longer_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of holding the node for an hour."""
    says(monkeypatch, True, True, False)
    with pytest.raises(Left) as left:
        PackedJob._go_on_later(requeued)
    assert left.value.args == (0,)


def test_a_rank_reads_the_config_once_and_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, tree, faults = list[Any](), {"name": "a"}, [OSError(errno.ESTALE, "Stale file handle")]

    def read(_path: Path) -> dict[str, Any]:
        given.append("read")
        if faults:
            raise faults.pop()
        return tree

    monkeypatch.setattr("src.config.tree.read", read)
    monkeypatch.setattr(payload, "Patience", lambda: Patience(sleep=lambda _: None))
    for name in ("_assert_frozen", "_kernels", "introduce"):
        monkeypatch.setattr(payload, name, lambda *_: None)
    monkeypatch.setattr("src.distributed.process.preflight.preflight", lambda *_, **_named: [])
    monkeypatch.setattr(payload, "run_rank", lambda _, config: bool(given.append(config)))
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", "20000")
    job = QueuedJob(tmp_path, "code", 2, tmp_path, "cpu", 1.0)
    assert not job._live(LauncherEnv(1, 2, 1, 2), ["n1"])
    assert given == ["read", "read", tree]
