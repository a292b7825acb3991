"""Metrics of a run: always to metrics.jsonl, and to the trackers of the section `tracker`."""

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from src.config.base import Config
from src.config.bounds import Count, SecondsOrNone
from src.metrics.goodput import Meter
from src.metrics.trackers.background import Side, Sink
from src.metrics.trackers.mlflow import MLflow
from src.metrics.trackers.tensorboard import EventFiles
from src.metrics.trackers.trackio import Trackio
from src.metrics.trackers.weights_and_biases import WeightsAndBiases
from src.storage.json_lines import METRICS_FILE, Lines

logger = logging.getLogger(__name__)

Status = Literal["done", "stopped", "failed"]


class Tracker(Config):
    queue_points: Count
    """Points that may wait for one tracker; more are dropped, counted and reported."""
    finish_seconds: SecondsOrNone
    """Longest wait in seconds at the end of a run for the trackers to catch up."""
    wandb: WeightsAndBiases | None
    """Points to Weights & Biases; null: none; tracker=wandb and tracker=all have the keys."""
    tensorboard: EventFiles | None
    """Event files for TensorBoard; null: none; tracker=tensorboard and tracker=all have the keys."""
    trackio: Trackio | None
    """Points to Trackio on this machine; null: none; tracker=trackio has the keys."""
    mlflow: MLflow | None
    """Points to MLflow; null: none; tracker=mlflow has the keys."""

    def open(self, folder: Path, facts: Mapping[str, Any], beside: Iterable[Sink] = ()) -> "Log":
        """The log of one attempt at the run in this folder; `facts` are shown with it. For rank 0 alone. `beside`: what
        else is fed.
        """
        sinks = list(beside)
        if self.wandb is not None:
            sinks.append(self.wandb.sink(folder, facts, self.finish_seconds))
        if self.tensorboard is not None:
            sinks.append(self.tensorboard.sink(folder))
        if self.trackio is not None:
            sinks.append(self.trackio.sink(folder, facts))
        if self.mlflow is not None:
            sinks.append(self.mlflow.sink(folder, facts))
        return Log(folder, (Side(sink, self.queue_points) for sink in sinks), self.finish_seconds)


class Log:
    """Writes metrics.jsonl and feeds the trackers. No method raises; only `finish` waits for trackers, up to
    `finish_seconds`.

    A record of metrics.jsonl holds `step`, `attempt` (1 at a run's first start, one more at each restart) and `time`
    (seconds since 1970), beside its values; lines with `event` mark starts and ends. A line that ends optimizer steps
    also has the goodput so far (goodput.py).
    """

    def __init__(self, folder: Path, sides: Iterable[Side] = (), finish_seconds: float = 0.0) -> None:
        self.folder = folder
        self._lines = Lines(folder / METRICS_FILE)
        self._told = False
        last = self._lines.last()
        self.attempt = 1 if last is None else int(last["attempt"]) + 1
        self._sides = list(sides)
        self._finish_seconds = finish_seconds
        self._step: int | None = None
        self._meter = Meter(folder, self.attempt, self._append({"event": "start"}))

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        line = {name: float(value) for name, value in values.items()}
        now = _now()
        with contextlib.suppress(OSError):  # a disk with a bad day: the account goes on with the next line
            line |= self._meter.metrics({"time": now, "step": step, **line})
        self._record(step, line, now)

    def image(self, step: int, name: str, path: Path) -> None:
        self._append({"event": "image", "step": step, "name": name, "path": str(path)})
        for side in self._sides:
            side.put("image", step, name, path)

    def finish(self, status: Status) -> None:
        now = _now()
        if self._step is not None and (account := self._meter.last(now)):
            self._record(self._step, account, now)
        lost = {side.sink.name: side.finish(status != "failed", self._finish_seconds) for side in self._sides}
        self._append({"event": "finish", "status": status, "lost": lost})

    def _record(self, step: int, values: Mapping[str, float], now: float) -> None:
        self._append({"step": step, **values}, now)
        for side in self._sides:
            side.put("record", step, {"attempt": self.attempt, **values})

    def _append(self, record: Mapping[str, Any], now: float | None = None) -> float:
        """Returns the moment that the line bears."""
        now = _now() if now is None else now
        try:
            self._lines.append({"attempt": self.attempt, "time": now, **record})
        except OSError as error:
            if not self._told:
                self._told = True
                logger.warning("%s cannot be written: %s; training goes on", self._lines.path, error)
        return now


def _now() -> float:
    """Seconds since 1970."""
    return round(time.time(), 3)
