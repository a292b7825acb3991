"""What a run folder's lock asks of a batch system: which job a process belongs to, and whether another still lives.

`src.cluster.backend.JobScheduler` extends it with what launcher, sweeps and verdict ask.
"""

from pathlib import Path
from typing import Protocol


class Scheduler(Protocol):
    """A batch system, as far as a lock needs it."""

    def current_job(self) -> str | None:
        """Id of the job that this process belongs to; None outside of any."""
        ...

    def is_live(self, job: str) -> bool:
        """Whether the job is queued or running; also true when nobody can say."""
        ...

    def cancel_command(self, folder: Path, job: str) -> str:
        """What a person types to end the run of this folder, which the job runs."""
        ...


class NoScheduler:
    """Processes on this machine only. A job that somebody recorded counts as live: nobody here can say otherwise."""

    def current_job(self) -> str | None:
        return None

    def is_live(self, job: str) -> bool:
        return True

    def cancel_command(self, folder: Path, job: str) -> str:
        return f"cancel job {job}"
