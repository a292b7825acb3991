"""Seconds of a pipeline's step: every rank runs its operations in the order of its schedule, each as soon as what it
needs has arrived.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from src.distributed.parallel_dims import ScheduleName
from src.planning.time.orders import Operation, orders

# Rounds of the pipeline's ranks from which on a schedule repeats itself: a longer step is the line through these two.
SHORT, LONG = 4, 6


@dataclass(frozen=True)
class StagePass:
    """Seconds of one micro-batch in one stage."""

    forward: float
    inputs: float  # backward of the inputs
    weights: float  # backward of the weights

    @property
    def whole(self) -> float:
        return self.forward + self.inputs + self.weights


@dataclass(frozen=True)
class Makespan:
    """Seconds from the first operation to the last."""

    seconds: float
    busy: float  # of the rank with the most work


def makespan(
    schedule: ScheduleName, ranks: int, passes: Sequence[StagePass], micro_batches: int, hop: float
) -> Makespan:
    """Of one step without its update. `passes`: of each stage; `hop`: seconds of a state from one rank to the next."""
    rounds = micro_batches // ranks
    if rounds <= LONG + 2 or micro_batches % ranks:
        return simulate(orders(schedule, ranks, len(passes), micro_batches), passes, hop)
    short, long = (
        simulate(orders(schedule, ranks, len(passes), number * ranks), passes, hop) for number in (SHORT, LONG)
    )
    further = (rounds - LONG) / (LONG - SHORT)
    return Makespan(
        long.seconds + further * (long.seconds - short.seconds), long.busy + further * (long.busy - short.busy)
    )


def simulate(order: Sequence[Sequence[Operation]], passes: Sequence[StagePass], hop: float) -> Makespan:
    """Raises ValueError where operations wait for each other for ever."""
    last, place = len(passes) - 1, {each.stage: rank for rank, mine in enumerate(order) for each in mine}
    ended: dict[tuple[int, bool, int], float] = {}  # (stage, whether forward, micro-batch)
    clock, position = [0.0] * len(order), [0] * len(order)
    left = sum(len(mine) for mine in order)
    while left:
        before = left
        for rank, mine in enumerate(order):
            while position[rank] < len(mine):
                operation = mine[position[rank]]
                ready = _ready(operation, ended, place, last, hop)
                if ready is None:
                    break
                each = passes[operation.stage]
                kind = operation.kind
                seconds = each.forward if kind == "F" else each.weights if kind == "W" else each.inputs
                seconds += each.weights if kind == "B" else 0.0
                clock[rank] = max(clock[rank], ready) + seconds
                if kind != "W":
                    ended[operation.stage, kind == "F", operation.micro_batch] = clock[rank]
                position[rank] += 1
                left -= 1
        if left == before:
            raise ValueError(f"{left} operations of this order wait for each other")
    work = [0.0] * len(order)
    counts = [len({each.micro_batch for each in mine}) for mine in order]
    for stage, rank in place.items():
        work[rank] += passes[stage].whole * counts[rank]
    return Makespan(max(clock), max(work))


def _ready(
    operation: Operation,
    ended: dict[tuple[int, bool, int], float],
    place: dict[int, int],
    last: int,
    hop: float,
) -> float | None:
    """When what an operation needs is there; None: not yet known."""
    stage, kind, number = operation
    if kind == "W":
        return ended.get((stage, False, number))
    if kind == "F":
        if stage == 0:
            return 0.0
        source = (stage - 1, True, number)
    elif stage == last:
        return ended.get((stage, True, number))
    else:
        source = (stage + 1, False, number)
    arrived = ended.get(source)
    if arrived is None:
        return None
    return arrived + (hop if place[source[0]] != place[stage] else 0.0)
