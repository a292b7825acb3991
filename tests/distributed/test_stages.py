"""The split of layers over stages, by the rule's own examples and by what torch's schedules ask."""

from typing import Any
from unittest.mock import MagicMock

import pytest

from src.distributed.parallel_dims import SPLITTING, ParallelDims
from src.distributed.pipeline.stages import (
    SCHEDULES,
    in_flight,
    module_of,
    modules,
    owned,
    split,
    stage_count,
    warnings,
)
from tests.distributed.layouts import degrees
from tests.models.shapes import tiny_llama


def pipeline(ranks: int, schedule: str = "1F1B", **changes: Any) -> ParallelDims:
    return degrees(f"pp{ranks}", pipeline_schedule=schedule, **changes)


def of_stages(count: int, **changes: Any) -> ParallelDims:
    return pipeline(count, **changes)


VECTORS = {  # layers, stages -> layers of each stage, when embedding and head count as one layer each
    (6, 2): [3, 3],
    (6, 4): [1, 2, 2, 1],
    (6, 8): [0, 1, 1, 1, 1, 1, 1, 0],
    (32, 4): [8, 9, 8, 7],
    (32, 8): [4, 5, 4, 4, 4, 4, 4, 3],
    (80, 8): [10, 11, 10, 10, 10, 10, 10, 9],
    (126, 16): [7, *[8] * 14, 7],
    (27, 8): [3, 4, 4, 4, 4, 3, 3, 2],
    (61, 16): [3, *[4] * 14, 2],
}


@pytest.mark.parametrize(("layers", "stages"), VECTORS)
def test_the_split_rule(layers: int, stages: int) -> None:
    found = split(of_stages(stages), layers)
    assert [sum(name.startswith("layers.") for name in stage) for stage in found] == VECTORS[layers, stages]
    assert tuple(name for stage in found for name in stage) == modules(layers)
    assert found[0][0] == "tok_embeddings"
    assert found[-1][-2:] == ("norm", "output")


def test_embedding_and_head_may_weigh_nothing_or_more() -> None:
    assert [len(stage) for stage in split(of_stages(2, first_stage_less=0, last_stage_less=0), 6)] == [4, 5]
    assert [len(stage) for stage in split(of_stages(2, first_stage_less=0, last_stage_less=4), 6)] == [6, 3]
    assert split(degrees("single"), 3) == (modules(3),)


def test_the_number_of_stages() -> None:
    assert stage_count(pipeline(4), 30) == 4
    assert stage_count(pipeline(4, "Interleaved1F1B"), 30) == 8
    assert stage_count(pipeline(4, "Interleaved1F1B", layers_per_stage=2), 30) == 16
    assert stage_count(pipeline(4, "Interleaved1F1B", layers_per_stage=2), 29) == 16
    assert stage_count(pipeline(2, stages=[["tok_embeddings"], ["layers.0"], ["norm"], ["output"]]), 1) == 4


def test_every_weight_has_one_stage() -> None:
    config = tiny_llama()
    names = {module_of(weight.name) for weight in config.weights()}
    assert names == set(modules(config.n_layers))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_stage_has_one_rank(schedule: Any) -> None:
    count = stage_count(pipeline(4, schedule), 30)
    ranks = [owned(rank, 4, count, schedule) for rank in range(4)]
    assert sorted(stage for stages in ranks for stage in stages) == list(range(count))
    if schedule in ("ZBVZeroBubble", "DualPipeV"):
        assert ranks == [(0, 7), (1, 6), (2, 5), (3, 4)]
    elif count == 8:
        assert ranks == [(0, 4), (1, 5), (2, 6), (3, 7)]


def peaks(ranks: int, schedule: str, each: int, micro_batches: int) -> list[int]:
    """Most forwards that wait for a backward on each rank, counted in torch's own order of actions."""
    from torch.distributed.pipelining.schedules import _ComputationType as Kind
    from torch.distributed.pipelining.schedules import get_schedule_class

    stages = [MagicMock(num_stages=ranks * each, group_size=ranks, group_rank=0, submod=None) for _ in range(each)]
    made = get_schedule_class(schedule)(stages if SCHEDULES[schedule].several else stages[0], micro_batches)  # type: ignore[index]
    found = []
    for rank in range(ranks):
        kept = most = 0
        whole = schedule in SPLITTING
        for action in made.pipeline_order[rank]:
            for one in [] if action is None else action.sub_actions or [action]:
                kept += one.computation_type == Kind.FORWARD
                kept -= one.computation_type == Kind.FULL_BACKWARD
                kept -= whole and one.computation_type == Kind.BACKWARD_WEIGHT
                most = max(most, kept)
        found.append(most)
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("ranks", "each", "micro_batches"), [(2, 2, 4), (4, 2, 8), (4, 2, 16), (8, 3, 16), (4, 2, 3)])
def test_what_a_schedule_keeps_is_what_torch_keeps(schedule: Any, ranks: int, each: int, micro_batches: int) -> None:
    demands = SCHEDULES[schedule]
    each = 1 if not demands.several else 2 if demands.folded else each
    if demands.full and micro_batches < ranks * each:
        return
    kept = [in_flight(rank, ranks, ranks * each, schedule, micro_batches) * each for rank in range(ranks)]
    counted = peaks(ranks, schedule, each, micro_batches)
    if schedule == "ZBVZeroBubble" and micro_batches < 2 * ranks - 1:  # its first ranks never fill up
        assert max(kept) == max(counted)
    else:
        assert kept == counted


def test_few_micro_batches_are_told() -> None:
    assert warnings(pipeline(4, "GPipe"), 30, 4) == []
    (line,) = warnings(pipeline(4, "GPipe"), 30, 2)
    assert line.startswith("2 micro-batches for 4 stages leave most ranks idle")
    assert warnings(degrees("single"), 30, 1) == []
