"""How a step is divided into passes where task.micro_batch leaves it to the plan, and what a CPU has room for."""

from dataclasses import replace
from typing import Any

import pytest

from src.errors import PlanError
from src.planning.plan import plan
from tests.train.runs import Gpus, changed, make_run, section


def folded() -> Any:
    return changed(section("parallel", "pp2"), pipeline_schedule="DualPipeV")


@pytest.mark.parametrize(
    ("global_batch", "parallel", "groups", "expected"),
    [
        (16, "single", 1, (4, 4)),
        (16, "tp2_fsdp4", 1, (4, 1)),
        (16, "fsdp16", 1, (1, 1)),
        (6, "fsdp2", 1, (3, 1)),
        (10, "fsdp2", 1, (1, 5)),  # of 5 sequences
        (8, "pp2", 1, (4, 2)),
        (8, folded(), 1, (2, 4)),  # a schedule that asks for as many as its 4 stages
        (8, "fsdp2", 2, (2, 2)),
        (8, "fsdp2", 3, (1, 4)),
    ],
)
def test_passes_are_as_large_as_the_layout_lets_them(
    global_batch: int, parallel: Any, groups: int, expected: tuple[int, int]
) -> None:
    copies = section("fault_tolerance", "none")
    if groups > 1:
        copies = changed(section("fault_tolerance", "torchft"), groups=groups)
    task = {"global_batch": global_batch, "micro_batch": None}
    answers = plan(make_run(task, parallel=parallel, fault_tolerance=copies))
    assert (answers.micro_batch, answers.micro_batches) == expected
    assert answers.sequences_per_step == global_batch


def test_a_step_that_cannot_be_divided_names_the_nearest_that_can() -> None:
    with pytest.raises(PlanError) as caught:
        plan(make_run({"global_batch": 10, "micro_batch": None}, parallel="fsdp4"))
    assert caught.value.problems == ("task.global_batch=10 is no multiple of 4 data ranks (8 or 12 would do)",)


EMULATED = changed(section("precision", "fp8"), float8=changed(section("precision", "fp8").float8, emulate=True))
SUMMED = "over which the gradients of weights are summed"


@pytest.mark.parametrize(
    ("task", "layout", "said"),
    [
        (
            {"seq_len": 1001, "micro_batch": 1},
            "single",
            f"task.micro_batch=1 * task.seq_len=1001 tokens are no multiple of 16, {SUMMED} (task.seq_len: 992 or 1008",
        ),
        (
            {"seq_len": 1000, "micro_batch": 1},
            "cp2",
            f"task.micro_batch=1 * task.seq_len=1000 / parallel.context=2 tokens are no multiple of 16, {SUMMED} "
            "(task.seq_len: 992 or 1024",
        ),
        (
            {"seq_len": 12, "micro_batch": 2},
            "single",
            f"task.micro_batch=2 * task.seq_len=12 tokens are no multiple of 16, {SUMMED} (task.seq_len: 8 or 16",
        ),
        (
            {"seq_len": 6, "micro_batch": None},  # as the plan divides 8 sequences: 4 at once
            "single",
            f"task.micro_batch=4 * task.seq_len=6 tokens are no multiple of 16, {SUMMED} (task.seq_len: 4 or 8",
        ),
        ({"seq_len": 1000, "micro_batch": 2}, "single", None),
        ({"seq_len": 1000, "micro_batch": 4}, "cp2_fsdp2", None),
    ],
)
@pytest.mark.parametrize("precision", [EMULATED, "fp8", "fp8_rowwise"], ids=["emulated", "tensorwise", "rowwise"])
def test_tokens_of_a_float8_product(precision: Any, task: dict[str, Any], layout: str, said: str | None) -> None:
    """On a CPU, where any number can be emulated, as on the GPU that it rehearses."""
    run = make_run(task, model=changed(section("model", "llama3_debug"), max_seq_len=2048), parallel=layout)
    run = replace(run, precision=section("precision", precision) if isinstance(precision, str) else precision)
    exact = changed(run.precision, float8=changed(run.precision.float8, recipe="rowwise_with_gw_hp"))
    assert plan(replace(run, precision=exact)).world
    if said is None:
        assert plan(run).world
        return
    with pytest.raises(PlanError) as caught:
        plan(run)
    (line,) = caught.value.problems
    way_out = " would do; or precision.float8.recipe=rowwise_with_gw_hp)"
    assert line == f"precision.float8.recipe={run.precision.float8.recipe}: {said}{way_out}"


def test_ranks_on_a_cpu_share_its_memory() -> None:
    run = make_run({"micro_batch": 1}, model="llama3_8b", parallel="fsdp4")
    here = Gpus(host_gib=24.0)
    assert plan(run, devices=here).fits is None, "a dry run plans for elsewhere"
    with pytest.raises(PlanError) as caught:
        plan(replace(run, dry_run=False), devices=here)
    (line,) = caught.value.problems
    assert line.startswith("does not fit: there is no GPU here, and the 4 ranks need about 2")
    assert "of the 24.0 GiB of this machine; pass a smaller model, cluster=slurm" in line
    assert plan(replace(run, dry_run=False), devices=Gpus(host_gib=300.0)).world == 4


def test_weights_stay_for_gradients_that_are_asked_for_later() -> None:
    """With reshard=always torch's backward pass for weights finds the sharded parameters, not those of the graph, and
    gives no gradient: `RANDOM_RUNS`' seed 113.
    """
    layout = changed(section("parallel", "pp2"), pipeline_schedule="InterleavedZeroBubble", reshard="always")
    with pytest.raises(PlanError, match=r"parallel.reshard=always lets go of weights .*pass parallel.reshard=default"):
        plan(make_run({"global_batch": 16}, parallel=layout))
