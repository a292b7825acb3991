"""The smallest backend: a batch system of one node that is a folder, and cluster=fake, whose jobs are subprocesses.

A test copies this file into a repository of its own as src/cluster/fake/config.py, beside an option of conf/cluster:
nothing else has to be touched to add a backend. The folder is $FAKE_QUEUE, with one below it for each job. Jobs wait
while its file `hold` is there, ranks before their task while `brake` is; `broken` holds the job whose first start fails
as on a broken GPU.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from src.cluster.backend import (
    AttemptOutcome,
    JobScheduler,
    JobStart,
    JobState,
    LogFindings,
    Options,
    SilentError,
)
from src.cluster.diagnosis import rank_failure, verdict
from src.cluster.rank import RankJob, run_rank
from src.cluster.submission import Prepared, Submitted
from src.config.base import Config
from src.errors import PlanError, UserError
from src.runs.folder import RunFolder
from src.runs.frozen_code import importing
from src.runs.records import SUBMISSIONS_FILE
from src.storage.json_lines import Lines

NODE = "node1"
PHASES: Mapping[str, JobState] = {
    "waits": JobState("queued", "waits"),
    "runs": JobState("running", "runs"),
    "done": JobState("ended", "done"),
    "cancelled": JobState("ended", "cancelled"),
}


@dataclass(frozen=True)
class FakeScheduler:
    """Its jobs, read from the folder."""

    @property
    def queue(self) -> Path:
        queue = Path(os.environ.get("FAKE_QUEUE", "nowhere"))
        if not queue.is_dir():
            raise SilentError("FAKE_QUEUE names no folder")
        return queue

    def current_job(self) -> str | None:
        return os.environ.get("FAKE_JOB")

    def is_live(self, job: str) -> bool:
        try:
            return job in (known := self.states([job])) and known[job].live
        except SilentError:
            return True

    def cancel_command(self, folder: Path, job: str) -> str:
        return f"fake-cancel {job}"

    def states(self, jobs: Iterable[str]) -> dict[str, JobState]:
        queue = self.queue
        return {job: PHASES[(queue / job / "state").read_text()] for job in jobs if (queue / job / "state").exists()}

    def cancel(self, folder: Path, job: str) -> str | None:
        place = self.queue / job
        running = self.states([job])[job].phase == "running"
        (place / "state").write_text("cancelled")
        if running:
            os.kill(int((place / "rank").read_text()), signal.SIGTERM)
        return None

    def requeue(self, job: str) -> None:
        (self.queue / job / "state").write_text("waits")

    def current_start(self) -> JobStart:
        return JobStart(os.environ["FAKE_JOB"], int(os.environ["FAKE_RESTARTS"]), (NODE,))

    def is_ending(self, job: str) -> bool:
        return (self.queue / job / "state").read_text() == "cancelled"

    def log_findings(self, log: Path, nodes: Sequence[str]) -> LogFindings:
        return LogFindings()

    def submit(self, folder: Path, code: str, requeues: int) -> str:
        """Its job, which waits."""
        job = str(1 + sum(each.is_dir() for each in self.queue.iterdir()))
        (self.queue / job).mkdir()
        (self.queue / job / "state").write_text("waits")
        told = json.dumps([str(folder), code, requeues])
        source = importing(folder / "code" / code, os.environ.get("PYTHONPATH"))
        with (self.queue / job / "log").open("w") as log:
            subprocess.Popen(
                [sys.executable, "-P", "-m", "src.cluster.fake.config", "job", told],
                env=os.environ | source | {"FAKE_JOB": job, "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return job


@dataclass(frozen=True)
class FakeDevices:
    count: None = None
    memory_gib: None = None
    host_gib: None = None
    capability: None = None


class Fake(Config):
    """cluster=fake: a job for each run of one rank, on a CPU."""

    scheduler: ClassVar[JobScheduler] = FakeScheduler()

    gpu_memory_gib: float | None
    gpus_per_node: int
    grace_seconds: float
    requeues: int
    wait: bool

    def devices(self) -> FakeDevices:
        return FakeDevices()

    def check(self, points: Sequence[tuple[Path, Mapping[str, Any]]], *, dry: bool) -> None:
        if wide := [folder.name for folder, plan in points if plan["world"] > 1]:
            raise PlanError(f"cluster=fake has room for one rank a run, not for {', '.join(wide)}")

    def script(self, points: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
        return "".join(f"{folder}: {plan['world']} rank\n" for folder, plan in points)

    def submit(self, folder: RunFolder, world: int) -> AttemptOutcome:
        if folder.finished:
            return AttemptOutcome("finished", 0)
        print(self._submit(folder).text(), file=sys.stderr)
        return AttemptOutcome("submitted", 0)

    def submit_groups(self, folder: RunFolder, world: int, options: Options) -> AttemptOutcome:
        raise PlanError("cluster=fake starts no replica groups; pass fault_tolerance=none")

    def submit_many(self, points: Sequence[Prepared]) -> list[Submitted | UserError]:
        return [self._submit(point.folder) for point in points]

    def _submit(self, folder: RunFolder) -> Submitted:
        scheduler = FakeScheduler()
        folder.close()
        job = scheduler.submit(folder.path, folder.code, self.requeues)
        log = scheduler.queue / job / "log"
        Lines(folder.path / SUBMISSIONS_FILE).append({"job": job, "submitted": time.time(), "log": str(log)})
        return Submitted(job, folder.path, log, scheduler.cancel_command(folder.path, job))


def run_job(folder: Path, code: str, requeues: int) -> None:
    """What a batch script does: start the rank, and do what the verdict on its failure says."""
    scheduler = FakeScheduler()
    job = scheduler.current_job()
    assert job is not None
    place = scheduler.queue / job
    for restarts in range(requeues + 2):
        while (scheduler.queue / "hold").exists():
            time.sleep(0.05)
        if scheduler.is_ending(job):
            return
        (place / "state").write_text("runs")
        os.environ["FAKE_RESTARTS"] = str(restarts)
        told = json.dumps([str(folder), code])
        rank = subprocess.Popen([sys.executable, "-P", "-m", "src.cluster.fake.config", "rank", told])
        (place / "rank").write_text(str(rank.pid))
        if rank.wait() == 0:
            break
        answer = io.StringIO()
        with contextlib.redirect_stdout(answer):
            verdict.main([str(folder), "--requeues", str(requeues)])
        if not answer.getvalue().startswith("requeue"):
            break
        scheduler.requeue(job)
    if not scheduler.is_ending(job):
        (place / "state").write_text("done")


def rank_of_job(folder: Path, code: str) -> None:
    """The one rank, which writes down for the verdict why it failed."""
    scheduler = FakeScheduler()
    start, queue = scheduler.current_start(), scheduler.queue
    with RunFolder.rejoin(folder, code, scheduler) as held:
        held.begin(1)
        try:
            while (queue / "brake").exists():
                time.sleep(0.05)
            if start.restarts == 0 and (queue / "broken").exists() and (queue / "broken").read_text() == start.job:
                raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
            run_rank(RankJob(folder, code))
        except Exception as error:
            traceback.print_exc()
            rank_failure.RankFailure.of(error, 0, NODE).write(rank_failure.place(folder, start))
            sys.exit(1)


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    {"job": run_job, "rank": rank_of_job}[sys.argv[1]](Path(given[0]), *given[1:])
