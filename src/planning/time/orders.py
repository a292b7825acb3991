"""The order in which each rank of a pipeline runs its operations: that of the schedules which torch gives to
`src.distributed.pipeline`, made without torch. tests/planning/test_time_orders.py compares them one by one.

GPipe (arXiv 1811.06965), 1F1B and interleaved 1F1B (2104.04473), zero bubble (2401.10241) and its V, DualPipeV
(2412.19437).
"""

from collections import deque
from collections.abc import Iterator
from typing import Literal, NamedTuple

from src.distributed.parallel_dims import ScheduleName
from src.distributed.pipeline.stages import owned

Kind = Literal["F", "B", "I", "W"]  # forward; backward as a whole, or of the inputs and of the weights apart


class Operation(NamedTuple):
    """One pass of one micro-batch through one stage."""

    stage: int
    kind: Kind
    micro_batch: int


def orders(schedule: ScheduleName, ranks: int, count: int, micro_batches: int) -> list[list[Operation]]:
    """Of each rank, for `count` stages in all. The layout must be legal: src/distributed/pipeline/stages.py."""
    found = []
    for rank in range(ranks):
        mine = owned(rank, ranks, count, schedule)
        match schedule:
            case "GPipe" | "LoopedBFS":
                order = _all_forwards_first(mine, micro_batches, last_first=schedule == "LoopedBFS")
            case "1F1B":
                order = _one_by_one(mine, ranks - 1 - rank, micro_batches, micro_batches)
            case "Interleaved1F1B":
                ahead = (len(mine) - 1) * _round(micro_batches, ranks) + 2 * (ranks - 1 - rank)
                order = _one_by_one(mine, ahead, _round(micro_batches, ranks), micro_batches)
            case "InterleavedZeroBubble":
                ahead = (len(mine) - 1) * _round(micro_batches, ranks) + ranks - 1 - rank
                order = _one_by_one(mine, ahead, _round(micro_batches, ranks), micro_batches)
                order = _weights_later(order, rank)
            case "ZBVZeroBubble":
                order = _zero_bubble_v(mine, rank, ranks, micro_batches)
            case "DualPipeV":
                order = _dual_pipe_v(mine, rank, ranks, micro_batches)
        found.append(order)
    return found


def _round(micro_batches: int, ranks: int) -> int:
    """Micro-batches that a stage takes before the next stage of its rank has its turn."""
    return micro_batches // max(1, micro_batches // ranks)


def _all_forwards_first(mine: tuple[int, ...], micro_batches: int, *, last_first: bool) -> list[Operation]:
    numbers = range(micro_batches)
    forwards = [Operation(stage, "F", number) for stage in mine for number in numbers]
    back = numbers[::-1] if last_first else numbers
    return forwards + [Operation(stage, "B", number) for stage in mine[::-1] for number in back]


def _one_by_one(mine: tuple[int, ...], ahead: int, size: int, micro_batches: int) -> list[Operation]:
    """`ahead` forwards, then a forward and a backward in turn, then the backwards that are left; stages take turns of
    `size` micro-batches.
    """
    forwards = [Operation(stage, "F", number) for stage, number in _turns(mine, size, micro_batches)]
    backwards = [Operation(stage, "B", number) for stage, number in _turns(mine[::-1], size, micro_batches)]
    ahead = min(ahead, len(forwards))
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - ahead :]


def _turns(stages: tuple[int, ...], size: int, micro_batches: int) -> Iterator[tuple[int, int]]:
    for first in range(0, micro_batches, size):
        for stage in stages:
            yield from ((stage, number) for number in range(first, min(first + size, micro_batches)))


def _weights_later(order: list[Operation], lag: int) -> list[Operation]:
    """Backwards become two passes; that of weights comes `lag` backwards later, and all that are left at the end."""
    waiting, found, passed = deque[Operation](), list[Operation](), 0
    for each in order:
        if each.kind != "B":
            found.append(each)
            continue
        found.append(each._replace(kind="I"))
        waiting.append(each._replace(kind="W"))
        passed += 1
        if passed > lag:
            found.append(waiting.popleft())
    return [*found, *waiting]


class _OrderWriter:
    """Appends the next operation of a kind to each of the two stages of a rank."""

    def __init__(self, mine: tuple[int, ...]) -> None:
        self.mine = mine
        self.order: list[Operation] = []
        self.done: dict[tuple[int, Kind], int] = {}

    def add(self, arm: int, *kinds: Kind) -> None:
        for kind in kinds:
            number = self.count(arm, kind)
            self.done[arm, kind] = number + 1
            self.order.append(Operation(self.mine[arm], kind, number))

    def count(self, arm: int, kind: Kind) -> int:
        return self.done.get((arm, kind), 0)


def _zero_bubble_v(mine: tuple[int, ...], rank: int, ranks: int, micro_batches: int) -> list[Operation]:
    """Down the V until its far end answers, then three passes of each arm in turn, then what is left of weights."""
    most = max(2 * ranks - 1, micro_batches)  # the order is that of a full pipeline; what there is not is left out
    write = _OrderWriter(mine)
    for _ in range(2 * (ranks - rank) - 1):
        write.add(0, "F")
    for _ in range(rank):
        write.add(1, "F")
        write.add(0, "F")
    for _ in range(ranks - rank):
        write.add(1, "F", "I", "W")
    while write.count(1, "F") < write.count(0, "F") or write.count(0, "F") < most:
        if write.count(0, "F") < most:
            write.add(0, "F")
        write.add(0, "I", "W")
        write.add(1, "F", "I", "W")
    for _ in range(rank):
        write.add(0, "I")
        write.add(1, "I")
    for _ in range(ranks - rank):
        write.add(0, "I", "W")
    for arm in (1, 0):
        while write.count(arm, "W") < write.count(arm, "I"):
            write.add(arm, "W")
    return [each for each in write.order if each.micro_batch < micro_batches]


def _dual_pipe_v(mine: tuple[int, ...], rank: int, ranks: int, micro_batches: int) -> list[Operation]:
    """Eight phases of arXiv 2412.19437; a forward and a backward that it overlaps stand one after the other."""
    write, waiting = _DualOrderWriter(mine), ranks - rank - 1
    for _ in range(2 * waiting):
        write.add(0, "F")
    for _ in range(rank + 1):
        write.add(0, "F")
        write.add(1, "F")
    for _ in range(waiting):
        write.inputs(1)
        write.weights()
        write.add(1, "F")
    for _ in range(micro_batches - 2 * ranks + rank + 1):
        write.add(0, "F")
        write.whole(1)
        write.add(1, "F")
        write.whole(0)
    for _ in range(waiting):
        write.whole(1)
        write.add(1, "F")
        write.whole(0)
    # Of the last rank + 1 rounds of both arms the second half leaves its weights for later.
    half = 2 * ((rank + 1) // 2) + (1 - rank % 2)
    for turn in range(2 * (rank + 1)):
        arm = 1 - turn % 2
        write.inputs(arm) if turn >= half else write.whole(arm)
    for _ in range(waiting):
        write.weights()
        write.inputs(0)
    for _ in range(rank + 1):
        write.weights()
    return write.order


class _DualOrderWriter(_OrderWriter):
    """Keeps the passes of weights that wait, oldest first; both kinds of backward count the same micro-batches."""

    def __init__(self, mine: tuple[int, ...]) -> None:
        super().__init__(mine)
        self.waiting = deque[Operation]()
        self.backwards = [0, 0]

    def whole(self, arm: int) -> None:
        self._backward(arm, "B")

    def inputs(self, arm: int) -> None:
        self._backward(arm, "I")
        self.waiting.append(self.order[-1]._replace(kind="W"))

    def weights(self) -> None:
        if self.waiting:
            self.order.append(self.waiting.popleft())

    def _backward(self, arm: int, kind: Kind) -> None:
        self.order.append(Operation(self.mine[arm], kind, self.backwards[arm]))
        self.backwards[arm] += 1
