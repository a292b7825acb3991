"""The part of a cluster backend that the floors below src/cluster ask: the plan for its devices, a task for its grace.

The whole protocol is `src.cluster.backend.Backend`, which extends this one. It cannot stand here, since it submits run
folders, nor can this part stand there: src/run.py types its section `cluster` with it on a lower floor.
"""

from typing import Protocol, runtime_checkable


class Devices(Protocol):
    """What the ranks of one machine may use; None where nobody knows or there is no limit, such as ranks on a CPU."""

    @property
    def count(self) -> int | None: ...
    @property
    def memory_gib(self) -> float | None: ...
    @property
    def host_gib(self) -> float | None:
        """Memory of the host in GiB, where ranks compute on its CPU; else None."""

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA's compute capability."""


@runtime_checkable
class Cluster(Protocol):
    """What the plan and the tasks ask of the section `cluster`. The classes are in src/cluster."""

    @property
    def gpu_memory_gib(self) -> float | None: ...
    @property
    def gpus_per_node(self) -> int | None:
        """GPUs of each node; None: all ranks are on this machine."""

    @property
    def grace_seconds(self) -> float:
        """Seconds that ranks have to save after a stop signal, before they are killed."""

    def devices(self) -> Devices:
        """The devices that a plan may count on. Asks the machine, so only the launcher calls it."""
