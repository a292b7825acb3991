"""Runs side by side on one machine, each with its own GPUs, cores, folder and exit code.

`python -m src.cluster.local.side_by_side <folder> ...` starts one of them: ranks of this machine, as cluster=local
does.
"""

from src.entry import begin

if __name__ == "__main__":
    begin()

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from src.cluster.batch_system import batch_system
from src.cluster.local.board import Board
from src.cluster.local.config import Local
from src.metrics.alerts.send import options_of, tell_end
from src.planning.time.site import NO_FACTS
from src.runs.folder import RunFolder, attempts, log_folder
from src.runs.frozen_code import importing
from src.runs.records import CANCEL_FILE
from src.storage.atomic_write import atomic_write

SHARE_FILE = "pack.json"  # what the newest attempt was given
SAVED = 75  # what sendmail calls a temporary failure: the run has saved and stopped, and goes on later
POLL_SECONDS = 0.5
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
SAME_STOP_SECONDS = 1.0  # a Ctrl-C that arrives twice within it is one


@dataclass(frozen=True)
class PackedRun:
    """One run of a pack."""

    folder: Path
    code: str  # hash8 of the snapshot
    world: int
    host_bytes: int = 0  # memory that its ranks take of the machine's, as planned; 0: of GPUs alone


@dataclass(frozen=True)
class Node:
    """What a pack may hand out."""

    gpus: tuple[str, ...]  # names as CUDA_VISIBLE_DEVICES has them
    cores: tuple[int, ...]
    cpu: bool  # ranks compute on the CPU; GPUs are only counted
    grace_seconds: float
    host_bytes: int | None = None  # memory that the runs may take together; None: nobody counts
    most: int | None = None  # runs at once; None: as many as fit

    @classmethod
    def here(cls, gpus: int, *, cpu: bool, grace_seconds: float) -> "Node":
        """This machine's, as the scheduler has limited it."""
        named = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
        names = named if len(named) >= gpus else [str(index) for index in range(gpus)]
        return cls(tuple(names[:gpus]), tuple(sorted(os.sched_getaffinity(0))), cpu, grace_seconds)


def run_here(node: Node, runs: Sequence[PackedRun], begin: Callable[[PackedRun], bool]) -> dict[Path, int]:
    """Runs of one command on this machine: the exit code of each that was started, 0 for one that saved and stopped.

    A terminal sees one table of all of them, a file a line for each start and end. Ctrl-C, SIGTERM, SIGHUP and SIGUSR2
    stop all, after they have saved; a second Ctrl-C ends them.
    """
    pack = Pack(node, list(runs), begin=begin)
    board = Board(pack, [each.folder for each in runs])
    with board:
        codes = pack.run(board.tell, lambda *_: False, board.look)
    return {folder: 0 if code == SAVED else code for folder, code in codes.items()}


@dataclass
class Pack:
    """Starts what fits, and the next when one has ended."""

    node: Node
    waiting: list[PackedRun]
    stopped: bool = False
    begin: Callable[[PackedRun], bool] = lambda _: True  # asked before a run starts: whether it still shall
    live: dict[Path, tuple["subprocess.Popen[bytes]", PackedRun, tuple[int, ...]]] = field(default_factory=dict)
    codes: dict[Path, int] = field(default_factory=dict)
    _asked: float = 0.0  # time.monotonic() of the first stop

    def run(
        self,
        tell: Callable[[str], None],
        again: Callable[[PackedRun, int], bool],
        look: Callable[[], None] = lambda: None,
    ) -> dict[Path, int]:
        """The exit code of every run that was started; returns when all have ended or a stop was passed on.

        `again`: whether a run that ended with this code waits for its GPUs once more. `look`: called between two looks.
        """
        previous = {number: signal.getsignal(number) for number in STOPS}
        for number, handler in previous.items():
            if handler != signal.SIG_IGN:  # nohup, or a script's background job: not to hear it
                signal.signal(number, lambda *_: self.stop())
        try:
            while self.live or (self.waiting and not self.stopped):
                self._start_what_fits(tell)
                look()
                time.sleep(POLL_SECONDS)
                self._end_what_ended(tell, again)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.codes

    def stop(self) -> None:
        """Every run saves and stops; none is started any more. Asked once more, all end by force."""
        now = time.monotonic()
        if self.stopped and now - self._asked > SAME_STOP_SECONDS:
            for process, _, _ in self.live.values():
                process.kill()  # its ranks end with it
        if not self.stopped:
            self.stopped, self._asked = True, now
            for process, _, _ in self.live.values():
                process.send_signal(signal.SIGTERM)

    def _end_what_ended(self, tell: Callable[[str], None], again: Callable[[PackedRun, int], bool]) -> None:
        for folder, (process, share, _) in list(self.live.items()):
            if (folder / CANCEL_FILE).exists() and process.poll() is None:
                (folder / CANCEL_FILE).unlink()
                process.send_signal(signal.SIGTERM)
            if (code := process.poll()) is not None:
                del self.live[folder]
                self.codes[folder] = code
                tell(f"{share.folder.name} ended with code {code}")
                if code and not self.stopped and again(share, code):
                    self.waiting.append(share)

    def _fits(self, share: PackedRun, free: int) -> bool:
        node, used = self.node, sum(other.host_bytes for _, other, _ in self.live.values())
        crowded = node.host_bytes is not None and self.live and used + share.host_bytes > node.host_bytes
        return free >= share.world and not crowded and (node.most is None or len(self.live) < node.most)

    def _start_what_fits(self, tell: Callable[[str], None]) -> None:
        taken = {slot for _, _, slots in self.live.values() for slot in slots}
        for share in list(self.waiting):
            free = [slot for slot in range(len(self.node.gpus)) if slot not in taken]
            if self.stopped or not self._fits(share, len(free)):
                return
            self.waiting.remove(share)
            if not self.begin(share):
                continue
            slots = tuple(free[: share.world])
            taken |= set(slots)
            self.live[share.folder] = (self._start(share, slots), share, slots)
            kind = "slots" if self.node.cpu else "GPUs"
            tell(f"{share.folder.name} on {kind} {','.join(self.node.gpus[slot] for slot in slots)}")

    def _start(self, share: PackedRun, slots: Sequence[int]) -> "subprocess.Popen[bytes]":
        """A launcher of its own, that ends with us."""
        gpus = ",".join(self.node.gpus[slot] for slot in slots)
        cores = self._cores(slots)
        atomic_write(share.folder / SHARE_FILE, json.dumps({"gpus": gpus, "cores": cores}) + "\n")
        source = importing(share.folder / "code" / share.code, os.environ.get("PYTHONPATH"))
        environment = os.environ | source | {"CUDA_VISIBLE_DEVICES": gpus}
        options = ["--code", share.code, "--world", share.world, "--grace", self.node.grace_seconds]
        options += ["--launcher", os.getpid(), *(["--cpu"] if self.node.cpu else [])]
        command = [sys.executable, "-P", "-m", "src.cluster.local.side_by_side", share.folder, *options]
        number = attempts(share.folder)[-1].number + 1 if attempts(share.folder) else 1
        log_folder(share.folder, number).mkdir(parents=True, exist_ok=True)
        with (log_folder(share.folder, number) / "launcher.log").open("ab") as log:
            return subprocess.Popen(
                [str(each) for each in command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
                start_new_session=True,
            )

    def _cores(self, slots: Sequence[int]) -> list[int]:
        """An equal share of the cores for each GPU; with fewer cores than GPUs they are shared."""
        cores, count = self.node.cores, len(self.node.gpus)
        each = len(cores) // count
        if each == 0:
            return [cores[slot % len(cores)] for slot in slots]
        return [core for slot in slots for core in cores[slot * each : (slot + 1) * each]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The launcher of one run; its exit code is the run's, 75 for one that saved and stopped."""
    from src.cluster.rank import by_launcher, end_with

    parser = by_launcher("src.cluster.local.side_by_side", "One attempt of a run that shares its machine with others.")
    parser.add_argument("--world", type=int, required=True, help="ranks of the run")
    parser.add_argument("--grace", type=float, required=True, help="seconds between a signal and the end by force")
    parser.add_argument("--cpu", action="store_true", help="the node gives the run no GPU")
    given = parser.parse_args(arguments)
    end_with(given.launcher)
    gpus = 0 if given.cpu else None
    local = Local(gpus=gpus, gpu_memory_gib=None, threads=None, grace_seconds=given.grace, at_once=None, **NO_FACTS)
    with RunFolder.rejoin(given.folder, given.code, batch_system()) as folder:
        outcome = local.submit(folder, given.world)
    if (options := options_of(given.folder)) is not None:
        tell_end(given.folder, options)
    if (given.folder / SHARE_FILE).exists():
        share = json.loads((given.folder / SHARE_FILE).read_text())
        atomic_write(given.folder / SHARE_FILE, json.dumps(share | asdict(outcome)) + "\n")
    return SAVED if outcome.status == "stopped" else outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
