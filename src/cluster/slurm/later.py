"""Jobs that wait for other jobs: `cluster.after`, and a small job that types a command again once they have ended."""

import shlex
import subprocess
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Protocol

from src.cluster.backend import SilentError
from src.cluster.slurm import client
from src.errors import PlanError
from src.runs.submissions import submissions

STARTER_MINUTES = 60  # of composing, checking and submitting
STARTER_MEMORY = "4G"


class Waits(Protocol):
    """The facts of src.cluster.slurm.config that decide where a job waits."""

    @property
    def after(self) -> Sequence[str] | None: ...
    @property
    def partition(self) -> str | None: ...
    @property
    def account(self) -> str | None: ...
    @property
    def qos(self) -> str | None: ...
    @property
    def setup(self) -> Sequence[str]: ...


def jobs_before(after: Sequence[str] | None) -> list[str]:
    """Ids of the jobs that `cluster.after` names: itself, or the newest of each run folder. PlanError."""
    found: dict[str, None] = {}
    problems = []
    for each in after or ():
        if each.replace("_", "").isdecimal():
            found[each] = None
            continue
        folders = [Path(place) for place in sorted(glob(each)) if Path(place).is_dir()]
        handed = [submissions(folder)[-1]["job"] for folder in folders if submissions(folder)]
        found |= dict.fromkeys(handed)
        if not handed:
            problems.append(f"cluster.after={each}: is no job, and no run folder there was handed to SLURM")
    if problems:
        raise PlanError(problems)
    return [*found]


def live_before(after: Sequence[str] | None) -> list[str]:
    """Those that SLURM has not done with: only these can be waited for. SilentError."""
    jobs = jobs_before(after)
    states = client.states(jobs) if jobs else {}
    return [job for job in jobs if job in states and states[job] not in client.ENDED]


def waiting(after: Sequence[str] | None) -> dict[str, str]:
    """Flags of a job that waits; for all of them where SLURM does not answer."""
    try:
        before = live_before(after)
    except SilentError:
        before = jobs_before(after)
    # Behind a job that failed it would else wait for ever.
    return {"dependency": f"afterok:{':'.join(before)}", "kill-on-invalid-dep": "yes"} if before else {}


def starter(site: Waits, python: str, command: Sequence[str], home: Path, log: Path) -> str:
    """A batch script that types the command when the jobs before it have ended well. One core, no GPU, no rank."""
    flags = {
        "job-name": "start-later",
        **waiting(site.after),
        **{key: value for key in ("partition", "account", "qos") if (value := getattr(site, key)) is not None},
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": 1,
        "mem": STARTER_MEMORY,
        "time": STARTER_MINUTES,
        "output": log,
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{key}={value}" for key, value in flags.items())]
    return "\n".join([*lines, *site.setup, f"cd {shlex.quote(str(home))}", f"exec {python} {shlex.join(command)}", ""])


def submit(script: str) -> str:
    """The id of the job. PlanError with sbatch's words."""
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PlanError(f"cluster=slurm: sbatch does not answer: {error}") from error
    if done.returncode:
        raise PlanError(f"sbatch refused: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
