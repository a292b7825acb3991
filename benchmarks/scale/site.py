"""What a simulated week plays on: machines that fail, a scheduler, a shared disk. Seconds everywhere, from 0.

Every figure is stated with its source or as an assumption; `python -m benchmarks.scale --help` lists those that can be
passed. Nothing here waits: time is a number.
"""

from dataclasses import dataclass, field
from random import Random

HOUR = 3600.0
WEEK = 7 * 24 * HOUR


@dataclass(frozen=True)
class Site:
    """A cluster and the run on it. Rates are of unexpected interruptions alone."""

    nodes: int  # of the run
    spares: float = 0.02  # further nodes, as a share
    gpus_per_node: int = 8
    # 419 unexpected interruptions of 16,384 GPUs in 54 days: The Llama 3 Herd of Models, 2024, table 5.
    mtbf_hours_per_gpu: float = 50_700.0
    step_seconds: float = 5.0
    start_seconds: float = 240.0  # from a start of the job to the end of its first step. Assumed
    stall_seconds: float = 3.0  # that training stands still for a save. Assumed
    write_seconds: float = 90.0  # until it is on the disk, meanwhile. Assumed
    requeue_seconds: float = 120.0  # that SLURM holds a requeued job back; 0 with expedited requeue
    repair_hours: float = 24.0  # of a broken node. Assumed
    slow_node_hours: float = 100_000.0  # in which a node becomes slow once. Assumed
    slower: float = 0.2  # a step with a slow node takes so much longer. Assumed
    outage_hours: float = 48.0  # between two faults of the shared disk. Assumed
    outage_minutes: float = 4.0  # how long one lasts, mean of an exponential. Assumed
    full_days: float = 14.0  # between two moments at which others have filled the disk. Assumed
    full_hours: float = 2.0
    person_hours: float = 4.0  # until somebody looks at a run that has stopped. Assumed

    @property
    def interruption_seconds(self) -> float:
        """Mean time between two interruptions of the run."""
        return self.mtbf_hours_per_gpu * HOUR / (self.nodes * self.gpus_per_node)


class Moments:
    """Spans of a Poisson process: when something begins, and when it is over."""

    def __init__(self, random: Random, apart: float, lasts: float, until: float, *, fixed: bool = False) -> None:
        self.spans: list[tuple[float, float]] = []
        at = 0.0
        while apart > 0.0 and (at := at + random.expovariate(1.0 / apart)) < until:
            length = lasts if fixed else random.expovariate(1.0 / lasts)
            self.spans.append((at, at + length))
            at += length

    def ends(self, now: float) -> float | None:
        """When the span around `now` is over; None outside of all."""
        return next((end for begin, end in self.spans if begin <= now < end), None)

    def next_begin(self, now: float) -> float:
        """Infinite after the last."""
        return next((begin for begin, _ in self.spans if begin > now), float("inf"))


@dataclass
class Scheduler:
    """Gives a job the first nodes that are up and not excluded, as SLURM does; knows of a node that went down, not of
    one with a broken GPU, before `drained`.
    """

    site: Site
    down: dict[str, float] = field(default_factory=dict)  # known to it, until when
    broken: dict[str, float] = field(default_factory=dict)  # not known to it
    slow: dict[str, float] = field(default_factory=dict)
    excluded: set[str] = field(default_factory=set)  # the job's own list: ExcNodeList

    def __post_init__(self) -> None:
        count = self.site.nodes + round(self.site.nodes * self.site.spares)
        self.names = [f"n{number:05d}" for number in range(count)]

    def start(self, since: float) -> tuple[float, list[str]]:
        """When the job has its nodes, and which."""
        now = since
        while True:
            up = [name for name in self.names if name not in self.excluded and self.down.get(name, 0.0) <= now]
            if len(up) >= self.site.nodes:
                return now, up[: self.site.nodes]
            now = min(until for name, until in self.down.items() if until > now and name not in self.excluded)

    def leave_out(self, node: str) -> bool:
        """As the batch script does: if enough nodes, busy or down, are left for the job, without those of earlier
        failures or else with them.
        """
        for out in (self.excluded | {node}, {node}):
            if len(self.names) - len(out) >= self.site.nodes:
                self.excluded = out
                return True
        return False

    def first(self, which: dict[str, float], nodes: list[str], now: float) -> str | None:
        """Of the job's nodes the first that is broken, or slow."""
        bad = {name for name, until in which.items() if until > now}
        return next((name for name in nodes if name in bad), None) if bad else None
