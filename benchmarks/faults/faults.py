"""The faults of the drill: each begins a run, strikes at a random moment of it and waits until its launcher has ended.

Afterwards `Round.go_on` gives the same command again. A fault that this machine cannot have says why in `cannot`.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.lives import Round, future, newest, processes, saved_step
from src.checkpoint.folder import MARKER
from src.storage.json_lines import METRICS_FILE

SAME_SIGNAL_SECONDS = 1.0  # a second Ctrl-C within this time is meant once
DISK_MIB = 48  # of the small disk: the code, the logs and three checkpoints of 2 MiB need some 12
# What a launcher or a rank writes into a run folder beside checkpoints and metrics.
RUN_FILES = ("config.yaml", "plan.json", "data.json", "git.json", "version", "lock", "attempts.jsonl")


@dataclass(frozen=True)
class Fault:
    name: str
    strike: Callable[[Round], None]
    cannot: Callable[[], str] = lambda: ""  # why this machine cannot have it; empty: it can
    place: Callable[[], AbstractContextManager[Path]] | None = None  # of its run folder; None: with the others


def kill_a_rank(drill: Round) -> None:
    life = drill.begin_and_strike()
    drill.until(life, lambda: len(drill.ranks()) == drill.world)
    if ranks := drill.ranks():
        os.kill(drill.chance.choice(ranks), signal.SIGKILL)
    drill.ended(life)


def kill_the_launcher(drill: Round) -> None:
    life = drill.begin_and_strike()
    _send(life.process.pid, signal.SIGKILL)
    drill.ended(life)


def kill_all_at_once(drill: Round) -> None:
    """As the machine's own end would: launcher, ranks and their data workers."""
    life = drill.begin_and_strike()
    for process in {life.process.pid, *processes(drill.folder)}:
        _send(process, signal.SIGKILL)
    drill.ended(life)


def stop_by(number: signal.Signals) -> Callable[[Round], None]:
    """A signal that asks to save and stop. The launcher's whole process group hears it, as a terminal sends it."""

    def strike(drill: Round) -> None:
        life = drill.begin_and_strike()
        _send(-life.process.pid, number)
        if drill.ended(life) == [0] and "stopped by" in life.said and drill.step() > 0:
            saved, reached = saved_step(drill.folder), drill.step()
            drill.expect(saved == reached, f"{number.name} in step {reached} saved step {saved}")

    return strike


def interrupt_twice(drill: Round) -> None:
    """The second Ctrl-C ends all at once, in the middle of the save that the first one asked for."""
    life = drill.begin_and_strike(early=0.0)
    _send(-life.process.pid, signal.SIGINT)
    time.sleep(SAME_SIGNAL_SECONDS + drill.chance.uniform(0.0, 0.2))
    _send(-life.process.pid, signal.SIGINT)
    drill.ended(life)


def _send(process: int, number: int) -> None:
    """To one process, or to a group (negative); to nobody where it has ended by itself."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def _killed(drill: Round, saved: int) -> None:
    """A run that was killed with so many complete checkpoints at least."""
    life = drill.begin_and_strike(saved=saved)
    _send(life.process.pid, signal.SIGKILL)
    drill.ended(life)


def _cut(drill: Round, file: Path, keep: int = 0) -> None:
    """Leave a random part of its beginning: `keep` bytes at least, and not all."""
    size = file.stat().st_size
    os.truncate(file, drill.chance.randrange(keep, max(keep + 1, size)))


def tear_checkpoint(pattern: str) -> Callable[[Round], None]:
    """A file of the newest complete checkpoint ends too early."""

    def strike(drill: Round) -> None:
        _killed(drill, saved=2)
        _cut(drill, drill.chance.choice(sorted(newest(drill.folder).glob(pattern))))

    return strike


def unfinished_checkpoint(drill: Round) -> None:
    """What a power cut in the middle of a save leaves: files, one of them short, and no marker."""
    _killed(drill, saved=2)
    step = newest(drill.folder)
    (step / MARKER).unlink()
    _cut(drill, drill.chance.choice(sorted(step.iterdir())))


def tear_metrics(drill: Round) -> None:
    """The last line ends in its middle. A step whose line was cut off in the writing has not been saved yet: where the
    last one has, it is one line more that begins.
    """
    _killed(drill, saved=1)
    file = drill.folder / METRICS_FILE
    *_, last = file.read_bytes().splitlines(keepends=True)
    if drill.step() > saved_step(drill.folder):
        _cut(drill, file, keep=file.stat().st_size - len(last) + 1)
    else:
        with file.open("ab") as lines:
            lines.write(last[: drill.chance.randrange(1, len(last))])


def tear_run_file(drill: Round) -> None:
    _killed(drill, saved=1)
    _cut(drill, drill.folder / drill.chance.choice(RUN_FILES))


def fill_disk(drill: Round) -> None:
    """The disk of the run folder is full, or has room for less than a checkpoint; later there is room again."""
    life = drill.begin_and_strike(early=0.1)
    filler = drill.folder.parent / "filler"
    free = shutil.disk_usage(filler.parent).free
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - drill.chance.choice((0, 4096, 100_000, 1_500_000))))
    drill.expect(drill.ended(life) == [0] or "full" in life.said, "nothing was said of a full disk")
    filler.unlink()


def start_twice(drill: Round) -> None:
    """The same command a second time, at once or while the first one trains: one is refused, the other trains."""
    first = drill.begin_and_strike(early=0.75)
    second = drill.begin()
    codes = drill.ended(first, second)
    drill.expect(0 in codes, f"neither trained: exit codes {codes}")
    refused = any("the run is live" in each.said or "is starting this run" in each.said for each in (first, second))
    drill.expect(refused or "finished before" in second.said, f"neither was refused: exit codes {codes}")


def set_clock_back(drill: Round) -> None:
    """Between two lives. What the first one wrote is dated into the future; the machine's clock is left alone."""
    _killed(drill, saved=1)
    future(drill.folder, seconds=drill.chance.choice((60.0, 3600.0, 86_400.0, 3e8)))


def no_small_disk() -> str:
    """Why there can be none."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("mount") is None:
        return "a small disk is mounted by root alone"
    try:
        with small_disk():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"a small disk cannot be mounted: {error}"


@contextmanager
def small_disk() -> Iterator[Path]:
    """A file system of DISK_MIB in memory."""
    with tempfile.TemporaryDirectory() as place:
        command = ("mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", place)
        try:
            subprocess.run(command, check=True, capture_output=True)
            yield Path(place)
        finally:
            if os.path.ismount(place):
                subprocess.run(("umount", "--lazy", place), check=True, capture_output=True)


FAULTS = (
    Fault("kill -9 of a rank", kill_a_rank),
    Fault("kill -9 of the launcher", kill_the_launcher),
    Fault("kill -9 of all at once", kill_all_at_once),
    Fault("SIGTERM", stop_by(signal.SIGTERM)),
    Fault("SIGINT", stop_by(signal.SIGINT)),
    Fault("SIGUSR2", stop_by(signal.SIGUSR2)),
    Fault("SIGINT twice", interrupt_twice),
    Fault("tensors of the newest checkpoint cut short", tear_checkpoint("*.distcp")),
    Fault("metadata of the newest checkpoint cut short", tear_checkpoint(".metadata")),
    Fault("marker of the newest checkpoint cut short", tear_checkpoint(MARKER)),
    Fault("newest checkpoint unfinished", unfinished_checkpoint),
    Fault("last line of metrics.jsonl torn", tear_metrics),
    Fault("another file of the run folder cut short", tear_run_file),
    Fault("disk full", fill_disk, no_small_disk, small_disk),
    Fault("two launchers at once", start_twice),
    Fault("clock set back", set_clock_back),
)
