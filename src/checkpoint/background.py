"""Work beside the steps: a thread that a crash does not wait for, and whose own failure is not lost."""

import threading
from collections.abc import Callable


class BackgroundTask:
    """Runs one function at a time in a daemon thread. What it raises, the next `finish` raises in the calling
    thread.
    """

    def __init__(self, name: str) -> None:
        self.name = name  # of the thread
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Run `work` in the thread. `finish` must have been called since the last start."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001  (whatever it is, the training thread raises it)
                self._failure = error

        # A daemon: when training crashes, the process must not wait for ranks that will never answer.
        self._thread = threading.Thread(target=run, name=self.name, daemon=True)
        self._thread.start()

    @property
    def failure(self) -> Exception | None:
        """What the next `finish` raises, as far as it is known by now."""
        return self._failure

    def busy(self, seconds: float) -> bool:
        """Whether the function still runs when so many seconds have been waited for it."""
        if self._thread is None:
            return False
        self._thread.join(seconds)
        return self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the running function, if any, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
