"""Seconds of collectives: by algorithm, bytes, group and link. Ranks of a node are joined by NVLink, nodes by a network
with one card a GPU.

A ring passes all but 1/n of the whole tensor through every rank (gather, reduce-scatter), twice for an all-reduce. NCCL
runs one ring through each card of a node, so a group with k ranks in each node enters it through k cards at once. Of an
all-to-all each rank sends what leaves the node through its own card. Bytes and steps of rings are those of Patarasuk
and Yuan, 2009 (doi 10.1016/j.jpdc.2008.09.002).
"""

from dataclasses import dataclass
from math import ceil, log2


@dataclass(frozen=True)
class Fabric:
    """Links of a site, bytes/s that a collective reaches in one direction, and seconds of one step through them."""

    nvlink: float  # of each GPU, inside of a node
    network: float  # of each GPU's card, between nodes
    nvlink_latency: float = 3e-6
    network_latency: float = 12e-6
    per_node: int = 8  # GPUs


@dataclass(frozen=True)
class RankGroup:
    """Ranks that take part in one collective."""

    ranks: int
    local: int  # of them, in each node

    @classmethod
    def along(cls, degree: int, stride: int, per_node: int) -> "RankGroup":
        """`degree` ranks that are `stride` apart, where ranks fill node after node."""
        return cls(degree, max(1, min(degree, per_node // stride if stride < per_node else 1)))

    @property
    def nodes(self) -> int:
        return ceil(self.ranks / self.local)


@dataclass(frozen=True)
class Reached:
    """Among how many ranks and nodes the experts of one token are, in the mean."""

    ranks: float
    nodes: float


def gather_seconds(size: float, group: RankGroup, fabric: Fabric) -> float:
    """All-gather into `size` bytes on every rank, or reduce-scatter of `size` bytes: one round of a ring."""
    if group.ranks == 1:
        return 0.0
    moved = size * (group.ranks - 1) / group.ranks
    return _bandwidth_bound(moved, group, fabric) + _ring_latency(group, fabric)


def all_reduce_seconds(size: float, group: RankGroup, fabric: Fabric) -> float:
    """Sum of `size` bytes on every rank: two rounds of a ring, or of a tree over nodes where that has fewer steps."""
    if group.ranks == 1:
        return 0.0
    moved = 2.0 * size * (group.ranks - 1) / group.ranks
    tree = 2.0 * (log2(max(2, group.nodes)) * fabric.network_latency + (group.local - 1) * fabric.nvlink_latency)
    return _bandwidth_bound(moved, group, fabric) + min(2.0 * _ring_latency(group, fabric), tree)


def all_to_all_seconds(size: float, group: RankGroup, fabric: Fabric) -> float:
    """Each rank divides `size` bytes among all, itself included."""
    if group.ranks == 1:
        return 0.0
    inside = size * (group.local - 1) / group.ranks / fabric.nvlink
    outside = size * (group.ranks - group.local) / group.ranks / fabric.network
    latency = fabric.nvlink_latency if group.nodes == 1 else fabric.network_latency
    return max(inside, outside) + latency * log2(max(2, group.ranks))


def sent_once_seconds(size: float, group: RankGroup, fabric: Fabric, reached: Reached) -> float:
    """Tokens of `size` bytes on each rank go once through the network to each node that has experts of theirs, and
    from there by NVLink to each such rank, as DeepEP does (arXiv 2412.19437, 3.2.2).
    """
    if group.ranks == 1:
        return 0.0
    inside = size * reached.ranks * (group.local - 1) / group.local / fabric.nvlink
    outside = size * reached.nodes * (group.nodes - 1) / group.nodes / fabric.network
    latency = fabric.nvlink_latency if group.nodes == 1 else fabric.network_latency
    return max(inside, outside) + latency * log2(max(2, group.ranks))


def send_seconds(size: float, fabric: Fabric, *, same_node: bool) -> float:
    """`size` bytes from one rank to another."""
    if same_node:
        return size / fabric.nvlink + fabric.nvlink_latency
    return size / fabric.network + fabric.network_latency


def _bandwidth_bound(moved: float, group: RankGroup, fabric: Fabric) -> float:
    """Seconds in which `moved` bytes pass each rank."""
    inside = moved / fabric.nvlink if group.local > 1 else 0.0
    return max(inside, moved / (group.local * fabric.network) if group.nodes > 1 else 0.0)


def _ring_latency(group: RankGroup, fabric: Fabric) -> float:
    hops = group.nodes if group.nodes > 1 else 0
    return hops * fabric.network_latency + (group.ranks - 1 - max(0, hops - 1)) * fabric.nvlink_latency
