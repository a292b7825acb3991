"""Tiny runs on the test cluster: submitted through launch.py as a person does, held at a step, watched, compared."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.runs.folder import Attempt, attempts
from tests.end_to_end.lives import TINY, series, write_text
from tests.slurm.cluster import TestCluster
from tests.warm.server import SITE

HOME = Path(__file__).parents[2]
PARTS = ("src", "conf", "launch.py", "requirements.txt", "pyproject.toml")
PATIENCE_SECONDS = 400.0  # far beyond what a busy machine needs
FACTS: dict[str, str | int | float] = {
    "partition": "low",
    "device": "cpu",
    "gpus_per_node": 1,
    "cpus_per_gpu": 1,
    "minutes": 60,
    "grace_seconds": 60,
    "preflight_seconds": 90.0,
}
STEPS = 20

# Python runs this at the start of every rank. A rank that comes to the step that the file $BRAKE names waits there
# until the file is gone or a signal has come, so that a test may take its time, however slow the machine.
# $FAULT says what goes wrong: "late n2" (ranks never come), "deaf" (no scontrol), "code 1 7", "kill 1 7" (rank, step),
# "once 1 7" (the same, only in the first start), "hang n2 7" (node, step: a rank that forgets the others, who wait
# 10 s for it), "slow" (the save after a signal).
BRAKE = """
import warm_client
import os, signal, subprocess, sys, time
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "src.train.loop":
            return None
        spec = PathFinder.find_spec(name, path, target)
        original = spec.loader.exec_module
        def exec_module(module):
            original(module)
            mend(module)
        spec.loader.exec_module = exec_module
        return spec

def mend(module):
    brake(module.Loop)
    if FAULT[:1] == ["hang"]:
        module.STEP_TIMEOUT_SECONDS = 10.0

def brake(Loop):
    run = Loop.run
    def braked(self):
        batches = self._step_batches
        self._step_batches = lambda: held(self, batches())
        return run(self)
    Loop.run = braked
    save = Loop._save
    def slow(self, *, last):
        if FAULT == ["slow"] and self.stop.seen:
            time.sleep(600)
        save(self, last=last)
    Loop._save = slow

def held(loop, batches):
    for each in batches:
        step, rank = loop.training.state.step, os.environ["RANK"]
        if FAULT == ["code", rank, str(step)]:
            raise KeyError("a key that nobody set")
        first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        if FAULT == ["kill", rank, str(step)] or (FAULT == ["once", rank, str(step)] and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == ["hang", os.environ["SLURMD_NODENAME"], str(step)]:
            forget_the_others()
        while loop.stop.seen is None and step == named(os.environ["BRAKE"]):
            mark = f"{os.environ['BRAKE']}.rank_{rank}"
            if not os.path.exists(mark):
                open(mark, "w").write(str(os.getpid()))
            time.sleep(0.05)
        yield each

def forget_the_others():
    time.sleep(600)

def named(path):
    try:
        return int(open(path).read() or -1)
    except FileNotFoundError:
        return -1

def deaf(command, **_):
    raise FileNotFoundError(2, "No such file or directory", command[0])

if "SLURM_PROCID" in os.environ and "submitit.core._submit" in sys.orig_argv:
    FAULT = os.environ.get("FAULT", "").split()
    if "src.train.loop" in sys.modules:
        mend(sys.modules["src.train.loop"])
    sys.meta_path.insert(0, Finder())
    if FAULT == ["late", os.environ["SLURMD_NODENAME"]]:
        time.sleep(600)
    if FAULT == ["deaf"]:
        subprocess.check_call = deaf
"""


def until(condition: Callable[[], Any], complaint: Callable[[], str] | str = "waited in vain") -> Any:
    """Its first true value."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, complaint if isinstance(complaint, str) else complaint()
        time.sleep(0.1)
    return value


@dataclass(frozen=True)
class Told:
    """What launch.py says of a submitted run."""

    job: str
    folder: Path
    log: Path


class Site:
    """A repository, a root for its runs, and the cluster that they go to."""

    def __init__(self, cluster: TestCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.repository = folder / "repository"
        for part in PARTS:
            source, copy = HOME / part, _made(self.repository) / part
            if source.is_dir():  # without what other tests' Pythons write beside the modules meanwhile
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy)
        (_made(folder / "site") / "sitecustomize.py").write_text(BRAKE)
        self.data = (*write_text(folder), f"root={folder / 'runs'}")
        self.arguments = (
            *(each for each in TINY if not each.startswith(("cluster.", "name="))),
            *self.data,
            *(f"task.steps={STEPS}", "checkpoint.every=10", "parallel=fsdp2"),
        )

    def launch(self, *argv: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """launch.py with the arguments of a tiny run, and these."""
        return self.type(*self.arguments, *argv, check=check)

    def type(self, *argv: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """launch.py of the site's repository, in a folder where no `src` is."""
        done = subprocess.run(
            [sys.executable, str(self.repository / "launch.py"), *argv],
            cwd=_made(self.folder / "elsewhere"),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    def environment(self) -> dict[str, str]:
        """What a person's shell has, who uses the cluster."""
        outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return {key: value for key, value in (os.environ | self.cluster.environment).items() if key not in outer}

    def submit(self, name: str, *argv: str, fault: str = "", warm: bool = True) -> "Held":
        """A run of two ranks on two nodes, which its brake may hold. `warm`: none need import torch (tests/warm)."""
        return self.told(name, self.launch(*self.named(name, fault, warm), *argv).stderr)

    def named(self, name: str, fault: str = "", warm: bool = True) -> tuple[str, ...]:
        """Arguments of a run with a brake, and perhaps a fault, of its own."""
        path = f"{self.folder / 'site'}:{SITE}"
        setup = f'export BRAKE={self.brake(name)} FAULT="{fault}" PYTHONPATH={path}' + (" WARM=" if not warm else "")
        return (f"name={name}", f"cluster.setup=['{setup}']", *self.site())

    def brake(self, name: str) -> Path:
        return self.folder / f"{name}.brake"

    def told(self, name: str, text: str) -> "Held":
        """The run that launch.py has told of."""
        (told,) = told_by(text)
        return Held(self.cluster, told, self.brake(name))

    @staticmethod
    def site() -> tuple[str, ...]:
        """Arguments that name the site's facts."""
        return ("cluster=slurm", *(f"cluster.{key}={value}" for key, value in FACTS.items()))


def told_by(text: str) -> list[Told]:
    """Every submission that the text tells of."""
    found = re.findall(r"^job (\S+): (.+)\nlog: (.+)\n", text, re.MULTILINE)
    return [Told(job, Path(folder), Path(log)) for job, folder, log in found]


class Held:
    """A submitted run under the eyes of a test."""

    def __init__(self, cluster: TestCluster, told: Told, brake: Path) -> None:
        self.cluster, self.job, self.folder, self.log, self.brake = cluster, told.job, told.folder, told.log, brake
        self._hurried = -10.0

    def until_held(self) -> dict[int, int]:
        """rank -> pid, once both wait at the brake."""
        marks = [Path(f"{self.brake}.rank_{rank}") for rank in range(2)]
        until(lambda: all(mark.exists() and mark.read_text() for mark in marks), self.story)
        return {rank: int(mark.read_text()) for rank, mark in enumerate(marks)}

    def hold(self, step: int) -> None:
        """The next stop of both ranks."""
        for mark in self.brake.parent.glob(f"{self.brake.name}.rank_*"):
            mark.unlink()
        self.brake.write_text(str(step))

    def loosen(self) -> None:
        self.brake.unlink()

    def until_restarted(self, attempt: int) -> Attempt:
        """SLURM lets a requeued job wait two minutes; a test does not.

        Only: what srun had ended by force is told to end once more after 60 s, and by then this is the new attempt. One
        that starts after such an end must be done in a minute.
        """

        def started() -> Attempt | None:
            self._hurry()
            tried = attempts(self.folder)
            return tried[attempt - 1] if len(tried) >= attempt else None

        found = until(started, self.story)
        assert isinstance(found, Attempt)
        return found

    def until_ended(self) -> Attempt:
        """The newest attempt, once SLURM has let go of the job."""
        self.until_gone()
        return attempts(self.folder)[-1]

    def until_gone(self) -> None:
        """Until SLURM has let go of the job, whether or not it came to an attempt."""

        def gone() -> bool:
            self._hurry()
            return self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "")

        until(gone, self.story)

    def state(self) -> str:
        return self.cluster.run(
            "squeue", "--noheader", "--states=all", f"--jobs={self.job}", "--format=%T", check=False
        ).strip()

    def fact(self, key: str) -> str:
        """Of scontrol show job."""
        shown = self.cluster.run("scontrol", "show", "job", self.job)
        found = re.search(rf"\b{key}=(\S*)", shown)
        assert found is not None, shown
        return found[1]

    def losses(self) -> dict[int, float]:
        return series(self.folder)

    def verdicts(self) -> list[dict[str, Any]]:
        file = self.folder / "verdicts.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def story(self) -> str:
        """For the message of a failed test."""
        log = self.log.read_text()[-4000:] if self.log.exists() else "no log"
        ends = "\n".join(map(str, [*attempts(self.folder), *self.verdicts()]))
        return f"job {self.job} is {self.state()!r}\n{ends}\n{log}"

    def _hurry(self) -> None:
        # Not in the very second in which the nodes were told to forget the job: they would refuse it.
        if self.state() == "PENDING" and time.monotonic() > self._hurried + 10:
            self._hurried = time.monotonic()
            self.cluster.run("scontrol", "update", f"JobId={self.job}", "StartTime=now+3", check=False)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
