"""What launch.py and the classes of the group cluster agree on."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from src.runs.folder import RunFolder


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


class Backend(Protocol):
    """The interface of a cluster backend (config group `cluster`): submit one run folder, or one of replica groups."""

    def submit(self, folder: RunFolder, world: int) -> AttemptOutcome: ...
    def submit_groups(self, folder: RunFolder, world: int, options: Options) -> AttemptOutcome: ...
