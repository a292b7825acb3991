"""The collectives of a step: what is sent, by which algorithm, among which ranks, how often, and how long one takes."""

from typing import Literal, NamedTuple

from src.distributed.parallel_dims import ParallelDims
from src.distributed.precision.config import BYTES
from src.planning.memory import Load
from src.planning.time.collectives import (
    Fabric,
    RankGroup,
    Reached,
    all_reduce_seconds,
    all_to_all_seconds,
    gather_seconds,
    send_seconds,
    sent_once_seconds,
)
from src.planning.time.work import BlockKind, Worker

ASYNC_HIDDEN = 0.5  # of a tensor rank's collectives, with parallel.async_tensor; stated

Algorithm = Literal["gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]


class Collective(NamedTuple):
    """One kind of collective, and how often it happens: in a block and micro-batch, or in a step."""

    what: str
    algorithm: Algorithm
    size: float  # bytes, of the whole tensor
    ranks: int
    nodes: int
    seconds: float  # of one
    forward: float  # times
    backward: float
    exposed: float = 1.0  # share of it that stands in line; FSDP's run beside other work

    @property
    def times(self) -> float:
        return self.forward + self.backward

    def often(self, times: float) -> "Collective":
        return self._replace(forward=times * self.forward, backward=times * self.backward)


def block_collectives(
    load: Load, worker: Worker, fabric: Fabric, kind: BlockKind, reached: Reached | None = None
) -> tuple[Collective, ...]:
    """Of one block and micro-batch. `reached` as in Question."""
    element, degrees = BYTES[load.precision.compute], load.degrees
    found = list[Collective]()
    if degrees.tensor > 1:
        # Attention and MLP each gather what enters them and scatter what they make; so do their gradients.
        hidden = worker.tokens * load.model.dim * element
        group = RankGroup.along(degrees.tensor, 1, fabric.per_node)
        exposed = 1.0 - ASYNC_HIDDEN if degrees.async_tensor else 1.0
        seconds = gather_seconds(hidden, group, fabric)
        found.append(_of(group, "tensor", "gather", hidden, seconds, (2, 2), exposed))
        found.append(_of(group, "tensor", "reduce-scatter", hidden, seconds, (2, 2), exposed))
    if degrees.context > 1:
        ring = RankGroup.along(degrees.context, degrees.tensor, fabric.per_node)
        rows = worker.tokens * degrees.context * load.model.kv_heads / degrees.tensor
        keys = rows * sum(load.model.head_widths)
        found.append(
            _of(ring, "context", "gather", keys * element, gather_seconds(keys * element, ring, fabric), (1, 1))
        )
        # Gradients of keys and values are added up in fp32.
        found.append(_of(ring, "context", "reduce-scatter", keys * 4, gather_seconds(keys * 4, ring, fabric), (0, 1)))
    if kind.experts and degrees.expert > 1:
        experts = RankGroup.along(degrees.expert, degrees.expert_tensor, fabric.per_node)
        sent = worker.routed_rows * load.model.dim * element
        seconds = all_to_all_seconds(sent, experts, fabric)
        if reached is not None and (mixture := load.model.mixture) is not None:
            seconds = sent_once_seconds(sent / mixture.top_k, experts, fabric, reached)
        # Rows go to experts beside the shared experts, and come back beside nothing; so it is in both directions.
        beside = sum(min(1.0, each / seconds) for each in worker.shared(kind)) / 2
        found.append(_of(experts, "travel", "all-to-all", sent, seconds, (1, 1), 1.0 - beside))
        found.append(_of(experts, "travel", "all-to-all", sent, seconds, (1, 1)))
    return tuple(found)


class FsdpGroups(NamedTuple):
    """Who shares weights: those of all layers, those of routed experts, and copies of the whole."""

    dense: RankGroup
    routed: RankGroup
    replicas: RankGroup

    @classmethod
    def of(cls, degrees: ParallelDims, per_node: int) -> "FsdpGroups":
        inner, apart = degrees.tensor, degrees.expert * degrees.expert_tensor
        return cls(
            RankGroup.along(degrees.fsdp, inner, per_node),
            RankGroup.along(degrees.expert_shard, apart, per_node),
            RankGroup.along(degrees.replicate, inner * degrees.fsdp, per_node),
        )


def fsdp_collectives(
    load: Load, fabric: Fabric, groups: FsdpGroups, elements: tuple[int, int], times: tuple[float, float]
) -> tuple[Collective, ...]:
    """Of a step, on one rank. `elements`: of all layers and of routed experts, gathered; `times`: how often weights are
    gathered, and gradients reduced.
    """
    compute, reduce = BYTES[load.precision.compute], BYTES[load.precision.reduce]
    float8 = load.precision.float8
    sent = 1 if float8 is not None and float8.all_gather else compute
    gathers, reductions = times
    found = list[Collective]()
    for name, count, group in (("weights", elements[0], groups.dense), ("experts", elements[1], groups.routed)):
        if count == 0:
            continue
        if group.ranks > 1:
            size, whole = count * sent, count * reduce
            seconds = gather_seconds(size, group, fabric)
            found.append(_of(group, name, "gather", size, seconds, (gathers, 0)))
            seconds = gather_seconds(whole, group, fabric)
            found.append(_of(group, f"gradients of {name}", "reduce-scatter", whole, seconds, (0, reductions)))
        if groups.replicas.ranks > 1:
            part = count * reduce / group.ranks
            seconds = all_reduce_seconds(part, groups.replicas, fabric)
            name = f"gradients of {name}"
            found.append(_of(groups.replicas, name, "all-reduce", part, seconds, (0, reductions)))
    return tuple(found)


def hop(load: Load, worker: Worker, fabric: Fabric) -> Collective:
    """Of a pipeline: the state of one micro-batch, from a stage to the next."""
    degrees = load.degrees
    states = 1 + load.model.prediction_depths
    size = states * worker.tokens * load.model.dim * BYTES[load.precision.compute] / degrees.tensor
    ranks = degrees.world // degrees.pipeline
    near = 2 * ranks <= fabric.per_node
    return Collective("stages", "send", size, 2, 1 if near else 2, send_seconds(size, fabric, same_node=near), 1, 1)


def _of(
    group: RankGroup,
    what: str,
    algorithm: Algorithm,
    size: float,
    seconds: float,
    times: tuple[float, float],
    exposed: float = 1.0,
) -> Collective:
    return Collective(what, algorithm, size, group.ranks, group.nodes, seconds, *times, exposed)
