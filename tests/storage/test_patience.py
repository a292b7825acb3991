"""Faults that pass are waited out and counted; those that need a person are raised at once."""

import errno
import os
from pathlib import Path

import pytest

from src.errors import DiskFaultError
from src.storage.patience import Patience, passing


class Clock:
    """Time that passes only in sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def patience(self, seconds: float = 300.0) -> Patience:
        return Patience(seconds, sleep=self.sleep, clock=lambda: self.now)


def failing(times: int, number: int) -> list[OSError | str]:
    return [OSError(number, os.strerror(number), "/shared/file") for _ in range(times)] + ["done"]


def next_of(answers: list[OSError | str]) -> str:
    answer = answers.pop(0)
    if isinstance(answer, OSError):
        raise answer
    return answer


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT])
def test_a_fault_that_passes_is_waited_out_and_counted(number: int) -> None:
    clock = Clock()
    patience, answers = clock.patience(), failing(7, number)
    assert patience(lambda: next_of(answers)) == "done"
    assert clock.pauses == [1, 2, 4, 8, 16, 30, 30]
    assert (patience.faults, patience.seconds) == (7, 91.0)


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EMFILE, errno.EISDIR]
)
def test_what_needs_a_person_is_raised_at_once(number: int) -> None:
    clock = Clock()
    patience, answers = clock.patience(), failing(1, number)
    with pytest.raises(OSError, match="/shared/file") as told:
        patience(lambda: next_of(answers))
    assert (told.value.errno, clock.pauses, patience.faults) == (number, [], 0)


def test_patience_ends_and_says_what_it_waited_for() -> None:
    clock = Clock()
    patience, answers = clock.patience(60.0), failing(99, errno.EIO)
    with pytest.raises(DiskFaultError) as told:
        patience(lambda: next_of(answers), Path("/elsewhere"))
    assert str(told.value) == "/shared/file: input/output error, still after 31 s of trying again"
    assert (told.value.errno, told.value.exit_code, patience.faults) == (errno.EIO, 75, 5)
    with pytest.raises(DiskFaultError):
        clock.patience()(lambda: next_of([told.value]))
    assert len(clock.pauses) == 5, "nobody waits for it a second time"


def test_a_fault_is_found_behind_a_librarys_own_words() -> None:
    told = RuntimeError("unexpected pos 64 vs 0")
    told.__context__ = cause = OSError(errno.ESTALE, "Stale file handle")
    assert passing(told) is cause
    assert passing(RuntimeError("unexpected pos 64 vs 0")) is None
