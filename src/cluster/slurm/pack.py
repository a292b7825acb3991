"""Small runs side by side on one node, each with its own GPUs, cores, folder and exit code.

`python -m src.cluster.slurm.pack <folder> ...` starts one of them: ranks of this machine, as cluster=local does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from src.cluster.local.config import Local
from src.cluster.slurm.scheduler import CANCEL_FILE, SlurmScheduler
from src.runs.folder import RunFolder, attempts, log_folder
from src.storage.atomic_write import atomic_write

SHARE_FILE = "pack.json"  # what the newest attempt was given
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class PackedRun:
    """One run of a pack."""

    folder: Path
    code: str  # hash8 of the snapshot
    world: int


@dataclass(frozen=True)
class Node:
    """What a pack may hand out."""

    gpus: tuple[str, ...]  # names as CUDA_VISIBLE_DEVICES has them
    cores: tuple[int, ...]
    cpu: bool  # ranks compute on the CPU; GPUs are only counted
    grace_seconds: float

    @classmethod
    def here(cls, gpus: int, *, cpu: bool, grace_seconds: float) -> "Node":
        """This machine's, as the scheduler has limited it."""
        named = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
        names = named if len(named) >= gpus else [str(index) for index in range(gpus)]
        return cls(tuple(names[:gpus]), tuple(sorted(os.sched_getaffinity(0))), cpu, grace_seconds)


@dataclass
class Pack:
    """Starts what fits, and the next when one has ended."""

    node: Node
    waiting: list[PackedRun]
    stopped: bool = False
    live: dict[Path, tuple["subprocess.Popen[bytes]", PackedRun, tuple[int, ...]]] = field(default_factory=dict)
    codes: dict[Path, int] = field(default_factory=dict)

    def run(self, tell: Callable[[str], None], again: Callable[[PackedRun, int], bool]) -> dict[Path, int]:
        """The exit code of every run that was started; returns when all have ended or a stop was passed on.

        `again`: whether a run that ended with this code waits for its GPUs once more.
        """
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, lambda *_: self.stop())
        while self.live or (self.waiting and not self.stopped):
            self._start_what_fits(tell)
            time.sleep(POLL_SECONDS)
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
        return self.codes

    def stop(self) -> None:
        """Every run saves and stops; none is started any more."""
        self.stopped = True
        for process, _, _ in self.live.values():
            process.send_signal(signal.SIGTERM)

    def _start_what_fits(self, tell: Callable[[str], None]) -> None:
        taken = {slot for _, _, slots in self.live.values() for slot in slots}
        for share in list(self.waiting):
            free = [slot for slot in range(len(self.node.gpus)) if slot not in taken]
            if self.stopped or len(free) < share.world:
                return
            slots = tuple(free[: share.world])
            taken |= set(slots)
            self.waiting.remove(share)
            self.live[share.folder] = (self._start(share, slots), share, slots)
            tell(f"{share.folder.name} on GPUs {','.join(self.node.gpus[slot] for slot in slots)}")

    def _start(self, share: PackedRun, slots: Sequence[int]) -> "subprocess.Popen[bytes]":
        """A launcher of its own, that ends with us."""
        gpus = ",".join(self.node.gpus[slot] for slot in slots)
        cores = self._cores(slots)
        atomic_write(share.folder / SHARE_FILE, json.dumps({"gpus": gpus, "cores": cores}) + "\n")
        source = share.folder / "code" / share.code
        paths = [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": os.pathsep.join(paths)}
        options = ["--code", share.code, "--world", share.world, "--grace", self.node.grace_seconds]
        options += ["--launcher", os.getpid(), *(["--cpu"] if self.node.cpu else [])]
        command = [sys.executable, "-P", "-m", "src.cluster.slurm.pack", share.folder, *options]
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
    from src.cluster.slurm.payload import SAVED_NOT_REQUEUED

    parser = by_launcher("src.cluster.slurm.pack", "One attempt of a run that shares its node with others.")
    parser.add_argument("--world", type=int, required=True, help="ranks of the run")
    parser.add_argument("--grace", type=float, required=True, help="seconds between a signal and the end by force")
    parser.add_argument("--cpu", action="store_true", help="the node gives the run no GPU")
    given = parser.parse_args(arguments)
    end_with(given.launcher)
    local = Local(gpus=0 if given.cpu else None, gpu_memory_gib=None, threads=None, grace_seconds=given.grace)
    with RunFolder.rejoin(given.folder, given.code, SlurmScheduler()) as folder:
        outcome = local.submit(folder, given.world)
    if (given.folder / SHARE_FILE).exists():
        share = json.loads((given.folder / SHARE_FILE).read_text())
        atomic_write(given.folder / SHARE_FILE, json.dumps(share | asdict(outcome)) + "\n")
    return SAVED_NOT_REQUEUED if outcome.status == "stopped" else outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
