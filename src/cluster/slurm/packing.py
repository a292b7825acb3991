"""cluster.pack=true: runs that need a part of a node share whole ones. The job of such a node, and what it asks for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.cluster.diagnosis.verdict import ADVICE, Verdict, newest, settle
from src.cluster.local.side_by_side import Node, Pack, PackedRun
from src.cluster.slurm.payload import renewed
from src.cluster.slurm.resources import Resources
from src.cluster.slurm.scheduler import SlurmScheduler
from src.cluster.slurm.time_limit import margin
from src.runs.folder import attempts
from src.runs.records import CANCEL_FILE
from src.runs.submissions import submissions

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

_LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class PackedJob:
    """The payload: which runs, and what of the node is theirs."""

    shares: tuple[PackedRun, ...]
    home: Path  # where relative paths of the configs count from
    gpus: int
    cpu: bool
    grace_seconds: float
    requeues: int
    saved: tuple[str | None, ...] = ()  # the newest checkpoint of each at the last requeue

    def __call__(self) -> None:
        """Ends well when every run has; requeues the job when some were stopped, and leaves failed ones alone."""
        os.chdir(self.home)
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's
        # A run that has not saved in time must not take its neighbours into SLURM's TIMEOUT, which requeues nothing.
        node = Node.here(self.gpus, cpu=self.cpu, grace_seconds=self.grace_seconds - margin(self.grace_seconds))
        pack = Pack(node, [share for share in self.shares if self._ours(share)])
        codes = pack.run(lambda line: print(line, flush=True), self._again)
        if pack.stopped:
            self._go_on_later(requeue)
        if bad := {folder: code for folder, code in codes.items() if code}:
            print(*(f"{folder}: exit code {code}" for folder, code in bad.items()), sep="\n", file=sys.stderr)
            os._exit(1)

    def checkpoint(self) -> "DelayedSubmission":
        """What submitit starts at the requeue."""
        now = tuple(newest(share.folder) for share in self.shares)
        return renewed(replace(self, saved=now), self.requeues if now != self.saved else 0)

    @staticmethod
    def _ours(share: PackedRun) -> bool:
        """Whether it has still to run, in this job: it may have been handed over again meanwhile, or cancelled."""
        job = SlurmScheduler().own_job()
        handed, tried = submissions(share.folder), attempts(share.folder)
        ended = tried[-1].ended if tried and tried[-1].job == job else None
        if handed[-1]["job"] != job or ended in ("finished", "failed"):
            return False
        cancelled = (share.folder / CANCEL_FILE).exists()
        (share.folder / CANCEL_FILE).unlink(missing_ok=True)
        return not cancelled

    def _again(self, share: PackedRun, code: int) -> bool:
        """Whether a run whose rank died by a signal is started once more: as often as a job of its own would be."""
        if code <= 128:
            return False
        words = f"{ADVICE['died']}: {signal.strsignal(code - 128)}"
        job = SlurmScheduler().own_job()
        verdict = settle(share.folder, job, Verdict("died", "requeue", None, words), self.requeues)
        print(f"{share.folder.name}: {verdict.words}", file=sys.stderr, flush=True)
        return verdict.action == "requeue"

    @staticmethod
    def _go_on_later(requeue: Any) -> None:
        """All have saved. At preemption SLURM requeues by itself; at the time limit submitit does."""
        while SlurmScheduler().is_ending(SlurmScheduler().own_job()):
            time.sleep(_LOOK_SECONDS)  # whoever leaves now counts as done, and would not be requeued
        try:
            requeue(signal.SIGUSR2, None)
        except SystemExit:
            print("requeued", flush=True)
            os._exit(0)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"requeue failed: {error}", file=sys.stderr, flush=True)
            os._exit(1)


def small(asked: Resources, gpus_per_node: int) -> bool:
    """Whether two of it fit on a node."""
    return asked.nodes == 1 and 2 * asked.tasks_per_node <= gpus_per_node


def filled(worlds: Mapping[int, int], gpus: int) -> list[list[int]]:
    """Nodes full of runs, by their keys: the large ones first, each on the first node that has room."""
    nodes: list[list[int]] = []
    for key in sorted(worlds, key=lambda each: -worlds[each]):
        room = (node for node in nodes if sum(worlds[each] for each in node) + worlds[key] <= gpus)
        node = next(room, None)
        if node is None:
            nodes.append(node := [])
        node.append(key)
    return nodes


def whole_node(own: Mapping[str, Any], runs: int, gpus: int, cores_per_gpu: int) -> dict[str, Any]:
    """submitit's parameters for a node, out of those for the first of the runs that share it."""
    flags = dict(own["additional_parameters"])
    if "gpus-per-node" in flags:
        flags["gpus-per-node"] = gpus
    if str(flags.get("mem", "")).endswith("M"):
        flags["mem"] = f"{int(flags['mem'][:-1]) // own['ntasks_per_node'] * gpus}M"
    cores = cores_per_gpu * gpus
    return dict(own) | {
        "job_name": f"{own['job_name']}+{runs - 1}",
        "ntasks_per_node": 1,
        "cpus_per_task": cores,
        "srun_args": [f"--cpus-per-task={cores}", *(each for each in own["srun_args"] if "cpus-per-task" not in each)],
        "teardown": [],  # one run's failure is no reason to start the others again
        "additional_parameters": flags,
    }
