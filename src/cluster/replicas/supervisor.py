"""Supervises all replica groups of a run on this machine: start, watch, restart, report their ends.

Each group is a process of its own (group.py) with ranks of its own, so that the end of one is nothing to the others.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from src.cluster.backend import AttemptOutcome, Options
from src.cluster.local.signals import FORWARDED, POLL_SECONDS, SAME_SIGNAL_SECONDS, goes_on, record_end, tell
from src.cluster.replicas.lighthouse import Lighthouse
from src.errors import SampleError, UserError
from src.runs.folder import Attempt, RunFolder, attempts

LONGEST_BACKOFF_SECONDS = 300.0
LAST_SAVE_SECONDS = 1800.0
HEALTHY_SECONDS = 600.0  # a life this long forgives the failures before it


@dataclass
class GroupProcess:
    """One of them; `process` is None between two lives, `ended` says why there is no further one."""

    number: int
    folder: Path
    environment: Mapping[str, str]
    process: "subprocess.Popen[bytes] | None" = None
    due: float = 0.0  # time.monotonic() of the next start
    began: float = 0.0
    failures: int = 0  # in a row
    code: int = 0  # of the last life
    ended: str = field(default="")  # finished, stopped or given up


class Groups:
    """Main thread only: it takes the signals over while it runs."""

    def __init__(
        self, folder: RunFolder, options: Options, environments: list[dict[str, str]], world: int, grace_seconds: float
    ) -> None:
        self._folder, self._options, self._world, self._grace_seconds = folder, options, world, grace_seconds
        self._environments = environments
        self._deadline = float("inf")
        self._signal = ""
        self._killed = ""
        self._asked = 0.0  # time.monotonic() of the signal

    def run(self) -> AttemptOutcome:
        """Returns when every group has ended for good."""
        previous = {number: signal.getsignal(number) for number in FORWARDED}
        with Lighthouse(self._options, self._folder) as lighthouse:
            self._folder.begin(self._world * self._options.groups)
            self._groups = [self._group(number, lighthouse.address) for number in range(self._options.groups)]
            for number in FORWARDED:
                if previous[number] != signal.SIG_IGN:
                    signal.signal(number, self._on_signal)
            try:
                while not all(group.ended for group in self._groups):
                    lighthouse.watch()
                    self._look()
                    time.sleep(POLL_SECONDS)
            finally:
                self._end(signal.SIGKILL)
                for number, handler in previous.items():
                    signal.signal(number, handler)
        return self._conclude()

    def _group(self, number: int, lighthouse: str) -> GroupProcess:
        facts = {"REPLICA_GROUP_ID": str(number), "TORCHFT_LIGHTHOUSE": lighthouse}
        quiet = {"RUST_LOG": os.environ.get("RUST_LOG", "error")}
        return GroupProcess(number, self._folder.group(number), self._environments[number] | facts | quiet)

    def _look(self) -> None:
        now = time.monotonic()
        for group in self._groups:
            if group.process is not None and (code := group.process.poll()) is not None:
                self._ended(group, code, now)
            if group.process is None and not group.ended and now >= group.due:
                self._start(group, now)
        finished = any(group.ended == "finished" for group in self._groups)
        if finished and self._deadline == float("inf"):
            self._deadline = now + LAST_SAVE_SECONDS  # the others are at their last step, save, or are too late
        hopes = sum(not group.ended or group.ended == "finished" for group in self._groups)
        if hopes < self._options.min_groups and not finished and not self._signal:
            left = "1 group is left" if hopes == 1 else f"{hopes} groups are left"
            stop = "it stops" if hopes == 1 else "they stop"
            tell(f"{left} and fault_tolerance.min_groups={self._options.min_groups}: {stop}")
            self._on_signal(signal.SIGTERM, None)
        if now >= self._deadline:
            self._killed = self._killed or ("" if finished else f"not saved {self._grace_seconds:g} s after the signal")
            self._end(signal.SIGKILL)

    def _start(self, group: GroupProcess, now: float) -> None:
        options = ("--code", self._folder.code, "--world", str(self._world), "--grace", str(self._grace_seconds))
        command = (
            "-P",
            "-m",
            "src.cluster.replicas.worker",
            str(group.folder),
            *options,
            "--launcher",
            str(os.getpid()),
        )
        # A session of its own: the terminal's Ctrl-C comes here, and is passed on once.
        environment = os.environ | group.environment
        group.process = subprocess.Popen((sys.executable, *command), env=environment, start_new_session=True)
        group.began = now

    def _ended(self, group: GroupProcess, code: int, now: float) -> None:
        group.process, group.code = None, code
        past = attempts(group.folder)
        word = past[-1].ended if past else None
        if code == 0 and word in ("finished", "stopped"):
            group.ended = word
            if word == "stopped" and not self._signal:
                tell(f"group {group.number}: it was stopped alone and is not started again; the others go on")
            return
        group.failures = 1 if now - group.began > HEALTHY_SECONDS else group.failures + 1
        why = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
        if self._signal or any(other.ended == "finished" for other in self._groups):
            group.ended = "stopped"
        elif code == UserError.exit_code or _took_others_samples(past) or group.failures > self._options.restarts:
            group.ended = "given up"
            tell(f"group {group.number}: {why}; it stays away")
        else:
            first = self._options.backoff_seconds
            wait = min(first * 2 ** (group.failures - 1), max(first, LONGEST_BACKOFF_SECONDS))
            group.due = now + wait
            tell(
                f"group {group.number}: {why}; starts again in {wait:g} s "
                f"(restart {group.failures} of {self._options.restarts})"
            )

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            if time.monotonic() - self._asked < SAME_SIGNAL_SECONDS:
                return
            self._killed = "Ctrl-C twice"
            self._deadline = time.monotonic()
        elif not self._signal:
            self._signal, self._asked = signal.Signals(number).name, time.monotonic()
            # A group ends its own ranks by then; this is for groups.
            self._deadline = time.monotonic() + self._grace_seconds + 5.0
            self._end(FORWARDED[signal.Signals(number)])
            for group in self._groups:
                if group.process is None and not group.ended:
                    group.ended = "stopped"

    def _end(self, number: int) -> None:
        for group in self._groups:
            if group.process is not None and group.process.poll() is None:
                group.process.send_signal(number)

    def _conclude(self) -> AttemptOutcome:
        """Of the run: finished if a group has finished it, stopped if one has saved, else as the first failure was."""
        words = {group.ended for group in self._groups}
        path = self._folder.path
        if "finished" in words:
            record_end(path, "finished", "")
            return AttemptOutcome("finished", 0)
        if self._killed:
            tell(f"killed ({self._killed}); {goes_on(path)}")
            record_end(path, "killed", self._killed)
            return AttemptOutcome("killed", 130 if self._killed == "Ctrl-C twice" else 137)
        failed = [group for group in self._groups if group.ended == "given up"]
        if failed:
            record_end(path, "failed", f"group {failed[0].number}: exit code {failed[0].code}")
            code = failed[0].code
            return AttemptOutcome("failed", 128 - code if code < 0 else code or 1)
        tell(f"stopped{f' by {self._signal}' if self._signal else ''}; {goes_on(path)}")
        record_end(path, "stopped", self._signal)
        return AttemptOutcome("stopped", 0)


def _took_others_samples(past: Sequence[Attempt]) -> bool:
    """Whether the newest attempt ended with an error that each further one would end with."""
    return bool(past) and f": {SampleError.__name__}: " in past[-1].detail
