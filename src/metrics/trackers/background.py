"""Feeds a tracker from a thread of its own, so that training never waits for a slow or hanging service."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """What a tracker implements. Called in its thread only: any method may be slow, hang or raise."""

    name: str

    def open(self) -> None: ...
    def record(self, step: int, values: Mapping[str, float]) -> None: ...
    def image(self, step: int, name: str, path: Path) -> None: ...
    def finish(self, succeeded: bool, /) -> None: ...


class Side:
    """Queue and thread of one tracker. Counts the points that it did not take because it failed, hung or was too
    slow.
    """

    def __init__(self, sink: Sink, queue_points: int) -> None:
        self.sink = sink
        self._points = 0
        self._taken = 0
        self._told = False
        self._queue: queue.Queue[tuple[str, tuple[object, ...]]] = queue.Queue(queue_points)
        self._thread = threading.Thread(target=self._work, name=f"tracker-{sink.name}", daemon=True)
        self._thread.start()

    def put(self, method: str, *arguments: object) -> None:
        """Queue a call of `method` and return at once; where the queue is full, the point is counted as lost."""
        self._points += 1
        try:
            self._queue.put_nowait((method, arguments))
        except queue.Full:
            self._tell("does not keep up")

    def finish(self, succeeded: bool, seconds: float) -> int:
        """Wait at most `seconds` until the queue is empty and the sink is closed. Returns the number of lost points."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Full):  # a sink that hangs on a full queue will not see the end either
            self._queue.put(("finish", (succeeded,)), timeout=seconds)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("tracker %s is not done after %g s: left behind", self.sink.name, seconds)
        lost = self._points - self._taken
        if lost:
            logger.warning("tracker %s lost %d points; metrics.jsonl has them all", self.sink.name, lost)
        return lost

    def _work(self) -> None:
        opened = self._try("open", ())
        while True:
            method, arguments = self._queue.get()
            taken = opened and self._try(method, arguments)
            if method == "finish":
                return
            self._taken += taken

    def _try(self, method: str, arguments: tuple[object, ...]) -> bool:
        try:
            getattr(self.sink, method)(*arguments)
        except Exception as error:  # noqa: BLE001  whatever a tracker raises, it is no reason to stop training
            self._tell(f"failed to {method}: {type(error).__name__}: {error}")
            return False
        return True

    def _tell(self, why: str) -> None:
        if not self._told:
            self._told = True
            logger.warning("tracker %s %s; training goes on, lost points are counted", self.sink.name, why)
