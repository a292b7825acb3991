"""cluster=slurm: hand run folders to SLURM through submitit, say where they are, and return."""

import contextlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from src.cluster.backend import AttemptOutcome, JobScheduler, Options, SilentError
from src.cluster.local.side_by_side import PackedRun
from src.cluster.slurm import client, later
from src.cluster.slurm.batch_script import ON_NODE, Flag, flags, job_folder, job_name, kept, left_out, setup, teardown
from src.cluster.slurm.packing import PackedJob, filled, small, whole_node
from src.cluster.slurm.payload import QueuedJob, slow_nodes
from src.cluster.slurm.resources import Resources, problems
from src.cluster.slurm.scheduler import SlurmScheduler
from src.cluster.slurm.time_limit import slow_saves
from src.cluster.submission import Prepared, Submitted, all_submitted
from src.config.base import Line, Names, printable
from src.config.bounds import Count, CountFromZero, Gibibytes, Minutes, PerNode, Seconds
from src.distributed.process.rank_context import joined
from src.errors import FolderError, PlanError, UserError
from src.planning.time.site import SiteFacts
from src.runs.folder import RunFolder
from src.runs.records import CANCEL_FILE, PLAN_FILE, SUBMISSIONS_FILE
from src.runs.submissions import ended_in_shared_job, submissions
from src.storage.atomic_write import atomic_write
from src.storage.json_lines import Lines
from src.storage.streams import to_stderr

Flags = dict[str, Flag]

REFUSED_FILE = "refused.sh"  # what sbatch was given when it refused
SILENT = "'sinfo' says whether its controller is up; dry_run=true plans without it"
_FLAG = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

# What the plan, the site's own keys or the requeue chain decide.
_OWN = {
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node", "cpus-per-task"), "follows from parallel and cluster"),
    **dict.fromkeys(("output", "error", "open-mode", "array", "job-name", "chdir"), "is where logs and runs are found"),
    "signal": "is cluster.grace_seconds",
    "time": "is cluster.minutes",
    "requeue": "is cluster.requeues",
    **{key: f"is cluster.{key}" for key in ("partition", "account", "qos", "constraint", "exclude")},
}


@dataclass(frozen=True)
class SlurmDevices:
    """Nodes are somewhere else: nothing is asked of this machine."""

    count: None
    memory_gib: float | None
    host_gib: None = None
    capability: None = None


class Slurm(SiteFacts):
    """Facts of a site."""

    scheduler: ClassVar[JobScheduler] = SlurmScheduler()

    partition: Line | None
    """Partition to queue in, several as "a,b"; null: SLURM's default."""
    account: Line | None
    """Account that pays; null: SLURM's default."""
    qos: Line | None
    """Quality of service; null: SLURM's default."""
    constraint: Line | None
    """Features that nodes must have, such as "h100&ib"; null: none."""
    exclude: Line | None
    """Nodes that must not be used, such as "n[3-5],n9"; null: none."""
    gpus_per_node: PerNode
    """GPUs of a node; a run takes whole nodes, or a part of one."""
    cpus_per_gpu: PerNode
    """Cores of each rank."""
    memory_gib_per_gpu: Gibibytes | None
    """Host memory of each rank in GiB; null: what the site gives."""
    gpu_memory_gib: Gibibytes | None
    """GPU memory in GiB that a plan must fit into, such as 80; null: not judged."""
    device: Literal["cuda", "cpu"]
    """What ranks compute on; cpu: GPUs are asked for but not used, as on a test cluster."""
    minutes: Minutes
    """Time limit of one attempt; a run longer than it is requeued."""
    grace_seconds: Annotated[int, Field(gt=0, le=65535)]  # SLURM keeps 16 bits of it
    """Seconds from USR2 to the time limit; must exceed one save."""
    requeues: CountFromZero
    """New starts after time limits and failures of machines since the last new checkpoint; 0: none."""
    after: Names | None
    """Jobs, or run folders (a glob may name several), whose newest jobs must have ended well first; null: none."""
    array_parallelism: Count
    """Points of one job array that run at the same time."""
    preflight_seconds: Seconds
    """Seconds for the first all-reduce; three times that without a further rank arriving."""
    preflight_gpus: bool
    """True: each rank first times a product, a copy and a sum over its node; one 15 % below its twins is left out."""
    python: Line | None
    """Interpreter on the nodes, a path or a name, without arguments; null: this one."""
    setup: Names
    """Lines of the batch script before the ranks start, such as "module load cuda"."""
    sbatch: Flags
    """Further flags, verbatim, such as {mail-type: END, exclusive: true}; a null drops a flag that is derived."""
    srun: Flags
    """Further flags of the step, verbatim, such as those of a container."""
    wait: bool
    """True: show the runs until all have ended; the exit code says whether one failed."""
    pack: bool
    """True: runs of at most half a node share whole nodes, each with its own GPUs, cores, folder and end."""

    @field_validator("sbatch", "srun")
    @classmethod
    def _each_in_one_line(cls, flags: Flags) -> Flags:
        """A line break would begin a line of the script that nobody asked for."""
        for key, value in flags.items():
            if not _FLAG.fullmatch(key):
                raise ValueError(f"{key!r} is no flag; it has letters, digits and - only")
            if isinstance(value, str):
                printable(value)
        return flags

    @field_validator("sbatch")
    @classmethod
    def _leaves_our_flags(cls, flags: Flags) -> Flags:
        if taken := [f"{key} {_OWN[name]}" for key in flags if (name := key.replace("_", "-")) in _OWN]:
            raise ValueError(f"{'; '.join(taken)}; leave it out")
        return flags

    @model_validator(mode="after")
    def _grace_fits(self) -> "Slurm":
        if self.grace_seconds >= 60 * self.minutes:
            raise ValueError(
                f"grace_seconds={self.grace_seconds} is no part of minutes={self.minutes}; at most "
                f"{60 * self.minutes - 1} seconds"
            )
        if self.after and "dependency" in self.sbatch:
            raise ValueError("sbatch.dependency and after both say what to wait for; pass one of them")
        return self

    @property
    def asks_gpus(self) -> bool:
        return "gpus-per-node" not in self.sbatch

    def devices(self) -> SlurmDevices:
        if joined():
            raise PlanError("cluster=slurm submits a job that starts its own ranks; leave the outer launcher out")
        return SlurmDevices(None, self.gpu_memory_gib)

    def submit(self, folder: RunFolder, world: int) -> AttemptOutcome:
        """A single run: tells where it is, and returns at once, or when it has ended if `wait` is true."""
        if folder.finished:
            return AttemptOutcome("finished", 0)
        plan = json.loads((folder.path / PLAN_FILE).read_text())
        assert plan["world"] == world, "the folder's own plan"
        submitted = all_submitted(self.submit_many([Prepared(folder, plan)]))
        print(*map(Submitted.text, submitted), sep="\n", file=sys.stderr)
        if not self.wait:
            return AttemptOutcome("submitted", 0)
        from src.cluster.wait import wait

        return wait(submitted, self.scheduler)

    def submit_groups(self, folder: RunFolder, world: int, options: Options) -> AttemptOutcome:
        """The same for replica groups, each as a job of its own."""
        from src.cluster.slurm.replica_groups import submit

        return submit(self, folder, options)

    def send_small(self, place: Path, name: str, folder: RunFolder, job: Callable[[], None]) -> Any:
        """A job of one process without a GPU, which runs the folder's frozen code; submitit's handle."""
        asked = Resources(nodes=1, tasks_per_node=1, cpus_per_task=1, memory_gib=None, minutes=self.minutes)
        parameters = self._parameters(asked, [self._job(folder.path, folder.code, 1)]) | {"job_name": name}
        parameters["additional_parameters"].pop("gpus-per-node", None)
        del parameters["teardown"]
        (handle,) = self._send(place, parameters, [job])
        return handle

    def start_later(self, command: Sequence[str], place: Path) -> str | None:
        """A job that types this command (launch.py and its arguments) when those of `after` have ended well, and what
        to tell of it; None where all of them have ended. Its log is below `place`.
        """
        if not self.after or not (before := later.live_before(self.after)):
            return None
        place.mkdir(parents=True, exist_ok=True)
        with _outside_of_jobs():
            job = later.submit(later.starter(self, self._python, command, Path.cwd(), place / "%j.log"))
        when = f"when {', '.join(before)} ended well, since samples are of all shards"
        return f"job {job} starts this command {when}; log: {place / f'{job}.log'}"

    def check(self, points: Sequence[tuple[Path, Mapping[str, Any]]], *, dry: bool) -> None:
        """PlanError for what the partition lacks, else with sbatch's own words on accounts, limits and flags."""
        if not client.available():
            if dry:
                return
            raise PlanError("cluster=slurm: no sbatch on this machine; go to a login node, or pass cluster=local")
        asked = [Resources.of(self, plan) for _, plan in points]
        try:
            names, partition = client.partitions(), self.partition or client.default_partition()
            found = problems(self, asked, partition, client.nodes(partition) if partition else [], names)
            if not found:
                with _outside_of_jobs():
                    refusals = [client.refusal(text) for text in self._texts(points)]
                found = [f"cluster=slurm: sbatch would refuse: {words}" for words in dict.fromkeys(refusals) if words]
        except SilentError as error:
            if dry:
                to_stderr([f"warning: SLURM does not answer, so nobody has asked it: {error}"])
                return
            raise PlanError(f"cluster=slurm: SLURM does not answer: {error}; {SILENT}") from error
        if found:
            raise PlanError(found)

    def script(self, points: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
        """What sbatch would be given: one text per shape of resources."""
        return "\n".join(self._texts(points))

    def _texts(self, points: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[str]:
        asked = dict(enumerate(Resources.of(self, plan) for _, plan in points))
        packs, groups = self._split(asked)
        texts = []
        for shape, group in groups.items():
            jobs = [self._job(points[index][0], "dry_run", shape.world) for index in group]
            texts.append(self._text(job_folder(jobs), self._parameters(shape, jobs), len(jobs)))
        for group in packs:
            jobs = [self._job(points[index][0], "dry_run", asked[index].world) for index in group]
            texts.append(self._text(job_folder(jobs), self._pack_parameters(jobs, asked[group[0]])))
        return texts

    def submit_many(self, points: Sequence[Prepared]) -> list[Submitted | UserError]:
        """One job, or one array per shape. An error for points whose earlier job lives, or whose job sbatch refuses.

        The lock of every folder that is submitted is released: from here on the job is its writer.
        """
        try:
            done: dict[int, Submitted | UserError] = dict(_live([point.folder.path for point in points]))
        except SilentError as error:
            raise PlanError(f"cluster=slurm: SLURM does not answer: {error}; {SILENT}") from error
        slow = (slow_saves(point.folder.path, self.grace_seconds) for point in points)
        to_stderr(f"warning: {each}" for each in slow if each is not None)
        asked = {index: Resources.of(self, each.plan) for index, each in enumerate(points) if index not in done}
        packs, groups = self._split(asked)
        for together, group in [(False, group) for group in groups.values()] + [(True, group) for group in packs]:
            given = [(points[index].folder, asked[index]) for index in group]
            try:
                handed: Sequence[Submitted | UserError] = self._submit_pack(given) if together else self._submit(given)
            except UserError as error:
                handed = [error] * len(group)
            done |= zip(group, handed, strict=True)
        return [done[index] for index in range(len(points))]

    def _split(self, asked: Mapping[int, Resources]) -> tuple[list[list[int]], dict[Resources, list[int]]]:
        """Keys of the points that share each whole node, and of those that are jobs of their own, by shape."""
        together = {key: each.world for key, each in asked.items() if self.pack and small(each, self.gpus_per_node)}
        groups: dict[Resources, list[int]] = {}
        for key, each in asked.items():
            if key not in together:
                groups.setdefault(each, []).append(key)
        return filled(together, self.gpus_per_node), groups

    def _submit(self, given: Sequence[tuple[RunFolder, Resources]]) -> list[Submitted]:
        """All of one shape."""
        asked = given[0][1]
        jobs = [self._job(folder.path, folder.code, asked.world) for folder, _ in given]
        place = job_folder(jobs)
        place.mkdir(parents=True, exist_ok=True)
        handles = self._send(place, self._parameters(asked, jobs), jobs)
        return [self._recorded(folder, handle, asked) for (folder, _), handle in zip(given, handles, strict=True)]

    def _submit_pack(self, given: Sequence[tuple[RunFolder, Resources]]) -> list[Submitted]:
        """One job for all of them, on a node of their own."""
        jobs = [self._job(folder.path, folder.code, each.world) for folder, each in given]
        shares = tuple(PackedRun(job.folder, job.code, job.world) for job in jobs)
        cpu, home = self.device == "cpu", Path.cwd()
        pack = PackedJob(shares, home, self.gpus_per_node, cpu, self.grace_seconds, self.requeues)
        place = job_folder(jobs)
        place.mkdir(parents=True, exist_ok=True)
        for folder, _ in given:
            (folder.path / CANCEL_FILE).unlink(missing_ok=True)  # from here on it is about this submission
        (handle,) = self._send(place, self._pack_parameters(jobs, given[0][1]), [pack])
        return [self._recorded(folder, handle, each, packed=True) for folder, each in given]

    def _recorded(self, folder: RunFolder, handle: Any, asked: Resources, *, packed: bool = False) -> Submitted:
        """`handle`: submitit's, of the job."""
        job, log = str(handle.job_id), Path(handle.paths.stdout)
        record = {"job": job, "submitted": round(time.time(), 3), "log": str(log)}
        Lines(folder.path / SUBMISSIONS_FILE).append(record | {"resources": asdict(asked), "packed": packed})
        folder.close()
        return Submitted(job, folder.path, log, self.scheduler.cancel_command(folder.path, job))

    def _send(self, place: Path, parameters: dict[str, Any], jobs: Sequence[Callable[[], None]]) -> list[Any]:
        """submitit's handles. PlanError with sbatch's words and the file of what it was given."""
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError

        executor = SlurmExecutor(place, max_num_timeout=self.requeues, python=f"{self._python} {ON_NODE}")
        executor.update_parameters(**parameters)
        try:
            with _outside_of_jobs(), executor.batch():
                return [executor.submit(job) for job in jobs]
        except FailedJobError as error:
            words = str(error).partition("sbatch:")
            said = (words[1] + words[2]).strip() or str(error)
            script = place / REFUSED_FILE
            atomic_write(script, self._text(place, parameters, len(jobs)))
            raise PlanError(f"sbatch refused: {said}; it was given {script}") from error

    def _pack_parameters(self, jobs: Sequence[QueuedJob], asked: Resources) -> dict[str, Any]:
        return whole_node(self._parameters(asked, jobs[:1]), len(jobs), self.gpus_per_node, self.cpus_per_gpu)

    def _job(self, folder: Path, code: str, world: int) -> QueuedJob:
        return QueuedJob(folder, code, world, Path.cwd(), self.device, self.preflight_seconds, self.preflight_gpus)

    def _text(self, place: Path, parameters: Mapping[str, Any], count: int = 1) -> str:
        """As submitit will write it; also where there is no SLURM."""
        from submitit.slurm.slurm import _make_sbatch_string

        command = f"{self._python} {ON_NODE} -u -m submitit.core._submit {shlex.quote(str(place))}"
        text: str = _make_sbatch_string(command, place, map_count=count if count > 1 else None, **parameters)
        return text

    @property
    def _python(self) -> str:
        """As a word of the script."""
        return shlex.quote(sys.executable if self.python is None else os.path.expanduser(self.python))

    @cached_property
    def _step_flags(self) -> Flags:
        """Of srun, asked once a command: fifty shapes of jobs would start fifty processes."""
        return {"wait-for-children": True} if client.waits_for_children() else {}

    @cached_property
    def _requeue(self) -> Flags:
        if not self.requeues:
            return {"no-requeue": True}
        return {"requeue": "expedite" if client.expedites() else True}

    def _parameters(self, asked: Resources, jobs: Sequence[QueuedJob]) -> dict[str, Any]:
        """In submitit's words."""
        step: Flags = {"kill-on-bad-exit": 1, "cpus-per-task": asked.cpus_per_task, **self._step_flags}
        parameters: dict[str, Any] = {
            "job_name": job_name(jobs),
            "partition": self.partition,
            "nodes": asked.nodes,
            "ntasks_per_node": asked.tasks_per_node,
            "cpus_per_task": asked.cpus_per_task,
            "time": asked.minutes,
            "signal_delay_s": self.grace_seconds,
            "array_parallelism": self.array_parallelism,
            "stderr_to_stdout": True,
            "wckey": None,  # sites that know no keys refuse submitit's own
            # scancel --signal=USR2 --full reaches this shell, too: it is for the ranks, and srun passes it on.
            "setup": ["trap : USR2", f"export OMP_NUM_THREADS={asked.cpus_per_task}", *self.setup, *setup(jobs)],
            "srun_args": flags(step | self.srun),
            "teardown": teardown(self._python, self.requeues, self.srun, self.exclude),
        }
        extra: Flags = {
            **{key: getattr(self, key) for key in ("account", "qos", "constraint")},
            "exclude": left_out(self.exclude, self.partition, slow_nodes(job.folder for job in jobs), asked.nodes),
            "gpus-per-node": asked.tasks_per_node,
            "mem": None if asked.memory_gib is None else f"{int(1024 * asked.memory_gib)}M",
            **self._requeue,
            **later.waiting(self.after),
        }
        return parameters | {"additional_parameters": kept(extra | self.sbatch)}


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Inside an allocation its facts would become the new job's; but which SLURM it is must stay known."""
    from submitit.helpers import clean_env

    known = {key: os.environ[key] for key in ("SLURM_CONF", "SLURM_CLUSTERS") if key in os.environ}
    with clean_env():
        os.environ.update(known)
        yield


def _live(folders: Sequence[Path]) -> dict[int, FolderError]:
    """For each folder whose newest job SLURM has not done with, by its place; SilentError."""
    jobs = {
        index: earlier[-1]["job"]
        for index, folder in enumerate(folders)
        if (earlier := submissions(folder)) and not ended_in_shared_job(folder)
    }
    states = Slurm.scheduler.states(jobs.values()) if jobs else {}
    return {
        index: FolderError(
            f"{folders[index]}: job {job} is queued or running it; wait for it, or "
            f"{Slurm.scheduler.cancel_command(folders[index], job)}"
        )
        for index, job in jobs.items()
        if job in states and states[job].live
    }
