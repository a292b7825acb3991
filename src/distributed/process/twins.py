"""Devices held against their twins before a run: one that is slow by itself holds up all others for its length."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import TYPE_CHECKING

from src.distributed.process.device_speed import best_seconds, copy_seconds, product_seconds
from src.distributed.process.preflight import PreflightError

if TYPE_CHECKING:
    import torch

SLOWER = 0.15  # below the speed of its twins' median; they differ by some 5 % among healthy H100
SUM_BYTES = 1 << 26  # of the sum over a node
WORK = {"product": "a product", "copy": "a copy", "node_sum": "a sum over its node"}


@dataclass(frozen=True)
class DeviceSpeed:
    """Seconds of each piece of work; 0 where a node has one rank and sums nothing."""

    rank: int
    node: str
    device: str
    product: float
    copy: float
    node_sum: float


@dataclass(frozen=True)
class SlowDevice:
    rank: int
    node: str
    words: str


def slow_devices(speeds: Sequence[DeviceSpeed]) -> list[SlowDevice]:
    """Those more than SLOWER below the median of devices of the same name, in the order of their ranks. The lower of
    the two in the middle counts: of two twins the faster one is healthy.
    """
    twins: dict[str, list[DeviceSpeed]] = {}
    for each in speeds:
        twins.setdefault(each.device, []).append(each)
    usual = {(name, work): median_low(getattr(one, work) for one in alike) for name, alike in twins.items()
             for work in WORK}  # fmt: skip
    found = []
    for each in speeds:
        for work, words in WORK.items():
            mine = getattr(each, work)
            below = 1.0 - usual[each.device, work] / mine if mine > 0.0 else 0.0
            if below > SLOWER:
                where = f"rank {each.rank} on {each.node} ({each.device})"
                found.append(
                    SlowDevice(each.rank, each.node, f"{where}: {words} is {100 * below:.0f} % below its twins")
                )
                break
    return found


def measured(
    rank: int, node: str, name: str, device: "torch.device", node_ranks: Sequence[Sequence[int]]
) -> list[DeviceSpeed]:
    """Collective, over the default group: the speeds of all ranks, on rank 0 alone. `node_ranks`: of each node."""
    import torch
    import torch.distributed as dist

    from src.distributed.process.subgroup import subgroup

    mine = subgroup(node_ranks, "node")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where what is gathered as objects travels
    product, copy = product_seconds(device), copy_seconds(device)
    seconds = 0.0
    if mine.size() > 1:
        numbers = torch.zeros(SUM_BYTES // 4, device=device)
        seconds = best_seconds(lambda: dist.all_reduce(numbers, group=mine), device)
    if mine is not dist.group.WORLD:  # which the run goes on with
        dist.destroy_process_group(mine)
    told = DeviceSpeed(rank, node, name, product, copy, seconds)
    found: list[DeviceSpeed] | None = [told] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(told, found)
    return found or []


def check_twins(
    rank: int,
    node: str,
    node_ranks: Sequence[Sequence[int]],
    known: Collection[str],
    tell: Callable[[Sequence[SlowDevice]], None],
    device: "torch.device",
) -> None:
    """Collective, over the default group. PreflightError that names the nodes of slow devices, for the next start to
    leave out; of those in `known` only `tell` hears: they were left out, and the job could not start without them.
    """
    import torch
    import torch.distributed as dist

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    told = [slow_devices(measured(rank, node, name, device, node_ranks))]
    dist.broadcast_object_list(told)
    (slow,) = told
    tell(slow)
    fresh = [each for each in slow if each.node not in known]
    if fresh:
        raise PreflightError(
            "; ".join(each.words for each in fresh), ",".join(dict.fromkeys(each.node for each in fresh))
        )
