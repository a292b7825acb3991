"""Time limit: requeues the job when a checkpoint save would not finish before SLURM ends it.

At its limit SLURM ends a job as TIMEOUT, and requeues nothing. Shortly before, rank 0 gives the save up: the job is
requeued, and goes on from the newest complete checkpoint, if this attempt has written one.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from src.checkpoint.config import hardly_fits
from src.cluster.diagnosis.verdict import ADVICE, Verdict, newest, settle
from src.cluster.slurm import client
from src.cluster.slurm.scheduler import SlurmScheduler
from src.runs.folder import end
from src.storage.json_lines import METRICS_FILE, Lines

MARGIN_SECONDS = 30.0  # slurmctld looks at time limits every 30 s
POLL_SECONDS = 5.0


def margin(grace_seconds: float) -> float:
    """Of the grace, the seconds before the time limit in which nobody saves any more."""
    return min(MARGIN_SECONDS, grace_seconds / 2)


def slow_saves(folder: Path, grace_seconds: float) -> str | None:
    """A warning when this run's own saves hardly fit into the time between the signal and the end."""
    seconds = [line.get("checkpoint/write_seconds", 0.0) for line in Lines(folder / METRICS_FILE).read()]
    slow = hardly_fits(max(seconds, default=0.0), grace_seconds)
    return None if slow is None else f"{folder}: {slow}"


class Deadline:
    """Watches over the time between a stop signal and the end of the block. For rank 0's main thread."""

    def __init__(self, folder: Path, requeues: int, grace_seconds: float) -> None:
        self._folder, self._requeues = folder, requeues
        self._margin = margin(grace_seconds)
        self._job = SlurmScheduler().own_job()
        self._before = newest(folder)
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self._signals, self._told = os.pipe()
        os.set_blocking(self._told, False)
        # The kernel's handler writes the signal's number, also while the main thread is in the middle of a long write.
        self._outer = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        signal.set_wakeup_fd(self._outer)
        os.close(self._told)

    def _watch(self) -> None:
        """Nothing is asked of SLURM before the signal, and little after it."""
        while True:
            heard = os.read(self._signals, 1)
            if not heard:
                return
            if heard[0] == signal.SIGUSR2:
                break
        left = client.seconds_left(self._job)
        while left is None or left > self._margin:
            pause = POLL_SECONDS if left is None else max(POLL_SECONDS, (left - self._margin) / 2)
            if self._over.wait(pause):
                return
            left = client.seconds_left(self._job)
        if not self._over.is_set():
            self._give_up()

    def _give_up(self) -> None:
        found = newest(self._folder)
        if found is None or found == self._before:
            words = f"{ADVICE['late']}. This attempt has saved nothing, so another one would not come further"
            verdict = settle(self._folder, self._job, Verdict("late", "stop", None, words), self._requeues)
        else:
            words = f"{ADVICE['late']}. The run goes on from {found}"
            verdict = settle(self._folder, self._job, Verdict("late", "requeue", None, words), self._requeues)
        end(self._folder, "killed", verdict.words.partition("\n")[0], overrule=True)
        print(f"verdict: {verdict.words}\n{verdict.action}", file=sys.stderr, flush=True)
        if verdict.action == "requeue":
            SlurmScheduler().requeue(self._job)
