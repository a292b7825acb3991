"""Tells of stalls and spikes of a run that trains: fed by rank 0 as a tracker is, from a thread of its own."""

import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median, pstdev

from src.metrics.alerts.config import Alerts, Event
from src.metrics.alerts.send import tell

WINDOW = 50  # lines of metrics
FEWEST = 10  # from which on a mean says something
POLL_SECONDS = 1.0


class AlertSink:
    """A tracker's sink (src/metrics/trackers/background.py) that keeps nothing and watches the clock."""

    name = "alert"

    def __init__(self, folder: Path, options: Alerts) -> None:
        self._folder, self._options = folder, options
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._intervals: deque[float] = deque(maxlen=WINDOW)
        self._last: float | None = None  # time.monotonic() of the last line that ends steps
        self._ended = threading.Event()

    def open(self) -> None:
        threading.Thread(target=self._watch, name="alert-stall", daemon=True).start()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """A line that ends steps moves the clock; its loss may be a spike."""
        if "step_seconds" in values:
            now = time.monotonic()
            if self._last is not None:
                self._intervals.append(now - self._last)
            self._last = now
        if (loss := values.get("loss")) is not None:
            if (words := self.spike(loss)) is not None:
                self._tell("spike", f"step {step}: {words}")
            self._losses.append(loss)

    def spike(self, loss: float) -> str | None:
        """What is strange about a loss, held against those before it."""
        known = [each for each in self._losses if math.isfinite(each)]
        if len(known) < FEWEST or not math.isfinite(loss):
            return None  # a loss that is not finite is skipped or ends the run, and then that is told
        mean, deviation = fmean(known), max(pstdev(known), 1e-3 * abs(fmean(known)))
        away = (loss - mean) / deviation if deviation else 0.0
        if away <= self._options.spike_deviations:
            return None
        return f"loss {loss:.4f}, {away:.1f} standard deviations above the mean {mean:.4f} of {len(known)} lines"

    def stall(self, now: float) -> str | None:
        """What is strange about the time since the last step; `now`: time.monotonic()."""
        if self._last is None or not self._intervals:
            return None
        silent, usual = now - self._last, median(self._intervals)
        if silent <= max(self._options.stall_seconds, self._options.stall_factor * usual):
            return None
        return f"no step for {silent:.0f} s, where {usual:.1f} s are usual"

    def image(self, step: int, name: str, path: Path) -> None:
        """Nothing."""

    def finish(self, _succeeded: bool, /) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            if (words := self.stall(time.monotonic())) is not None:
                self._tell("stalled", words)
                return  # once for each attempt

    def _tell(self, event: Event, words: str) -> None:
        tell(self._folder, self._options, event, words)
