"""Orders of operations beside torch's own, and seconds of schedules that can be worked out by hand."""

from collections.abc import Iterator
from typing import Any

import pytest
from torch.distributed.pipelining.schedules import get_schedule_class

from src.distributed.parallel_dims import ScheduleName
from src.planning.time.bubbles import StagePass, makespan, simulate
from src.planning.time.orders import Operation, orders

LETTERS: dict[str, Any] = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
CASES: list[tuple[ScheduleName, int, int, int]] = [
    *(("GPipe", 4, 1, number) for number in (1, 4, 7)),
    *(("1F1B", 4, 1, number) for number in (4, 9)),
    *(("LoopedBFS", 3, 2, number) for number in (2, 6)),
    *(("Interleaved1F1B", 4, 2, number) for number in (3, 4, 8, 10)),
    ("Interleaved1F1B", 2, 3, 4),
    *(("InterleavedZeroBubble", 4, 2, number) for number in (4, 8, 12)),
    ("InterleavedZeroBubble", 2, 3, 4),
    *(("ZBVZeroBubble", 4, 2, number) for number in (2, 4, 12)),
    *(("DualPipeV", 4, 2, number) for number in (8, 10)),
    ("DualPipeV", 5, 2, 13),
    ("DualPipeV", 2, 2, 4),
]


def of_torch(name: ScheduleName, ranks: int, each: int, micro_batches: int) -> list[list[Operation]]:
    """What torch's class writes down, without stages to run it on."""
    made: Any = object.__new__(get_schedule_class(name))
    rounds = max(1, micro_batches // ranks)
    made.__dict__ |= {
        "pp_group_size": ranks,
        "_n_microbatches": micro_batches,
        "_num_stages": ranks * each,
        "num_stages": ranks * each,
        "n_local_stages": each,
        "_stages": [None] * each,
        "number_of_rounds": rounds,
        "microbatches_per_round": micro_batches // rounds,
    }
    if each == 1:
        written = made._get_pipeline_order()
    else:
        written = {rank: made._calculate_single_rank_operations(rank) for rank in range(ranks)}
    return [[one for action in written[rank] for one in flat(action)] for rank in range(ranks)]


def flat(action: Any) -> Iterator[Operation]:
    if action is None:
        return
    if action.computation_type.name == "OVERLAP_F_B":
        for part in action.sub_actions:
            yield from flat(part)
    elif action.computation_type.name in LETTERS:
        yield Operation(action.stage_index, LETTERS[action.computation_type.name], action.microbatch_index)


def numbered(mine: list[Operation]) -> list[Operation]:
    """torch's drawing of 1F1B numbers the forwards of the last rank from 1; what it runs begins with 0."""
    count = 0
    found = []
    for each in mine:
        found.append(each._replace(micro_batch=count) if each.kind == "F" else each)
        count += each.kind == "F"
    return found


@pytest.mark.parametrize(("name", "ranks", "each", "micro_batches"), CASES)
def test_orders_are_those_of_torch(name: ScheduleName, ranks: int, each: int, micro_batches: int) -> None:
    theirs = of_torch(name, ranks, each, micro_batches)
    if name == "1F1B":
        theirs = [numbered(mine) for mine in theirs]
    assert orders(name, ranks, ranks * each, micro_batches) == theirs


def test_seconds_by_hand() -> None:
    """Forward 1 s, backward 2 s, no time between ranks: (micro-batches + ranks - 1) * 3, and with half stages of two
    rounds the bubble is halved (arXiv 2104.04473, 2.2).
    """
    whole, half = [StagePass(1.0, 1.0, 1.0)] * 4, [StagePass(0.5, 0.5, 0.5)] * 8
    for name in ("GPipe", "1F1B"):
        assert simulate(orders(name, 4, 4, 8), whole, 0.0).seconds == pytest.approx((8 + 3) * 3)
    assert simulate(orders("Interleaved1F1B", 4, 8, 8), half, 0.0).seconds == pytest.approx(8 * 3 + 3 * 3 / 2)
    assert simulate(orders("ZBVZeroBubble", 4, 8, 8), half, 0.0).seconds < 8 * 3 + 3 * 3 / 2
    assert simulate(orders("1F1B", 2, 2, 1), whole[:2], 0.25).seconds == pytest.approx(6 + 2 * 0.25)
    assert simulate(orders("1F1B", 4, 4, 8), whole, 0.0).busy == pytest.approx(24)


@pytest.mark.parametrize(
    ("name", "each"), [("1F1B", 1), ("Interleaved1F1B", 2), ("ZBVZeroBubble", 2), ("DualPipeV", 2)]
)
def test_long_steps_are_a_line(name: ScheduleName, each: int) -> None:
    """Uneven stages: what `makespan` draws on from two short steps is what the whole order takes."""
    passes = [StagePass(1.0 + 0.1 * (stage % 3), 1.0, 1.0 + 0.05 * stage) for stage in range(4 * each)]
    exact = simulate(orders(name, 4, 4 * each, 80), passes, 0.01).seconds
    assert makespan(name, 4, passes, 80, 0.01).seconds == pytest.approx(exact, rel=0.005)


def test_an_order_that_cannot_run_is_an_error() -> None:
    wrong = [[Operation(0, "B", 0), Operation(0, "F", 0)]]
    with pytest.raises(ValueError, match="2 operations of this order wait for each other"):
        simulate(wrong, [StagePass(1.0, 1.0, 1.0)], 0.0)
