"""Replica groups with the real lighthouse: their ranks start in a moment, since one warm process forks them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, product
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from src.runs.folder import RunFolder
from tests.end_to_end.lives import HOME, TINY, opened
from tests.fault_tolerance.life import Seat, Trouble, live
from tests.forks import forkserver
from tests.rendezvous import launcher_store

PATIENCE_SECONDS = 240.0  # of a machine that is busy with other tests, too
# A stall that only sum_seconds or heal_seconds would end is longer than a test's patience.
QUICK = (
    *("fault_tolerance=torchft", "fault_tolerance.join_seconds=0.5", "task.steps=20", "checkpoint.every=10"),
    *("fault_tolerance.sum_seconds=600.0", "fault_tolerance.heal_seconds=600.0", "data=synthetic"),
)


@dataclass
class Lighthouse:
    min_groups: int
    heartbeat_seconds: float = 0.5
    process: "subprocess.Popen[str] | None" = None
    address: str = ""
    file: Path | None = None  # where groups read the address, if it may change

    def start(self) -> None:
        port = self.address.rpartition(":")[2] or "0"
        options = ("--port", port, "--min-groups", str(self.min_groups))
        quick = ("--join-seconds", "0.5", "--heartbeat-seconds", str(self.heartbeat_seconds))
        command = (sys.executable, "-m", "src.fault_tolerance.lighthouse", *options, *quick)
        environment = os.environ | {"RUST_LOG": "error"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=HOME, env=environment, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        if self.file is not None:
            self.file.write_text(self.address)

    def move(self, file: Path) -> None:
        """Serve at another port from now on, which stands in this file."""
        self.kill()
        self.address, self.file = "", file
        self.start()

    def asked(self) -> int:
        """By how many groups that live, and have no answer yet."""
        with urlopen(f"{self.address}/status", timeout=PATIENCE_SECONDS) as page:
            found = re.search(r"\[(\d+)/\d+ participants healthy\]", page.read().decode())
        assert found is not None
        return int(found[1])

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


@dataclass
class Fleet:
    """The groups of one run, of `world` ranks each."""

    folder: Path
    lighthouse: Lighthouse
    world: int = 1
    groups: dict[int, list[ForkServerProcess]] = field(default_factory=dict)
    stores: dict[int, object] = field(default_factory=dict)  # in which the ranks of a group find each other

    def start(self, *numbers: int, troubles: Sequence[Trouble] = ()) -> None:
        code = next((self.folder / "code").iterdir()).name
        for number in numbers:
            with RunFolder.rejoin(self.folder, code) as run:
                group = run.group(number)
            with RunFolder.rejoin(group, code) as own:
                own.begin(self.world)
            self.stores[number], port = launcher_store()
            arguments = (group, number, str(self.lighthouse.file or self.lighthouse.address), tuple(troubles))
            self.groups[number] = [
                forkserver().Process(target=live, args=(*arguments, Seat(rank, self.world, port)), daemon=True)
                for rank in range(self.world)
            ]
            for process in self.groups[number]:
                process.start()

    def start_together(self, *numbers: int) -> None:
        """None begins before all have met: the run takes a second, and who comes late would do its end alone."""
        self.lighthouse.kill()
        self.lighthouse.min_groups = len(numbers)
        self.lighthouse.start()
        self.start(*numbers)

    def stop(self, number: int, signal_: signal.Signals = signal.SIGTERM) -> None:
        """As a scheduler would ask it."""
        for process in self.groups[number]:
            assert process.pid is not None
            os.kill(process.pid, signal_)

    def wait(self, *numbers: int) -> None:
        """Until these groups have ended, and well."""
        for number in numbers or tuple(self.groups):
            codes = self.ended(number)
            assert codes == {0}, f"exit codes {codes}\n" + "\n".join(self.log(each) for each in self.groups)

    def died(self, number: int) -> None:
        """Until this group has died by the signal that a trouble sends."""
        assert self.ended(number) == {-signal.SIGKILL}, self.log(number)

    def ended(self, number: int) -> set[int | None]:
        """How the ranks of this group did; None: not yet."""
        for process in self.groups[number]:
            process.join(PATIENCE_SECONDS)
        return {process.exitcode for process in self.groups[number]}

    def reach(self, step: int, *numbers: int) -> None:
        """Until these groups are at this step, or beyond."""
        self.until(lambda: all(max(seen(self.folder, number), default=0) >= step for number in numbers))

    def one_asks(self) -> None:
        """Until a group waits at the lighthouse, and so is in the next quorum: all others are held or dead.

        Two of three would not wait for the third.
        """
        self.until(lambda: self.lighthouse.asked() == 1)

    def go(self, step: int) -> None:
        """End a hold."""
        (self.folder / f"go_{step}").touch()

    def stopped_together(self, step: int) -> None:
        """The life of two groups, both told to stop after they have reached a step."""
        self.start(0, 1, troubles=[Trouble(step, "hold")])
        self.reach(step, 0, 1)
        self.stop(0)
        self.stop(1)
        self.go(step)
        self.wait()

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not true():
            assert time.monotonic() < deadline, "\n".join(self.log(number) for number in self.groups)
            time.sleep(0.01)

    def log(self, number: int) -> str:
        file = self.folder / "groups" / str(number) / "life.log"
        return file.read_text() if file.exists() else f"group {number}: no log"

    def close(self) -> None:
        for process in chain(*self.groups.values()):
            if process.is_alive():
                process.kill()
        self.lighthouse.kill()


@contextmanager
def fleet(
    root: Path,
    *argv: str,
    groups: int = 2,
    min_groups: int = 1,
    world: int = 1,
    tiny: Sequence[str] = TINY,
    heartbeat_seconds: float = 0.5,
) -> Iterator[Fleet]:
    """`argv` beside `tiny` and QUICK; where `folder=` is one of them, the run there goes on."""
    counts = (f"fault_tolerance.groups={groups}", f"fault_tolerance.min_groups={min_groups}")
    heartbeat = f"fault_tolerance.heartbeat_seconds={heartbeat_seconds}"
    folder = opened(*tiny, *QUICK, *counts, heartbeat, f"root={root}", *argv)
    found = Fleet(folder, Lighthouse(min_groups, heartbeat_seconds), world)
    found.lighthouse.start()
    try:
        yield found
    finally:
        found.close()


def account(folder: Path, group: int, rank: int = 0) -> list[dict[str, Any]]:
    file = folder / "groups" / str(group) / f"account_{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def seen(folder: Path, group: int) -> list[int]:
    """Steps that this group began to compute."""
    return [line["step"] for line in account(folder, group) if "offered" in line]


def last(folder: Path, group: int, rank: int = 0) -> dict[str, Any]:
    return account(folder, group, rank)[-1]


def losses(folder: Path, groups: int) -> dict[int, float]:
    """By step, as its last quorum saw it; all groups of a quorum must have seen the same."""
    found: dict[tuple[int, int], set[float]] = {}
    for group in range(groups):
        for line in account(folder, group):
            if "counted" in line:
                found.setdefault((line["counted"], line["quorum"]), set()).add(line["loss"])
    assert all(len(values) == 1 for values in found.values()), found
    return {step: values.pop() for (step, _), values in sorted(found.items())}


def audited(folder: Path, steps: int, batch: int, world: int = 1) -> bool:
    """Whether step n took exactly the samples [(n - 1) * batch, n * batch), each once, whoever was there."""
    groups = [int(path.name) for path in (folder / "groups").iterdir()]
    lines = [
        line | {"group": group}
        for group, rank in product(groups, range(world))
        for line in account(folder, group, rank)
    ]
    for step in range(1, steps + 1):
        quorums = {line["quorum"] for line in lines if line.get("counted") == step}
        assert quorums, f"step {step} was never counted"
        quorum = max(quorums)  # groups that died with their state may have counted it before
        mine = [line for line in lines if line.get("step") == step and line["quorum"] == quorum]
        shares = {(line["group"], *line["offered"]) for line in mine}  # ranks that cut a model share their samples
        taken = sorted(chain(*(samples for _, *samples in shares)))
        assert taken == list(range((step - 1) * batch, step * batch)), (step, shares)
    return True
