"""The one protocol of a cluster backend: a config class of group `cluster` that starts the ranks of run folders.

`Backend` extends `src.runs.cluster.Cluster`, what plan and tasks ask of it; `JobScheduler` extends
`src.runs.scheduler.Scheduler`, what a run folder's lock asks. Those two parts stand on their callers' floor, since
imports go downward; nothing else is asked of a backend. tests/cluster/fake_backend.py is the smallest one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from src.errors import ConfigError, UserError
from src.runs.cluster import Cluster
from src.runs.folder import RunFolder
from src.runs.scheduler import Scheduler

if TYPE_CHECKING:
    from src.cluster.submission import Prepared, Submitted


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended and the exit code that says so: 0 also for a run that saved and stopped on a signal."""

    status: Literal["finished", "stopped", "failed", "killed", "submitted"]
    exit_code: int


@runtime_checkable
class Options(Protocol):
    """Of src.fault_tolerance.config."""

    @property
    def groups(self) -> int: ...
    @property
    def min_groups(self) -> int: ...
    @property
    def lighthouse(self) -> str | None: ...
    @property
    def heartbeat_seconds(self) -> float: ...
    @property
    def join_seconds(self) -> float: ...
    @property
    def restarts(self) -> int: ...
    @property
    def backoff_seconds(self) -> float: ...


class SilentError(Exception):
    """A scheduler is absent, failed or did not answer; the text is its own words."""


@dataclass(frozen=True)
class JobState:
    """A job in its scheduler; `word` is the scheduler's own for it. unknown: the scheduler does not answer."""

    phase: Literal["queued", "running", "ended", "unknown"]
    word: str

    @property
    def live(self) -> bool:
        """Whether it waits or runs."""
        return self.phase in ("queued", "running")


@dataclass(frozen=True)
class JobStart:
    """Of the job that this process belongs to: which start of it, and on which nodes."""

    job: str
    restarts: int  # 0: the first start
    nodes: tuple[str, ...]  # in the order of the ranks


@dataclass(frozen=True)
class NodeEvent:
    """What the scheduler's log says happened on a node."""

    node: str
    words: str


@dataclass(frozen=True)
class LogFindings:
    """What a scheduler itself wrote into the log of one start of a job: causes of a failure that no rank could tell."""

    out_of_memory: bool = False  # of the host
    node_down: NodeEvent | None = None
    died: NodeEvent | None = None  # a process, by a signal, before the scheduler began to end the others


class JobScheduler(Scheduler, Protocol):
    """A batch system: its jobs, and the facts of the environment of one. Hashable; two of one system are equal."""

    def states(self, jobs: Iterable[str]) -> dict[str, JobState]:
        """Of those that it still knows, asked at once; SilentError."""

    def cancel(self, folder: Path, job: str) -> str | None:
        """End the run in `folder`, after it has saved; what went wrong, if anything. SilentError where nobody can ask
        the scheduler from this machine.
        """

    def requeue(self, job: str) -> None:
        """End this start of the job, and start it again later; what the scheduler says of it goes to its own log."""

    def current_start(self) -> JobStart:
        """Only inside of a job."""

    def is_ending(self, job: str) -> bool:
        """Whether the scheduler is ending it or starting it again by itself; also false when it does not answer."""

    def log_findings(self, log: Path, nodes: Sequence[str]) -> LogFindings:
        """Of the newest start in this log; `nodes` in the order of the ranks."""


@runtime_checkable
class Backend(Cluster, Protocol):
    """Starts the ranks of run folders."""

    scheduler: ClassVar[JobScheduler]

    def check(self, points: Sequence[tuple[Path, Mapping[str, Any]]], *, dry: bool) -> None:
        """UserError for what the scheduler would refuse of these folders and their plans: it is asked before data are
        tokenised and folders are made. `dry`: nothing is to be submitted, so a machine without a scheduler will do.
        """

    def script(self, points: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
        """What the scheduler would be given for these folders and their plans; empty where there is none."""

    def submit(self, folder: RunFolder, world: int) -> AttemptOutcome:
        """One run of `world` ranks; returns when it has ended, or when it is queued."""

    def submit_groups(self, folder: RunFolder, world: int, options: Options) -> AttemptOutcome:
        """The same for replica groups of `world` ranks each."""


@runtime_checkable
class QueueBackend(Backend, Protocol):
    """A backend whose jobs wait in a queue and outlive the command: a sweep hands over all of its points at once."""

    @property
    def wait(self) -> bool:
        """Whether the command shall stay until the jobs have ended."""

    def submit_many(self, points: "Sequence[Prepared]") -> "list[Submitted | UserError]":
        """In the order of `points`; an error for each that the scheduler refused, which keeps no other from being
        queued. The locks of the folders of those that are queued are released.
        """


@runtime_checkable
class LaterBackend(Backend, Protocol):
    """A backend whose jobs may wait for others."""

    def start_later(self, command: Sequence[str], place: Path) -> str | None:
        """A small job that types `command` once those that it shall wait for have ended well, and what to tell of it;
        None where there is nothing to wait for.
        """


@runtime_checkable
class SharedBackend(Backend, Protocol):
    """A backend of this machine that may run several points of a sweep at once."""

    @property
    def shared(self) -> bool:
        """Whether it shall."""

    def submit_side_by_side(self, points: "Sequence[Prepared]", begin: Callable[[Path], bool]) -> dict[Path, int]:
        """Returns when all have ended, with the exit code of each that was started; the folders are closed. `begin`:
        asked before each start, whether it still shall.
        """


def backend_of(cluster: Cluster) -> Backend:
    """The section `cluster` of a run, as the launcher uses it."""
    if not isinstance(cluster, Backend):
        raise ConfigError(f"cluster._target_: {type(cluster).__name__} starts no ranks; choose another cluster=")
    return cluster
