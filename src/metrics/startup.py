"""Seconds of each stage from the start of the process to the end of the first step."""

import os
import time
from collections.abc import Callable
from pathlib import Path


class Startup:
    """A waterfall: each stage runs from the end of the one before it; the first from the start of the process.

    The loop's stages are import, init, load, compile and first_step.
    """

    def __init__(self, started: float | None = None, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._last = process_started() if started is None else started
        self.seconds: dict[str, float] = {}

    def done(self, stage: str, **parts: float) -> None:
        """`parts` are stages of their own that went on inside this one, in seconds; it keeps the rest."""
        now = self._clock()
        self.seconds |= parts | {stage: now - self._last - sum(parts.values())}
        self._last = now

    def metrics(self) -> dict[str, float]:
        """The stages and their sum, for the log."""
        values = {f"startup/{stage}_seconds": seconds for stage, seconds in self.seconds.items()}
        return values | {"startup/total_seconds": sum(self.seconds.values())}


def process_started() -> float:
    """Seconds since 1970 at which this process began; where the kernel does not tell, now."""
    status = Path("/proc/self/stat")
    if not status.exists():
        return time.time()
    # Field 22 is the start in clock ticks since boot; the name in field 2 may hold spaces but ends with ")".
    ticks = int(status.read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
