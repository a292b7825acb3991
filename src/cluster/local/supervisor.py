"""Supervises the rank processes of one attempt on this machine.

Starts them, forwards signals, collects exit codes, reports the first failure and ends the others after it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from src.cluster.diagnosis import hang
from src.cluster.local.signals import FORWARDED, POLL_SECONDS, SAME_SIGNAL_SECONDS, tell
from src.cluster.rank import RankJob
from src.distributed.process.flight_recorder import TRACES
from src.distributed.process.rank_context import host_store
from src.errors import DiskFullError, UserError
from src.runs.folder import Attempt, log_folder
from src.storage.space import no_room

# A failed rank's companions fail in a moment or wait for it for ever; in this time they write down which.
ABANDON_SECONDS = 5.0
_LAST_LINES = 20
# Errors whose text is all that there is to say; of any other the traceback is shown.
_FOR_THE_USER = {UserError.__name__, *(kind.__name__ for kind in UserError.__subclasses__())}
_NANOSECONDS = 10**9


@dataclass(frozen=True)
class FirstFailure:
    """The first rank that failed; `exit_code` is a shell's (128 + signal)."""

    rank: int
    exit_code: int
    error: str  # one line
    text: str  # what a person reads: problems, traceback or the last lines of the log
    log: Path


class RankSupervisor:
    """The ranks of one attempt on this machine. Main thread only: it takes the signals over while it runs."""

    def __init__(self, job: RankJob, attempt: Attempt, environment: Mapping[str, str], grace_seconds: float) -> None:
        self.signal: str | None = None  # the first one seen
        self.sent = 0  # what the ranks got for it
        self.killed: str = ""  # why, if the ranks were ended by force
        self._attempt = attempt
        self._grace_seconds = grace_seconds
        self._began = time.time()
        self._asked = 0.0  # time.monotonic() of the first signal
        self._deadline = float("inf")
        self._logs = log_folder(job.folder, attempt.number)
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._noticed: dict[int, int] = {}  # rank -> time_ns of its failure
        self._abandoned: set[int] = set()
        self._killed_before = killed_for_memory()
        self._job = job
        self._environment = dict(environment)

    def run(self) -> FirstFailure | None:
        """Start the ranks and wait until every one has ended; None when all exit codes are 0."""
        world = self._attempt.world
        previous = {number: signal.getsignal(number) for number in FORWARDED}
        listener = socket.create_server(("127.0.0.1", 0), backlog=world) if world > 1 else None
        try:
            self._start(0 if listener is None else listener.getsockname()[1])
            for number in FORWARDED:
                if previous[number] != signal.SIG_IGN:  # nohup, or a script's background job: meant not to hear it
                    signal.signal(number, self._on_signal)
            # The ranks' rendezvous, alive until the last of them has ended. Torch is imported while they import it.
            store = None if listener is None else host_store(listener)
            self._watch()
            del store
        finally:
            self._kill()
            if self._abandoned and os.isatty(1):
                os.write(1, b"\x1b[?25h\n")  # a killed progress line leaves the cursor hidden
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._failure()

    def _start(self, port: int) -> None:
        """Each in a session of its own: the terminal's Ctrl-C comes here, and is passed on once."""
        world = self._attempt.world
        assert self._job.code is not None, "local ranks run the frozen code"
        options = ("--code", self._job.code, "--attempt", str(self._attempt.number), "--launcher", str(os.getpid()))
        command = (sys.executable, "-P", "-m", "src.cluster.rank", str(self._job.folder), *options)
        for rank in range(world):
            facts = _facts(rank, world, port) | {"TORCHELASTIC_ERROR_FILE": str(self._error_file(rank))}
            environment = os.environ | self._environment | facts
            self._ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))

    def _error_file(self, rank: int) -> Path:
        """Where torch's `record` writes a rank's error."""
        return self._logs / f"rank_{rank}.error.json"

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.signal is None:
            self.signal, self.sent = name, FORWARDED[signal.Signals(number)]
            self._asked = time.monotonic()
            self._deadline = self._asked + self._grace_seconds
            tell(
                f"\n{name}: the ranks save and stop (at most {self._grace_seconds:g} s); Ctrl-C again ends them at once"
            )
            for rank, process in enumerate(self._ranks):
                if rank not in self._noticed and process.poll() is None:
                    process.send_signal(self.sent)
        elif number == signal.SIGINT and time.monotonic() - self._asked >= SAME_SIGNAL_SECONDS:
            self.killed = "Ctrl-C twice"
            self._deadline = time.monotonic()

    def _watch(self) -> None:
        abandon = float("inf")
        while True:
            codes = {rank: each.poll() for rank, each in enumerate(self._ranks)}
            if all(code is not None for code in codes.values()):
                return
            for rank, code in codes.items():
                if code not in (None, 0) and rank not in self._noticed:
                    self._noticed[rank] = time.time_ns()
                    abandon = min(abandon, time.monotonic() + ABANDON_SECONDS)
            now = time.monotonic()
            if now >= self._deadline:
                self.killed = self.killed or f"not saved {self._grace_seconds:g} s after {self.signal}"
            if now >= min(self._deadline, abandon):
                return
            time.sleep(POLL_SECONDS)

    def _kill(self) -> None:
        for rank, each in enumerate(self._ranks):
            if each.poll() is None:
                self._abandoned.add(rank)
                os.killpg(each.pid, signal.SIGKILL)  # its data workers too
        for each in self._ranks:
            each.wait()

    def _failure(self) -> FirstFailure | None:
        codes = {rank: each.returncode for rank, each in enumerate(self._ranks)}
        failed = [rank for rank, code in codes.items() if code != 0 and rank not in self._abandoned]
        if not failed:
            return None
        rank = min(failed, key=self._when)
        told, found = self._describe(rank, codes[rank]), None
        with suppress(OSError):  # a folder that is gone must not hide the error
            found = hang.find(self._job.folder / TRACES, self._began, [self._attempt.host] * self._attempt.world)
        return told if found is None else replace(told, text=f"{told.text}\n\n{found.words}")

    def _when(self, rank: int) -> int:
        """Nanoseconds: when it wrote its error; a rank that could not write one died before the others noticed."""
        try:
            return self._error_file(rank).stat().st_mtime_ns
        except OSError:
            return self._noticed.get(rank, time.time_ns()) - _NANOSECONDS

    def _describe(self, rank: int, code: int) -> FirstFailure:
        log = self._logs / f"rank_{rank}.log"
        if code < 0:
            name = signal.Signals(-code).name
            killer = killed_for_memory() > self._killed_before if code == -signal.SIGKILL else False
            error = f"ended by {name}" + (" (the system's out-of-memory killer)" if killer else "")
            return FirstFailure(rank, 128 - code, error, _tail(log), log)
        try:
            message = json.loads(self._error_file(rank).read_text())["message"]
            error, stack = message["message"], message["extraInfo"]["py_callstack"]
        except (OSError, ValueError, LookupError, TypeError):
            if code == DiskFullError.exit_code:  # it found no room for its error either
                full = no_room(self._logs)
                return FirstFailure(rank, code, f"DiskFullError: {full}", str(full), log)
            return FirstFailure(rank, code, f"ended with exit code {code}", _tail(log), log)
        if error.partition(":")[0] in _FOR_THE_USER:
            return FirstFailure(rank, code, error.partition("\n")[0], error.partition(": ")[2], log)
        return FirstFailure(rank, code, error.partition("\n")[0], stack.rstrip(), log)


def _facts(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # the launcher hosts the store, so that rank 0 joins it as a client like the others
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def killed_for_memory() -> int:
    """How many processes the kernel of this machine has ended since its start for want of memory; 0 where it does not
    count them.
    """
    with suppress(OSError, ValueError):
        counts = dict(line.split(maxsplit=1) for line in Path("/proc/vmstat").read_text().splitlines())
        return int(counts.get("oom_kill", 0))
    return 0


def _tail(log: Path) -> str:
    """Its last lines, marked as such: most have been on the screen before."""
    try:
        last = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    except OSError:
        last = []
    if not last:
        return "(it wrote nothing)"
    return "\n".join(("the last lines of its log:", *(f"  | {line}" for line in last)))
