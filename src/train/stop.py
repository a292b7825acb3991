"""Graceful stop: signal handlers set a flag; the loop agrees on it over all ranks, saves a checkpoint and ends."""

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

# INT: a person. TERM: preemption, a shutdown. USR2: a scheduler, some minutes before the time limit (NCCL may take
# USR1).
SAME_SIGNAL_SECONDS = 1.0  # one Ctrl-C may come through the terminal and through a launcher
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None


class Stop:
    """Remembers the first signal in `.seen`; a SIGINT a second or more after that raises KeyboardInterrupt at once.

    A handler runs on one rank only and between any two bytecodes, so it must not save and must not join a collective:
    ranks first agree (`any_rank(stop.seen is not None)`), then all of them save. Main thread only.
    """

    def __init__(self) -> None:
        self.seen: str | None = None
        self._when = 0.0  # time.monotonic() of it
        self._previous: dict[int, Handler] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: set by C code, which Python cannot put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.seen is None:
            self.seen, self._when = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._when >= SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt
