"""Faults of a file system that pass by themselves: waited out, counted, and told where they did not pass."""

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from src.errors import DiskFaultError

T = TypeVar("T")

log = logging.getLogger(__name__)

# What a server that fails over, restarts or is overloaded answers. A full disk, missing rights, a read-only disk and
# a file that is not there are none of it: they stay as they are until a person acts, and nobody waits for them.
FAULTS = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ENOLCK, errno.EREMOTEIO})
_OF_ITS_NETWORK = frozenset(
    {
        *(errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
        *(errno.ECONNABORTED, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN),
    }
)
PASSING = FAULTS | _OF_ITS_NETWORK  # a rank that loses another one meets the latter, too
FIRST_SECONDS = 1.0
LONGEST_SECONDS = 30.0
# Half of what a step may take (600 s): the others still wait when this rank's read has come through.
PATIENCE_SECONDS = 300.0


def passing(error: BaseException) -> OSError | None:
    """The fault behind `error`, however deep, that may be gone a moment later; None for any other error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DiskFaultError):
            return cause
        if isinstance(cause, OSError) and cause.errno in PASSING:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


class Patience:
    """Does something to files again, after 1, 2, 4 ... 30 s, for as long as it fails with what passes.

    `faults` and `seconds` are those of this process so far: failures that were waited out, and the time it took.
    """

    def __init__(
        self,
        seconds: float = PATIENCE_SECONDS,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[str], None] = log.warning,
    ) -> None:
        """`seconds`: of one action, from its first failure on, after which the fault is raised."""
        self._longest, self._sleep, self._clock, self._tell = seconds, sleep, clock, tell
        self.faults, self.seconds = 0, 0.0

    def __call__(self, action: Callable[[], T], where: Path | None = None) -> T:
        """What `action` returns, which may be called several times. DiskFaultError where patience is at its end;
        `where` is named where the system's own error names no file.
        """
        pause: float = FIRST_SECONDS
        began: float | None = None
        while True:
            try:
                return action()
            except Exception as error:
                fault = passing(error)
                if fault is None or isinstance(fault, DiskFaultError):
                    raise
                began = self._clock() if began is None else began
                waited = self._clock() - began
                if waited + pause > self._longest:
                    place = Path(fault.filename) if isinstance(fault.filename, str) else where
                    raise DiskFaultError.at(place, fault.errno or errno.EIO, waited) from error
                self.faults += 1
                self._tell(f"{fault}; tried again in {pause:g} s")
            self._sleep(pause)
            self.seconds += pause
            pause = min(2.0 * pause, LONGEST_SECONDS)
