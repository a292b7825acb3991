"""A tiny run as a command line, from its start to its end, however often it has to be started; and what it leaves.

Ranks are on the CPU. Every process of a round inherits MARK, so that one that outlives its launcher is found, whatever
session and process group it has made for itself.
"""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from src.checkpoint.folder import MARKER, complete, step_folder, step_of
from src.storage.json_lines import METRICS_FILE, Lines

HOME = Path(__file__).resolve().parents[2]
MARK = "FAULT_DRILL"  # environment variable: the folder of the run
STEPS, SAVE_EVERY = 60, 5
LAYOUTS = {"single": 1, "fsdp2": 2}
ARGUMENTS = (
    *("model=llama3_debug", "model.n_layers=2", "model.dim=32", "model.n_heads=4", "model.n_kv_heads=2"),
    *("model.multiple_of=32", "data=synthetic", "task.seq_len=32", "task.global_batch=4", "task.micro_batch=1"),
    *(f"task.steps={STEPS}", "task.log_every=1", "task.validate_every=20", "task.validate_samples=4"),
    *(f"checkpoint.every={SAVE_EVERY}", "schedule.warmup_steps=2", "cluster.gpus=0", "cluster.grace_seconds=30"),
)
LIMIT_SECONDS = 300.0  # for a life; more is a hang
STARTING_SECONDS = 6.0  # about, from the command line to the first step
ORPHAN_SECONDS = 10.0  # what ends with its launcher has ended by then
ADVICE = re.compile(r"`((?:mv|cp) [^`]+)`")  # a refusal says what to type
STARTS = 4  # after the fault: two that are refused with an advice each, and one that goes to the end


class Process(Protocol):
    """Of subprocess.Popen, what is used of it here."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...


Starter = Callable[[tuple[str, ...], dict[str, str], Path], Process]


def popen(argv: tuple[str, ...], environment: dict[str, str], log: Path) -> Process:
    """`python launch.py` in a session of its own, as a terminal gives it one."""
    with log.open("ab") as out:
        command = (sys.executable, str(HOME / "launch.py"), *argv)
        return subprocess.Popen(
            command, cwd=HOME, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )


@dataclass
class Result:
    """Of one round."""

    fault: str
    layout: str
    losses_equal: bool = False
    bytes_equal: bool = False
    orphans: int = 0
    seconds: float = 0.0  # from the fault until the launcher has ended
    faults_found: list[str] = field(default_factory=list)

    @property
    def lost(self) -> bool:
        """Whether anything is not as in the undisturbed run, or a process is left."""
        return bool(self.faults_found) or self.orphans > 0 or not (self.losses_equal and self.bytes_equal)


class Life:
    """One start of the command line."""

    def __init__(self, process: Process, log: Path, began_at: int) -> None:
        self.process, self._log, self._began_at = process, log, began_at

    def wait(self, seconds: float = LIMIT_SECONDS) -> int | None:
        """Its exit code; None if it hangs, and then it is ended by force."""
        deadline = time.monotonic() + seconds
        while (code := self.process.poll()) is None:
            if time.monotonic() > deadline:
                os.kill(self.process.pid, signal.SIGKILL)
                return None
            time.sleep(0.02)
        return code

    @property
    def said(self) -> str:
        """All of its output so far."""
        return self._log.read_bytes()[self._began_at :].decode(errors="replace")


class Round:
    """One run folder, its command line and its random numbers."""

    def __init__(self, fault: str, layout: str, folder: Path, root: Path, seed: str, start: Starter = popen) -> None:
        """`root`: of the prepared data, which rounds share."""
        self.folder, self.chance = folder, random.Random(seed)
        self.log = root / f"{folder.name}.log"
        self.result = Result(fault, layout)
        self.world = LAYOUTS[layout]
        self._argv = (*ARGUMENTS, f"parallel={layout}", f"root={root}", f"folder={folder}", "name=drill")
        self._start, self._struck = start, 0.0

    def begin(self) -> Life:
        """Start the command line."""
        with self.log.open("a") as log:
            print("$ python launch.py", shlex.join(self._argv), file=log)
        own = {MARK: str(self.folder), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": ""}
        outer = {key: each for key, each in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        began_at = self.log.stat().st_size
        return Life(self._start(self._argv, outer | own, self.log), self.log, began_at)

    def begin_and_strike(self, *, saved: int = 0, early: float = 0.25) -> Life:
        """Start it and return at a random moment of its life, with at least so many complete checkpoints: with the
        probability `early` while it starts, else in or between two of its steps. The clock of the fault starts.
        """
        life = self.begin()
        if saved == 0 and self.chance.random() < early:
            began, delay = time.monotonic(), self.chance.uniform(0.0, STARTING_SECONDS)
            self.until(life, lambda: time.monotonic() >= began + delay)
        else:
            step = self.chance.randrange(1 + saved * SAVE_EVERY, STEPS - 5)
            delay = self.chance.uniform(0.0, 0.1)  # of the order of a step and of a save
            self.until(life, lambda: self.step() >= step and len(complete(self.folder / "checkpoints")) >= saved)
            time.sleep(delay)
        self._struck = time.monotonic()
        return life

    def until(self, life: Life, true: Callable[[], Any]) -> None:
        """Wait for it, or for the end of the life."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not true() and life.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)

    def step(self) -> int:
        """The newest in metrics.jsonl."""
        last = Lines(self.folder / METRICS_FILE).last()
        return 0 if last is None else int(last.get("step", 0))

    def ended(self, *lives: Life) -> list[int | None]:
        """Wait until these have ended, and look for what they left behind; their exit codes. The time is that until the
        first one has ended: of two launchers, the one that is refused.
        """
        first = self.until_first(lives)
        self.result.seconds = first - self._struck
        codes = [life.wait() for life in lives]
        self.expect(None not in codes, f"a launcher did not end within {LIMIT_SECONDS:g} s")
        self.count_orphans()
        return codes

    @staticmethod
    def until_first(lives: Sequence[Life]) -> float:
        """time.monotonic() when the first of them has ended, or has hung for too long."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while all(life.process.poll() is None for life in lives) and time.monotonic() < deadline:
            time.sleep(0.02)
        return time.monotonic()

    def expect(self, true: bool, otherwise: str) -> None:
        if not true:
            self.result.faults_found.append(otherwise)

    def go_on(self) -> None:
        """The same command to the end of the run. What a refusal tells to type is typed."""
        for _ in range(STARTS):
            life = self.begin()
            code = life.wait()
            self.count_orphans()
            advice = ADVICE.findall(life.said)
            if code != 2 or not advice:
                break
            subprocess.run(shlex.split(advice[-1]), check=False)
        last = life.said.strip().splitlines()[-1:]
        self.expect(code == 0, f"the same command ended with code {code}: {''.join(last)}")

    @contextmanager
    def ended_with_us(self) -> Iterator[None]:
        """Nothing of this round outlives an error or a Ctrl-C of the drill itself."""
        try:
            yield
        except BaseException:
            for process in processes(self.folder):
                os.kill(process, signal.SIGKILL)
            raise

    def ranks(self) -> list[int]:
        """Process ids of the living ranks."""
        found = []
        for process in processes(self.folder):
            try:
                words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"src.cluster.rank" in words:
                found.append(process)
        return found

    def count_orphans(self) -> None:
        """Processes of this run that are left although no launcher lives; they are counted, then ended."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while (left := processes(self.folder)) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.result.orphans += len(left)
        for process in left:
            os.kill(process, signal.SIGKILL)
        while any(process in processes(self.folder) for process in left):  # or they would be counted once more
            time.sleep(0.05)


def processes(folder: Path) -> list[int]:
    """Of the run in this folder: those that inherited MARK, but for those that are dead and not yet waited for."""
    mark, found = f"{MARK}={folder}".encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (place / "environ").read_bytes().split(b"\0"):
                state = (place / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(place.name)] if state not in "ZX" else []
        except OSError:  # another user's, or gone by now
            continue
    return sorted(found)


@dataclass(frozen=True)
class Record:
    """What a run has computed: every loss and validation loss by step, and the bytes of its last checkpoint."""

    losses: dict[tuple[str, int], float]
    files: dict[str, bytes]

    @classmethod
    def read(cls, folder: Path) -> "Record":
        losses: dict[tuple[str, int], float] = {}
        for line in Lines(folder / METRICS_FILE).read():
            losses |= {(name, line["step"]): line[name] for name in ("loss", "validation_loss") if name in line}
        # .metadata holds the order in which ranks finished; the marker times and checksums of the others.
        last = step_folder(folder / "checkpoints", STEPS)
        names = {MARKER, ".metadata"}
        files = {each.name: each.read_bytes() for each in last.glob("*") if each.name not in names}
        return cls(losses, files if (last / MARKER).exists() else {})


def newest(folder: Path) -> Path:
    """The newest complete checkpoint of a run."""
    return complete(folder / "checkpoints")[-1]


def saved_step(folder: Path) -> int:
    """Its step; 0 where there is none."""
    found = complete(folder / "checkpoints")
    return (step_of(found[-1]) or 0) if found else 0


def future(folder: Path, seconds: float) -> None:
    """Date all that a run has written so far `seconds` later, as if the clock had been set back since."""
    metrics = folder / METRICS_FILE
    if metrics.exists():
        lines = [line | {"time": line["time"] + seconds} for line in Lines(metrics).read() if "time" in line]
        metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            moment = path.stat().st_mtime + seconds
            os.utime(path, (moment, moment))
