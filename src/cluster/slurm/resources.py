"""What a job asks of SLURM: derived from the plan and a site's facts, and held against what the partition has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol, Self

from src.cluster.slurm.client import NodeFacts

_MIB = 1024  # per GiB


class Site(Protocol):
    """The facts of src.cluster.slurm.config that decide what a job asks for."""

    @property
    def gpus_per_node(self) -> int: ...
    @property
    def cpus_per_gpu(self) -> int: ...
    @property
    def memory_gib_per_gpu(self) -> float | None: ...
    @property
    def minutes(self) -> int: ...
    @property
    def asks_gpus(self) -> bool:
        """Whether sbatch is asked for GPUs by their number."""


@dataclass(frozen=True)
class Resources:
    """Points with equal resources may share a job array."""

    nodes: int
    tasks_per_node: int  # one per GPU
    cpus_per_task: int
    memory_gib: float | None  # per node
    minutes: int

    @classmethod
    def of(cls, site: Site, plan: Mapping[str, Any]) -> Self:
        tasks = int(plan["ranks_per_node"])
        memory = None if site.memory_gib_per_gpu is None else site.memory_gib_per_gpu * tasks
        return cls(int(plan["nodes"]), tasks, site.cpus_per_gpu, memory, site.minutes)

    @property
    def world(self) -> int:
        return self.nodes * self.tasks_per_node


def problems(
    site: Site, asked: Sequence[Resources], partition: str | None, there: Sequence[NodeFacts], names: Sequence[str]
) -> list[str]:
    """What the partition cannot give, each with the nearest that it can. `partition`: the site's, or SLURM's default;
    `there`: its nodes; `names`: of all partitions.
    """
    if partition is None:
        return [f"cluster.partition=null: this SLURM has no default partition; there are: {', '.join(names)}"]
    unknown = [each for each in partition.split(",") if each not in names]
    if unknown or not there:
        return [_unknown(each, names) for each in unknown or [partition]]
    found: list[str] = []
    limits = [node.limit_minutes for node in there]
    longest = None if None in limits else max(limit for limit in limits if limit is not None)
    if longest is not None and site.minutes > longest:
        found.append(f"cluster.minutes={site.minutes}: partition {partition} allows at most {longest}")
    for each in dict.fromkeys(asked):
        found += _misfits(site, each, partition, there)
    return list(dict.fromkeys(found))


def _unknown(partition: str, names: Sequence[str]) -> str:
    near = get_close_matches(partition, names, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"cluster.partition={partition}: no such partition; {meant}there are: {', '.join(names)}"


def _misfits(site: Site, asked: Resources, partition: str, there: Sequence[NodeFacts]) -> list[str]:
    """Each limit by itself, then all together."""
    tasks, found = asked.tasks_per_node, []
    most_gpus = max(node.gpus for node in there)
    if site.asks_gpus and tasks > most_gpus:
        found.append(f"cluster.gpus_per_node={site.gpus_per_node}: nodes of {partition} have {most_gpus}")
    most_cpus = max(node.cpus for node in there)
    if tasks * asked.cpus_per_task > most_cpus:
        found.append(
            f"cluster.cpus_per_gpu={asked.cpus_per_task} for {tasks} ranks per node: nodes of {partition} have "
            f"{most_cpus} cores; at most {most_cpus // tasks}"
        )
    most_mib = max(node.memory_mib for node in there)
    if asked.memory_gib is not None and asked.memory_gib * _MIB > most_mib:
        found.append(
            f"cluster.memory_gib_per_gpu={site.memory_gib_per_gpu:g} for {tasks} ranks per node: nodes of "
            f"{partition} have {most_mib / _MIB:.1f} GiB; at most {int(10 * most_mib / _MIB / tasks) / 10:g}"
        )
    fitting = [node for node in there if _fits(site, asked, node)]
    if not found and asked.nodes > len(fitting):
        found.append(
            f"parallel asks for {asked.nodes} nodes of {tasks} GPUs: {partition} has {len(fitting)}; choose a "
            f"layout of at most {len(fitting) * tasks} ranks"
        )
    return found


def _fits(site: Site, asked: Resources, node: NodeFacts) -> bool:
    enough_memory = asked.memory_gib is None or asked.memory_gib * _MIB <= node.memory_mib
    enough_gpus = not site.asks_gpus or asked.tasks_per_node <= node.gpus
    return enough_memory and enough_gpus and asked.tasks_per_node * asked.cpus_per_task <= node.cpus
