"""cluster=slurm: hand run folders to SLURM through submitit, say where they are, and return."""

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from src.checkpoint.config import hardly_fits
from src.cluster.backend import AttemptOutcome, JobScheduler, Options, SilentError
from src.cluster.slurm import client
from src.cluster.slurm.pack import PackedRun
from src.cluster.slurm.packing import PackedJob, filled, small, whole_node
from src.cluster.slurm.payload import QueuedJob
from src.cluster.slurm.resources import Resources, problems
from src.cluster.slurm.scheduler import SlurmScheduler
from src.cluster.submission import Prepared, Submitted
from src.config.base import Config, Line, Names
from src.config.bounds import Count, CountFromZero, Gibibytes, Minutes, PerNode, Seconds
from src.distributed.process.rank_context import joined
from src.errors import FolderError, PlanError
from src.runs.folder import RunFolder
from src.runs.frozen_code import NO_BYTECODE
from src.runs.records import SUBMISSIONS_FILE
from src.runs.submissions import ended_in_shared_job, submissions
from src.storage.json_lines import METRICS_FILE, Lines

Flags = dict[str, str | int | float | bool | None]

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


class Slurm(Config):
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
    """New starts after time limits and failures of the infrastructure; 0: none."""
    array_parallelism: Count
    """Points of one job array that run at the same time."""
    preflight_seconds: Seconds
    """Seconds for the first all-reduce; three times that without a further rank arriving."""
    python: Line | None
    """Interpreter on the nodes; null: this one."""
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

    @field_validator("sbatch")
    @classmethod
    def _leaves_our_flags(cls, flags: Flags) -> Flags:
        if taken := [f"{key} {_OWN[key]}" for key in flags if key in _OWN]:
            raise ValueError(f"{'; '.join(taken)}; leave it out")
        return flags

    @model_validator(mode="after")
    def _grace_fits(self) -> "Slurm":
        if self.grace_seconds >= 60 * self.minutes:
            raise ValueError(
                f"grace_seconds={self.grace_seconds} is no part of minutes={self.minutes}; at most "
                f"{60 * self.minutes - 1} seconds"
            )
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
        plan = json.loads((folder.path / "plan.json").read_text())
        assert plan["world"] == world, "the folder's own plan"
        submitted = self.submit_many([Prepared(folder, plan)])
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

    def script(self, points: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
        """What sbatch would be given: one text per shape of resources."""
        shapes = [Resources.of(self, plan) for _, plan in points]
        packs, groups = self._split(shapes)
        texts = []
        for asked, group in groups.items():
            jobs = [self._job(points[index][0], "dry_run", asked.world) for index in group]
            texts.append(self._text(_place(jobs), self._parameters(asked, jobs), len(jobs)))
        for group in packs:
            jobs = [self._job(points[index][0], "dry_run", shapes[index].world) for index in group]
            texts.append(self._text(_place(jobs), self._pack_parameters(jobs, shapes[group[0]])))
        return "\n".join(texts)

    def submit_many(self, points: Sequence[Prepared]) -> list[Submitted]:
        """One job, or one array per shape. PlanError before sbatch for what the partition lacks, or with its words.

        Every folder's lock is released: from here on the job is its writer.
        """
        asked = [Resources.of(self, point.plan) for point in points]
        self._check(asked, [point.folder.path for point in points])
        for point in points:
            if (slow := slow_saves(point.folder.path, self.grace_seconds)) is not None:
                print(f"warning: {slow}", file=sys.stderr)
        packs, groups = self._split(asked)
        done: dict[int, Submitted] = {}
        for shape, group in groups.items():
            folders = [points[index].folder for index in group]
            done |= zip(group, self._submit(folders, shape), strict=True)
        for group in packs:
            folders = [points[index].folder for index in group]
            done |= zip(group, self._submit_pack(folders, [asked[index] for index in group]), strict=True)
        return [done[index] for index in range(len(points))]

    def _split(self, asked: Sequence[Resources]) -> tuple[list[list[int]], dict[Resources, list[int]]]:
        """Indices of the points that share each whole node, and of those that are jobs of their own, by shape."""
        together = [index for index, each in enumerate(asked) if self.pack and small(each, self.gpus_per_node)]
        packs = filled({index: asked[index].world for index in together}, self.gpus_per_node)
        alone = [index for index in range(len(asked)) if index not in together]
        groups = _grouped([asked[index] for index in alone])
        return packs, {shape: [alone[place] for place in places] for shape, places in groups.items()}

    def _check(self, asked: Sequence[Resources], folders: Sequence[Path]) -> None:
        if not client.available():
            raise PlanError("cluster=slurm: no sbatch on this machine; go to a login node, or pass cluster=local")
        try:
            names, partition = client.partitions(), self.partition or client.default_partition()
            found = problems(self, asked, partition, client.nodes(partition) if partition else [], names)
            live = _live(folders)
        except SilentError as error:
            raise PlanError(f"cluster=slurm: SLURM does not answer: {error}") from error
        if found:
            raise PlanError(found)
        if live:
            raise FolderError(live)

    def _submit(self, folders: Sequence[RunFolder], asked: Resources) -> list[Submitted]:
        jobs = [self._job(folder.path, folder.code, asked.world) for folder in folders]
        place = _place(jobs)
        place.mkdir(parents=True, exist_ok=True)
        handles = self._send(place, self._parameters(asked, jobs), jobs)
        return [
            _recorded(folder, self._submitted(handle, folder), asked)
            for folder, handle in zip(folders, handles, strict=True)
        ]

    def _submit_pack(self, folders: Sequence[RunFolder], asked: Sequence[Resources]) -> list[Submitted]:
        """One job for all of them, on a node of their own."""
        pairs = list(zip(folders, asked, strict=True))
        jobs = [self._job(folder.path, folder.code, each.world) for folder, each in pairs]
        shares = tuple(PackedRun(job.folder, job.code, job.world) for job in jobs)
        pack = PackedJob(shares, Path.cwd(), self.gpus_per_node, self.device == "cpu", self.grace_seconds)
        place = _place(jobs)
        place.mkdir(parents=True, exist_ok=True)
        (handle,) = self._send(place, self._pack_parameters(jobs, asked[0]), [pack])
        submitted = [self._submitted(handle, folder) for folder in folders]
        return [_recorded(*each, packed=True) for each in zip(folders, submitted, asked, strict=True)]

    def _submitted(self, handle: Any, folder: RunFolder) -> Submitted:
        """`handle`: submitit's, of the job."""
        job = str(handle.job_id)
        return Submitted(job, folder.path, Path(handle.paths.stdout), self.scheduler.cancel_command(job))

    def _send(self, place: Path, parameters: dict[str, Any], jobs: Sequence[Callable[[], None]]) -> list[Any]:
        """submitit's handles. PlanError with sbatch's words and what it was given."""
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError

        executor = SlurmExecutor(place, max_num_timeout=self.requeues, python=self._python)
        executor.update_parameters(**parameters)
        try:
            with _outside_of_jobs(), executor.batch():
                return [executor.submit(job) for job in jobs]
        except FailedJobError as error:
            words = str(error).partition("sbatch:")
            said = (words[1] + words[2]).strip() or str(error)
            given = self._text(place, parameters, len(jobs))
            raise PlanError([f"sbatch refused: {said}", "it was given:", given]) from error

    def _pack_parameters(self, jobs: Sequence[QueuedJob], asked: Resources) -> dict[str, Any]:
        return whole_node(self._parameters(asked, jobs[:1]), len(jobs), self.gpus_per_node, self.cpus_per_gpu)

    def _job(self, folder: Path, code: str, world: int) -> QueuedJob:
        return QueuedJob(folder, code, world, Path.cwd(), self.device, self.preflight_seconds)

    def _text(self, place: Path, parameters: Mapping[str, Any], count: int = 1) -> str:
        """As submitit will write it; also where there is no SLURM."""
        from submitit.slurm.slurm import _make_sbatch_string

        command = f"{self._python} -u -m submitit.core._submit {shlex.quote(str(place))}"
        text: str = _make_sbatch_string(command, place, map_count=count if count > 1 else None, **parameters)
        return text

    @property
    def _python(self) -> str:
        return self.python or shlex.quote(sys.executable)

    def _parameters(self, asked: Resources, jobs: Sequence[QueuedJob]) -> dict[str, Any]:
        """In submitit's words."""
        parameters: dict[str, Any] = {
            "job_name": _name(jobs),
            "partition": self.partition,
            "nodes": asked.nodes,
            "ntasks_per_node": asked.tasks_per_node,
            "cpus_per_task": asked.cpus_per_task,
            "time": asked.minutes,
            "signal_delay_s": self.grace_seconds,
            "array_parallelism": self.array_parallelism,
            "stderr_to_stdout": True,
            "wckey": None,  # sites that know no keys refuse submitit's own
            "setup": [f"export OMP_NUM_THREADS={asked.cpus_per_task}", *self.setup, *_setup(jobs)],
            "srun_args": [*_flags({"kill-on-bad-exit": 1, "cpus-per-task": asked.cpus_per_task} | self.srun)],
            "teardown": self._teardown(),
        }
        extra: Flags = {
            **{key: getattr(self, key) for key in ("account", "qos", "constraint", "exclude")},
            "gpus-per-node": asked.tasks_per_node,
            "mem": None if asked.memory_gib is None else f"{int(1024 * asked.memory_gib)}M",
            "requeue" if self.requeues else "no-requeue": True,
        }
        kept = {key: value for key, value in (extra | self.sbatch).items() if value not in (None, False)}
        return parameters | {"additional_parameters": kept}

    def _teardown(self) -> list[str]:
        """After the ranks: why they failed, and whether another start may help. The node's own scontrol acts on it."""
        step = shlex.join(["srun", "--overlap", "--nodes=1", "--ntasks=1", *_flags(self.srun)])
        judge = [f"{step} {self._python}" if self.srun else self._python, "-m", "src.cluster.diagnosis.verdict"]
        return [
            "code=$?",
            'if [ "$code" -ne 0 ]; then',
            "  trap '' TERM",
            f'  answer=$({" ".join(judge)} "${{folders[$point]}}" --requeues {self.requeues})',
            '  case "$answer" in',
            '    requeue*) scontrol requeue "$SLURM_JOB_ID"',
            '      bad="${answer#requeue}"',
            # Beside the nodes that the site's facts or an earlier failure left out: an update replaces the list.
            '      out=$(scontrol show job "$SLURM_JOB_ID" | sed -En "s/.*ExcNodeList=([^ (]*).*/\\1/p" | head -n 1)',
            '      [ -z "$bad" ] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${out:+$out,}${bad# }" ;;',
            "  esac",
            "fi",
            'exit "$code"',
        ]


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Inside an allocation its facts would become the new job's; but which SLURM it is must stay known."""
    from submitit.helpers import clean_env

    known = {key: os.environ[key] for key in ("SLURM_CONF", "SLURM_CLUSTERS") if key in os.environ}
    with clean_env():
        os.environ.update(known)
        yield


def slow_saves(folder: Path, grace_seconds: float) -> str | None:
    """A warning when this run's own saves hardly fit into the time between the signal and the end."""
    seconds = [line.get("checkpoint/write_seconds", 0.0) for line in Lines(folder / METRICS_FILE).read()]
    slow = hardly_fits(max(seconds, default=0.0), grace_seconds)
    return None if slow is None else f"{folder}: {slow}"


def _live(folders: Sequence[Path]) -> list[str]:
    """A complaint for each folder whose newest job SLURM has not done with."""
    jobs = {
        folder: earlier[-1]["job"]
        for folder in folders
        if (earlier := submissions(folder)) and not ended_in_shared_job(folder)
    }
    states = client.states(jobs.values()) if jobs else {}
    return [
        f"{folder}: job {job} is queued or running it; wait for it, or scancel {job}"
        for folder, job in jobs.items()
        if states.get(job, "COMPLETED") not in client.ENDED
    ]


def _recorded(folder: RunFolder, submitted: Submitted, asked: Resources, *, packed: bool = False) -> Submitted:
    record = {"job": submitted.job, "submitted": round(time.time(), 3), "log": str(submitted.log)}
    Lines(folder.path / SUBMISSIONS_FILE).append(record | {"resources": asdict(asked), "packed": packed})
    folder.close()
    return submitted


def _grouped(asked: Sequence[Resources]) -> dict[Resources, list[int]]:
    groups: dict[Resources, list[int]] = {}
    for index, each in enumerate(asked):
        groups.setdefault(each, []).append(index)
    return groups


def _name(jobs: Sequence[QueuedJob]) -> str:
    first, more = jobs[0].folder, f"+{len(jobs) - 1}" if len(jobs) > 1 else ""
    return (f"{first.parents[1].name}-" if first.parent.name == "groups" else "") + first.name + more


def _place(jobs: Sequence[QueuedJob]) -> Path:
    """Where SLURM's files go: a run's own folder, or one beside the runs for an array."""
    first = jobs[0].folder
    if len(jobs) == 1:
        return first / "logs" / "slurm"
    return first.parent / "slurm" / f"{first.name}+{len(jobs) - 1}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _setup(jobs: Sequence[QueuedJob]) -> list[str]:
    """Ranks import the frozen code of their own point, wherever they start."""
    folders = " ".join(shlex.quote(str(job.folder)) for job in jobs)
    codes = " ".join(job.code for job in jobs)
    return [
        f"folders=({folders})",
        f"codes=({codes})",
        "point=${SLURM_ARRAY_TASK_ID:-0}",
        'export PYTHONPATH="${folders[$point]}/code/${codes[$point]}${PYTHONPATH:+:$PYTHONPATH}"',
        "export PYTHONSAFEPATH=1",  # or `python -m` would find the work tree first
        *(f"export {key}={value}" for key, value in NO_BYTECODE.items()),
    ]


def _flags(flags: Mapping[str, str | int | float | bool | None]) -> list[str]:
    kept = {key: value for key, value in flags.items() if value not in (None, False)}
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in kept.items()]
