"""The section fault_tolerance: number of replica groups, and timeouts and restarts when one fails."""

import re
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator

from src.config.base import Config
from src.config.bounds import CountFromZero, Groups, Seconds

if TYPE_CHECKING:
    from src.distributed.process.rank_context import RankContext
    from src.fault_tolerance.replica_groups import ReplicaGroups


def _address(text: str) -> str:
    if re.fullmatch(r"https?://[^/\s]+:\d+", text) is None:
        host = re.search(r"(?:\w+://)?([\w.-]+)", text)
        raise ValueError(f"no address of a lighthouse; write http://{'host' if host is None else host[1]}:29510, say")
    return text


@dataclass(frozen=True)
class Asked:
    """Facts of the run that `problems` checks the groups against."""

    micro_batches: int  # that a step has to give away
    n_layers: int
    steps: int
    save_every: int | None  # steps


class FaultTolerance(Config):
    """Base of the classes of the section fault_tolerance."""

    on: ClassVar[bool]

    @property
    def copies(self) -> int:
        """Number of replica groups; 1 without fault tolerance."""
        return 1

    def home(self, folder: Path) -> Path:
        """The run's folder, given the folder of a rank, which is inside of it where groups have folders of their
        own.
        """
        return folder

    @abstractmethod
    def join(self, ranks: "RankContext") -> "ReplicaGroups | None":
        """The replica groups as this rank uses them; None: there is one group. Connects at the first step, not here."""

    def outer_bytes(self, weight_bytes: int) -> int:
        """Bytes on the device for the outer optimizer, per weight of `weight_bytes` bytes."""
        return 0

    def problems(self, asked: Asked) -> list[str]:
        """Keys that do not fit the run: key, value, rule, nearest legal value; empty when all fit."""
        return []


class Off(FaultTolerance):
    """fault_tolerance=none: one group of ranks."""

    on: ClassVar[bool] = False

    def join(self, ranks: "RankContext") -> None:
        return None


class TorchFT(FaultTolerance):
    """fault_tolerance=torchft: gradients are summed over all living groups in every step."""

    on: ClassVar[bool] = True

    groups: Groups
    """Replica groups: copies of the layout."""
    min_groups: Groups
    """Groups that must be there; training waits while fewer are."""
    process_group: Literal["gloo", "nccl"] | None
    """Backend of all-reduces over groups; null: nccl between GPUs, gloo else."""
    lighthouse: Annotated[str, AfterValidator(_address)] | None
    """One that runs already, such as http://host:29510; null: the launcher starts one."""
    heartbeat_seconds: Seconds
    """Seconds of silence after which a group is gone."""
    join_seconds: Seconds
    """Seconds that groups that are ready wait for others that live but are not."""
    sum_seconds: Seconds
    """Seconds after which an all-reduce over groups has lost one of them; longer than the slowest step."""
    heal_seconds: Seconds
    """Seconds for a group to fetch its state from another."""
    restarts: CountFromZero
    """Restarts of one group after failures; then it stays away."""
    backoff_seconds: Seconds
    """Seconds before the first restart in a row; twice as long before each further one, up to 300."""

    @property
    def copies(self) -> int:
        return self.groups

    def home(self, folder: Path) -> Path:
        return folder.parents[1]

    def join(self, ranks: "RankContext") -> "ReplicaGroups":
        from src.fault_tolerance.synchronous_groups import SynchronousGroups

        return SynchronousGroups(self, ranks)

    def problems(self, asked: Asked) -> list[str]:
        found = []
        if self.min_groups > self.groups:
            found.append(
                f"fault_tolerance.min_groups={self.min_groups} of fault_tolerance.groups={self.groups} would wait for "
                f"ever; at most {self.groups}"
            )
        if asked.micro_batches < self.groups:
            found.append(
                f"fault_tolerance.groups={self.groups}: a step is {asked.micro_batches} micro-batches of a data rank, "
                f"so a group would have none; at most {asked.micro_batches} groups, a smaller task.micro_batch or a "
                "larger task.global_batch"
            )
        return found
