"""cluster=local: runs the ranks on this machine.

Not through torch's elastic launcher: its agent ends ranks 30 s after a signal, and a save may take longer, and its
processes start after torch has been imported. The rendezvous store lives in the launcher, as the agent's does.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from src.cluster.backend import AttemptOutcome, JobScheduler, Options
from src.cluster.batch_system import batch_system
from src.cluster.local.gpus import visible_gpus
from src.cluster.local.signals import goes_on, record_end, tell
from src.cluster.rank import RankJob
from src.config.bounds import Count, CountFromZero, Gibibytes, PerNode, Seconds
from src.errors import PlanError
from src.planning.time.site import SiteFacts
from src.runs.folder import RunFolder, attempts, log_folder
from src.runs.frozen_code import importing
from src.runs.records import ATTEMPTS_FILE

if TYPE_CHECKING:
    from src.cluster.local.side_by_side import Node
    from src.cluster.local.supervisor import FirstFailure, RankSupervisor
    from src.cluster.submission import Prepared


@dataclass(frozen=True)
class LocalDevices:
    """What ranks may use here. `count` is None on the CPU: any number of ranks shares it."""

    kind: Literal["cpu", "cuda"]
    count: int | None
    memory_gib: float | None
    name: str
    capability: tuple[int, int] | None = None  # CUDA's compute capability
    host_gib: float | None = None  # memory that ranks on the CPU share


class Local(SiteFacts):
    """cluster=local."""

    scheduler: ClassVar[JobScheduler] = batch_system()

    gpus: CountFromZero | None
    """GPUs to use; null: all that are visible; 0: the CPU."""
    gpu_memory_gib: Gibibytes | None
    """GPU memory in GiB that a plan must fit into; null: as the device says."""
    threads: PerNode | None
    """CPU threads per rank; null: cores divided by ranks."""
    grace_seconds: Seconds
    """Seconds between a stop signal and the end of ranks that do not follow it."""
    at_once: Literal["auto"] | Count | None
    """Points of a sweep that share this machine; auto: as many as its GPUs, or its cores and its memory, hold; null:
    one after the other.
    """

    @property
    def gpus_per_node(self) -> None:
        """All ranks are on this machine."""

    def devices(self) -> LocalDevices:
        """The devices that a plan may count on: `gpus` of them if given, so that a plan for elsewhere can be made."""
        if self.gpus == 0 or (self.gpus is None and visible_gpus().count == 0):
            return LocalDevices("cpu", None, None, "CPU", host_gib=_host_gib())
        here = visible_gpus()
        count = here.count if self.gpus is None else self.gpus
        return LocalDevices("cuda", count, self.gpu_memory_gib or here.memory_gib, here.name, here.capability)

    def check(self, points: Sequence[tuple[Path, Mapping[str, Any]]], *, dry: bool) -> None:
        """Nothing: there is no scheduler, and the plan has been held against the devices."""

    def script(self, points: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
        """None: ranks are started by this process."""
        return ""

    def submit(self, folder: RunFolder, world: int) -> AttemptOutcome:
        """Start `world` ranks of the folder, show rank 0, and return when all have ended.

        Ctrl-C, SIGTERM, SIGHUP and SIGUSR2 reach every rank once; a second Ctrl-C, or `grace_seconds`, ends them.
        """
        from src.cluster.local.supervisor import RankSupervisor

        devices = self.devices()
        if devices.kind == "cuda" and (here := visible_gpus().count) < max(world, self.gpus or 0):
            wanted = f"{world} ranks need a GPU each" if here < world else f"cluster.gpus={self.gpus}"
            raise PlanError(
                f"{wanted}, but {here} are visible here; choose a layout of at most {here} ranks, or cluster.gpus=0"
            )
        job = RankJob(folder.path, folder.code)
        supervisor = RankSupervisor(
            job, folder.begin(world), self._environment(job, world, devices), self.grace_seconds
        )
        return conclude(supervisor, supervisor.run(), folder.path)

    @property
    def shared(self) -> bool:
        """Whether the points of a sweep run side by side."""
        return self.at_once not in (None, 1)

    def submit_side_by_side(self, points: "Sequence[Prepared]", begin: Callable[[Path], bool]) -> dict[Path, int]:
        """Start what fits, and the next when one has ended, each as a process of its own with its own GPUs and cores;
        the folders are closed here and taken by those. The exit code of each that was started.

        `begin`: asked before a run starts, whether it still shall.
        """
        from src.cluster.local.side_by_side import PackedRun, run_here

        devices, worlds = self.devices(), [int(each.plan["world"]) for each in points]
        host = devices.kind == "cpu"
        runs = [
            PackedRun(each.folder.path, each.folder.code, world, _host_bytes(each.plan, world) if host else 0)
            for each, world in zip(points, worlds, strict=True)
        ]
        for each in points:
            each.folder.close()
        return run_here(self._node(devices, max(worlds, default=1)), runs, lambda run: begin(run.folder))

    def _node(self, devices: LocalDevices, largest: int) -> "Node":
        """What the points may be given. On the CPU a slot is a core; a run of more ranks than cores has them all."""
        from src.cluster.local.side_by_side import Node

        cores = tuple(sorted(os.sched_getaffinity(0)))
        most = self.at_once if isinstance(self.at_once, int) else None
        if devices.kind == "cpu":
            slots = tuple(map(str, range(max(len(cores), largest))))
            host_bytes = None if devices.host_gib is None else int(devices.host_gib * 2**30)
            return Node(slots, cores, cpu=True, grace_seconds=self.grace_seconds, host_bytes=host_bytes, most=most)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(visible_gpus().count)]
        names = names[: devices.count]
        if len(names) < largest:
            raise PlanError(f"{largest} ranks need a GPU each, but {len(names)} are visible here")
        return Node(tuple(names), cores, cpu=False, grace_seconds=self.grace_seconds, most=most)

    def submit_groups(self, folder: RunFolder, world: int, options: Options) -> AttemptOutcome:
        """The same for replica groups of `world` ranks each, on GPUs of its own; one that fails is started again."""
        from src.cluster.replicas.supervisor import Groups

        devices, total = self.devices(), world * options.groups
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(devices.count or 0)]
        environment = self._environment(RankJob(folder.path, folder.code), total, devices)
        environments = [dict(environment) for _ in range(options.groups)]
        if devices.kind == "cuda":
            if len(names) < total:
                raise PlanError(f"{total} ranks need a GPU each, but {len(names)} are visible here")
            for number, each in enumerate(environments):
                each["CUDA_VISIBLE_DEVICES"] = ",".join(names[number * world : (number + 1) * world])
        return Groups(folder, options, environments, world, self.grace_seconds).run()

    def _environment(self, job: RankJob, world: int, devices: LocalDevices) -> dict[str, str]:
        """What every rank inherits on top of this process's environment."""
        assert job.source is not None, "local ranks run the frozen code"
        threads = self.threads or os.environ.get("OMP_NUM_THREADS") or max(1, _cores() // world)
        environment = importing(job.source, os.environ.get("PYTHONPATH")) | {"OMP_NUM_THREADS": str(threads)}
        if devices.kind == "cpu":
            return environment | {"CUDA_VISIBLE_DEVICES": ""}
        # Sequence lengths and recompute make block sizes vary; without this the allocator fragments.
        return environment | {"PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")}


def conclude(
    supervisor: "RankSupervisor", failure: "FirstFailure | None", folder: Path, title: str = ""
) -> AttemptOutcome:
    """Say the end, the failing rank's error first, then record it. `title`: whose rank, where groups share a screen;
    what holds for the whole run is then said once, by who started the groups.
    """
    then = "" if title else f"; {goes_on(folder)}"
    if supervisor.killed:
        tell(f"{title}killed ({supervisor.killed}){then}")
        record_end(folder, "killed", supervisor.killed, overrule=True)
        return AttemptOutcome("killed", 130 if supervisor.killed == "Ctrl-C twice" else 137)
    if failure is not None and supervisor.signal is not None and failure.exit_code == 128 + supervisor.sent:
        tell(f"{title}stopped by {supervisor.signal} before training began or after it ended{then}")
        record_end(folder, "stopped", f"{supervisor.signal} outside of training")
        return AttemptOutcome("stopped", 0)
    if failure is not None:
        tell(f"{title}rank {failure.rank} failed first: {failure.error}\n\n{failure.text}\n\nlog: {failure.log}")
        record_end(folder, "failed", f"rank {failure.rank}: {failure.error}", overrule=True)
        return AttemptOutcome("failed", failure.exit_code)
    tried = attempts(folder)
    if not tried:
        tell(f"{folder / ATTEMPTS_FILE}: is gone or unreadable, so how the run ended is not known")
        return AttemptOutcome("failed", 1)
    newest = tried[-1]
    if newest.ended == "finished":
        return AttemptOutcome("finished", 0)
    if newest.ended == "stopped":
        tell(f"{title}stopped{f' by {supervisor.signal}' if supervisor.signal else ''}{then}")
        return AttemptOutcome("stopped", 0)
    tell(f"rank 0 left in the middle of its task\n\nlog: {log_folder(folder, newest.number) / 'rank_0.log'}")
    record_end(folder, "failed", "rank 0 left in the middle of its task")
    return AttemptOutcome("failed", 1)


def _host_bytes(plan: Mapping[str, Any], world: int) -> int:
    """Of all ranks of a run on the CPU, as planned."""
    return int(plan["memory"]["peak"]) * world


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _host_gib() -> float | None:
    """Of this machine; None where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
