"""Who owns which matrix: balance, what travels, and that the formulas of costs count the same."""

from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from src.optim.newton_schulz import orthogonalise
from src.optim.owners import ROUND_ELEMENTS, Box, Ownership, Unit, flops, update_cost, working_bytes
from tests.train.runs import section

EIGHT_B = [
    w.shape for w in section("model", "llama3_8b").weights() if w.name.startswith("layers.") and len(w.shape) > 1
]


def cut(shape: tuple[int, ...], shards: int, copies: int = 1, axis: int = 0) -> list[Box]:
    """As FSDP cuts: copies outermost, torch's chunks."""
    size = -(-shape[axis] // shards)
    boxes = []
    for shard in range(shards):
        start = min(shard * size, shape[axis])
        starts, sizes = [0] * len(shape), [*shape]
        starts[axis], sizes[axis] = start, min(size, shape[axis] - start)
        boxes.append(Box(tuple(starts), tuple(sizes)))
    return boxes * copies


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (56, 16)])
def test_flops_are_those_of_newton_schulz(shape: tuple[int, int]) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalise(torch.randn(shape), 5)
    assert counter.get_total_flops() == flops(*shape, 5)


@pytest.mark.parametrize(("shards", "copies"), [(8, 1), (64, 1), (8, 8), (1, 8)])
def test_costs_of_8_and_64_ranks(shards: int, copies: int) -> None:
    """Llama 3 8B: what a schedule counts, matrix by matrix, is what the formula says; each matrix has one owner."""
    ranks = shards * copies
    schedule = Ownership(EIGHT_B, [cut(shape, shards, copies) for shape in EIGHT_B], ranks)
    cost = update_cost(EIGHT_B, 5, shards=shards, copies=copies)
    assert sum(5 * each for each in schedule.load) / ranks == pytest.approx(cost.flops)
    assert sum(schedule.sent) / ranks == pytest.approx(cost.bytes)
    assert len(schedule.owner) == 32 * 7
    assert schedule.stay == []
    # The busiest rank, of what is due to each; 64 ranks share 224 matrices, of which 96 are 4 times as long as wide.
    assert max(schedule.load) < (1.02 if ranks == 8 else 1.2) * sum(schedule.load) / ranks
    assert max(schedule.sent) < 1.3 * cost.bytes
    if copies == 1:  # of gathering all matrices on all ranks
        assert cost.bytes < 2.1 / ranks * 2 * sum(map(prod, EIGHT_B))


def test_every_shard_comes_once_and_goes_back_to_every_holder() -> None:
    shapes = [(10, 6), (7, 9), (4, 6, 5)]
    boxes = [cut(shapes[0], 4, 2), cut(shapes[1], 4, 2, axis=1), cut(shapes[2], 4, 2)]
    schedule = Ownership(shapes, boxes, 8)
    for unit, owner in schedule.owner.items():
        senders = schedule.senders(unit)
        assert sum(box.elements for box in senders.values()) == unit.elements
        assert owner in senders or schedule.boxes[unit.place][owner].elements == 0
        assert all(rank // 4 == owner // 4 for rank in senders), "shards come from the owner's own copy"
        assert sum(box.elements for _, box in schedule.held[unit]) == 2 * unit.elements
    dealt = [unit for each in schedule.rounds for units in each.values() for unit in units]
    assert len(dealt) == len(schedule.owner)
    assert set(dealt) == set(schedule.owner)


def test_experts_that_are_whole_somewhere_stay_there() -> None:
    """8 experts over 4 ranks travel nowhere; with a copy of each, results do, and the copies share the work."""
    shape = (8, 6, 4)
    alone = Ownership([shape], [cut(shape, 4)], 4)
    assert (alone.stay, alone.rounds, alone.sent) == ([0], [], [0] * 4)
    assert alone.load == [2 * flops(6, 4, 1)] * 4
    twice = Ownership([shape], [cut(shape, 4, 2)], 8)
    assert twice.load == [flops(6, 4, 1)] * 8
    assert twice.sent == [2 * 6 * 4] * 8


def test_a_round_is_bounded() -> None:
    shape = (ROUND_ELEMENTS // 4096 // 2, 4096)
    schedule = Ownership([shape] * 10, [cut(shape, 2)] * 10, 2)
    assert [sum(unit.elements for unit in each[0]) for each in schedule.rounds] == [ROUND_ELEMENTS] * 2 + [
        ROUND_ELEMENTS // 2
    ]
    assert schedule.rounds[0][0][0] == Unit(0, 0, *shape)
    # One device holds no round: the largest matrix, and what Newton-Schulz makes of it.
    assert working_bytes({"a": shape, "b": (2, 2)}, ranks=1, copies=1) < 2 * 7 * prod(shape)
    assert working_bytes({"a": shape}, ranks=8, copies=1) < working_bytes({"a": shape}, ranks=8, copies=8)
    assert working_bytes({}, ranks=8, copies=1) == 0
