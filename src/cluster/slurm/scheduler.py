"""SLURM as a scheduler of jobs: src.cluster.backend.JobScheduler in its commands and environment variables."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.cluster.backend import JobStart, JobState, LogFindings, SilentError
from src.cluster.slurm import client, job_log
from src.runs.records import CANCEL_FILE
from src.runs.submissions import submissions

# squeue's words for a job that has nodes; any other that has not ended waits for them.
_RUNNING = frozenset(("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING"))
# Of these, the words for one that nobody ends: a job is SIGNALING for as long as its nodes are being told of a signal.
_GOES_ON = frozenset(("RUNNING", "SIGNALING"))


@dataclass(frozen=True)
class SlurmScheduler:
    """The SLURM of this machine."""

    def current_job(self) -> str | None:
        """Id of the job that this process runs in, as SLURM's commands take it: <array>_<index> for an element of an
        array. SLURM_JOB_ID of the last element is the id of the whole array, and a requeue of that is one of all.
        """
        array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID")

    def own_job(self) -> str:
        """The same, where there is one."""
        job = self.current_job()
        assert job is not None, "this process is part of a job"
        return job

    def is_live(self, job: str) -> bool:
        """Whether the job is queued or running; also true when squeue cannot say."""
        return client.live(job)

    def cancel_command(self, folder: Path, job: str) -> str:
        """What a person types to end the run: not the job, where neighbours share it."""
        return f"touch {shlex.quote(str(folder / CANCEL_FILE))}" if _shares_job(folder) else f"scancel {job}"

    def states(self, jobs: Iterable[str]) -> dict[str, JobState]:
        """Of those that squeue still shows; SilentError."""
        return {job: _state(word) for job, word in client.states(jobs).items()}

    def cancel(self, folder: Path, job: str) -> str | None:
        """A run that shares its job is cancelled by a file, so that its neighbours go on."""
        if _shares_job(folder):
            (folder / CANCEL_FILE).touch()
            return None
        if not client.available():
            raise SilentError("no sbatch on this machine")
        done = subprocess.run(["scancel", job], capture_output=True, text=True)
        return None if done.returncode == 0 else f"scancel {job}: {done.stderr.strip()}"

    def requeue(self, job: str) -> None:
        """The nodes are given back, and the same job waits again."""
        subprocess.run(["scontrol", "requeue", job], check=False)

    def current_start(self) -> JobStart:
        """With SLURM_RESTART_COUNT, and submitit's reading of the list of nodes."""
        from submitit.slurm.slurm import SlurmJobEnvironment

        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return JobStart(self.own_job(), restarts, tuple(SlurmJobEnvironment().hostnames))

    def is_ending(self, job: str) -> bool:
        """Cancelled, preempted, at its time limit or requeued already; false when squeue does not answer, and during
        the grace before a preemption, which may still be called off.
        """
        try:
            return client.states([job]).get(job) not in _GOES_ON
        except SilentError as error:
            print(f"squeue does not answer ({error}); job {job} counts as running", file=sys.stderr)
            return False

    def log_findings(self, log: Path, nodes: Sequence[str]) -> LogFindings:
        """Of the newest start: SLURM appends them all to one file."""
        try:
            text = log.read_text(errors="replace")
        except FileNotFoundError:
            return LogFindings()
        return job_log.findings(text.rpartition(job_log.START)[2], nodes)


def _shares_job(folder: Path) -> bool:
    handed = submissions(folder)
    return bool(handed) and bool(handed[-1].get("packed"))


def _state(word: str) -> JobState:
    if word in client.ENDED:
        return JobState("ended", word)
    return JobState("running" if word in _RUNNING else "queued", word)
