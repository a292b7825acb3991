"""Replica groups on SLURM: an element of one array for each, requeued by itself, and a job for their lighthouse."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from src.cluster.backend import AttemptOutcome, Options, QueueBackend
from src.cluster.replicas.lighthouse import ADDRESS_FILE, arguments
from src.cluster.slurm.lighthouse_job import LighthouseJob
from src.cluster.submission import Prepared, Submitted, all_submitted
from src.errors import PlanError
from src.runs.folder import RunFolder, attempts
from src.runs.records import PLAN_FILE

WORD_SECONDS = 60.0


class SubmitsGroups(QueueBackend, Protocol):
    """The facts of src.cluster.slurm.config that replica groups need."""

    @property
    def pack(self) -> bool: ...

    def send_small(self, place: Path, name: str, folder: RunFolder, job: Callable[[], None]) -> Any:
        """A job of one process without a GPU; submitit's handle."""


def submit(site: SubmitsGroups, folder: RunFolder, options: Options) -> AttemptOutcome:
    """Tells where each group is, and returns at once, or when all have ended if `wait` is true."""
    if site.pack:
        raise PlanError("cluster.pack=true shares nodes between runs, not between groups; pass cluster.pack=false")
    paths = [folder.group(number) for number in range(options.groups)]
    if any(attempt.ended == "finished" for path in paths for attempt in attempts(path)):
        return AttemptOutcome("finished", 0)
    plan = json.loads((folder.path / PLAN_FILE).read_text())
    address = folder.path / ADDRESS_FILE
    address.unlink(missing_ok=True)
    groups = [Prepared(RunFolder.rejoin(path, folder.code, site.scheduler), plan) for path in paths]
    submitted = all_submitted(site.submit_many(groups))
    print(*map(Submitted.text, submitted), sep="\n", file=sys.stderr)
    if options.lighthouse is None:
        world = plan["world"] * options.groups
        job = LighthouseJob(folder.path, folder.code, paths, world, arguments(options))
        place = folder.path / "logs" / "slurm"
        place.mkdir(parents=True, exist_ok=True)
        folder.close()
        handle = site.send_small(place, f"{folder.path.name}-lighthouse", folder, job)
        print(
            f"job {handle.job_id}: their lighthouse, which ends after them\nlog: {handle.paths.stdout}", file=sys.stderr
        )
    if not site.wait:
        return AttemptOutcome("submitted", 0)
    from src.cluster.wait import wait

    return wait(submitted, site.scheduler)


def introduce(folder: Path, tree: dict[str, Any]) -> None:
    """What the ranks of a group read of their environment, once the lighthouse is there; nothing for a whole run."""
    if folder.parent.name != "groups":
        return
    given = tree["fault_tolerance"]["lighthouse"]
    file = folder.parents[1] / ADDRESS_FILE
    told = time.monotonic()
    while given is None and not file.exists():
        if time.monotonic() > told:
            print(f"waits for the job of the lighthouse, which will write {file}", flush=True)
            told += WORD_SECONDS
        time.sleep(0.5)
    os.environ["REPLICA_GROUP_ID"] = folder.name
    os.environ["TORCHFT_LIGHTHOUSE"] = given or str(file)
    os.environ.setdefault("RUST_LOG", "error")
