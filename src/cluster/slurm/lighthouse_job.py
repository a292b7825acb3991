"""The lighthouse of a run as a SLURM job of its own: groups come and go, it stays until the last of them has ended."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.cluster.backend import SilentError
from src.cluster.replicas.lighthouse import ADDRESS_FILE, command
from src.cluster.slurm import client
from src.cluster.slurm.scheduler import SlurmScheduler
from src.runs.folder import RunFolder, attempts, end
from src.runs.submissions import submissions
from src.storage.atomic_write import atomic_write

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

POLL_SECONDS = 5.0
MISSES = 3  # answers of SLURM in a row that know no group any more


@dataclass(frozen=True)
class LighthouseJob:
    """The payload."""

    folder: Path
    code: str  # hash8 of the snapshot
    groups: Sequence[Path]
    world: int  # ranks of all groups
    arguments: tuple[str, ...]  # of src/fault_tolerance/lighthouse.py

    def __call__(self) -> None:
        """Ends when no group is queued or running; the run's attempt begins and ends with it."""
        with RunFolder.rejoin(self.folder, self.code, SlurmScheduler()) as folder:
            folder.begin(self.world)
            environment = os.environ | {"RUST_LOG": os.environ.get("RUST_LOG", "warn")}
            pipe = subprocess.PIPE
            with subprocess.Popen(
                command(self.arguments), stdin=pipe, stdout=pipe, text=True, env=environment
            ) as server:
                assert server.stdout is not None
                address = server.stdout.readline().strip()
                atomic_write(self.folder / ADDRESS_FILE, address)
                print(f"lighthouse at {address}", flush=True)
                misses = 0
                while misses < MISSES and server.poll() is None:
                    time.sleep(POLL_SECONDS)
                    misses = 0 if self._any_lives() else misses + 1
                server.kill()
        if misses < MISSES:
            print(f"the lighthouse ended with code {server.returncode}", file=sys.stderr, flush=True)
            os._exit(1)
        words = {tried[-1].ended for group in self.groups if (tried := attempts(group))}
        end(self.folder, "finished" if "finished" in words else "stopped" if words <= {"stopped"} else "failed")

    def checkpoint(self) -> "DelayedSubmission":
        """What submitit starts at the time limit: another address, which groups read again."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)

    def _any_lives(self) -> bool:
        jobs = [submitted[-1]["job"] for group in self.groups if (submitted := submissions(group))]
        try:
            states: dict[str, Any] = client.states(jobs)
        except SilentError:
            return True
        return any(states.get(job, "COMPLETED") not in client.ENDED for job in jobs)
