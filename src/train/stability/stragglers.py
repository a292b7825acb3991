"""Ranks that hold up all others, named by their hosts.

A step takes as long on every rank, for each waits for the slowest in its collectives. So each rank tells what it can be
slow at alone: a product of a fixed size on its device, and the wait for its own data. On steps that are logged, all of
it travels in one small sum over ranks.
"""

import socket
from collections.abc import Callable, Sequence
from statistics import median, median_low

import torch
import torch.distributed as dist

from src.distributed.collectives import world_sum
from src.distributed.process.device_speed import product_seconds

Tell = Callable[[str], None]
Probe = Callable[[torch.device], float]
NUMBERS = 3  # of a rank: seconds of a product, of waiting for data in a step, of a step


def slowdowns(told: Sequence[Sequence[float]]) -> list[float]:
    """By rank: how much longer than the median's its product takes, or its wait for data makes a step; 0.1 is 10 %."""
    products, waits, steps = zip(*told, strict=True)
    # The lower of the two in the middle: of two ranks the faster one is what is usual.
    usual, wait, step = median_low(products), median_low(waits), median_low(steps)
    by_product = [each / usual - 1.0 if usual > 0.0 else 0.0 for each in products]
    by_data = [(each - wait) / step if step > 0.0 else 0.0 for each in waits]
    return [max(each) for each in zip(by_product, by_data, strict=True)]


class Stragglers:
    """Who has been slow for how many steps; a verdict is told once, until the rank keeps up again."""

    def __init__(self, hosts: Sequence[str], share: float, steps: int) -> None:
        """`hosts`: by rank. Slow is a rank whose slowdown is more than `share`; one for `steps` steps is named."""
        self.hosts, self.share, self.steps = tuple(hosts), share, steps
        self._slow = [0] * len(self.hosts)  # steps in a row

    def add(self, steps: int, slow_by: Sequence[float]) -> list[str]:
        """What is new after so many further steps, in words for a person: whole nodes, then single ranks."""
        before = self.named
        self._slow = [count + steps if by > self.share else 0 for count, by in zip(self._slow, slow_by, strict=True)]
        fresh = [rank for rank in self.named if rank not in before]
        found: list[str] = []
        for host in dict.fromkeys(self.hosts[rank] for rank in fresh):
            there = [rank for rank, each in enumerate(self.hosts) if each == host]
            here = [rank for rank in fresh if self.hosts[rank] == host]
            whole = len(there) > 1 and all(rank in self.named for rank in there)
            by = 100 * median(slow_by[rank] for rank in here)
            if whole:
                who = f"node {host} (ranks {there[0]} to {there[-1]})"
            else:
                who = f"rank{'s' * (len(here) > 1)} {', '.join(map(str, here))} on {host}"
            found.append(f"{who} {'is' if whole or len(here) == 1 else 'are'} {by:.0f} % slower than the median, for "
                         f"{max(self._slow[rank] for rank in here)} steps")  # fmt: skip
        return found

    @property
    def named(self) -> list[int]:
        """Ranks that are stragglers now."""
        return [rank for rank, count in enumerate(self._slow) if count >= self.steps]


class StragglerWatch:
    """Asked on every step that is logged. Collective."""

    def __init__(
        self, share: float, steps: int, device: torch.device, tell: Tell, probe: Probe = product_seconds
    ) -> None:
        """`tell`: called with each verdict, on rank 0; `probe`: seconds of work on the device, without others."""
        self._device, self._tell, self._probe = device, tell, probe
        self._rank = dist.get_rank()
        hosts = [""] * dist.get_world_size()  # known to rank 0, which speaks for all
        dist.gather_object(socket.gethostname(), hosts if self._rank == 0 else None)
        self._watch = Stragglers(hosts, share, steps)
        self._step: int | None = None

    def values(self, step: int, step_seconds: float, data_seconds: float) -> dict[str, float]:
        """Collective. How slow the slowest rank is and how many are stragglers, after this step."""
        told = torch.zeros(len(self._watch.hosts), NUMBERS, dtype=torch.float64, device=self._device)
        mine = (self._probe(self._device), data_seconds, step_seconds)
        told[self._rank] = torch.tensor(mine, dtype=torch.float64)
        by = slowdowns(world_sum(told).tolist())
        since, self._step = step - (step - 1 if self._step is None else self._step), step
        for words in self._watch.add(since, by):
            if self._rank == 0:
                self._tell(words)
        slowest = max(range(len(by)), key=by.__getitem__)
        return {
            "stragglers/slowdown_percent": 100.0 * by[slowest],
            "stragglers/rank": float(slowest),
            "stragglers/named": float(len(self._watch.named)),
        }
