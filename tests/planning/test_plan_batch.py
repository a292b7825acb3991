"""How a step is divided into passes where task.micro_batch leaves it to the plan, and what a CPU has room for."""

from dataclasses import replace
from typing import Any

import pytest

from src.errors import PlanError
from src.planning.batch import GPU_TOKENS, ROOM
from src.planning.memory import GIB
from src.planning.plan import Plan, plan
from tests.planning.test_time_step import site
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


def small(devices: Gpus, task: dict[str, Any] | None = None, **choices: Any) -> Plan:
    """A step of recipe llama3_20m, whose passes are left to the plan."""
    numbers = {"seq_len": 512, "global_batch": 64, "micro_batch": None} | (task or {})
    presets = {"model": "llama3_20m", "precision": "bf16", "compile": "blocks", "recompute": "auto"}
    return plan(make_run(numbers, **(presets | choices)), devices=devices)


def test_a_gpu_gets_passes_that_it_is_busy_with() -> None:
    """Of 4 sequences of 512 tokens a model of 20 M parameters makes a nineteenth of an H200's tokens."""
    large = Gpus(1, 139.8)
    whole = small(large)
    assert (whole.micro_batch, whole.micro_batches, whole.recompute.mode) == (64, 1, "none")
    assert small(large, {"global_batch": 1024}).micro_batch * 512 == GPU_TOKENS
    assert small(large, {"global_batch": 1024, "seq_len": 2048}).micro_batch * 2048 == GPU_TOKENS
    assert small(large, {"global_batch": 84, "seq_len": 1024}).micro_batch == 28  # a divisor
    assert small(large, {"micro_batch": 2}).micro_batch == 2
    for none in (Gpus(host_gib=64.0), Gpus(1, None)):  # a CPU, and a GPU of which nothing is known
        assert small(none).micro_batch == 4
    named = make_run({"seq_len": 512, "global_batch": 64, "micro_batch": None}, site(), model="llama3_20m")
    assert plan(named).micro_batch == 64, "of a model of GPU that is named and not here"
    assert plan(replace(named, cluster=site(gpu_model=None))).micro_batch == 4
    shared = small(Gpus(2, 139.8), model="llama3_debug", parallel="pp2", task={"seq_len": 128})
    assert shared.micro_batch == 4, "a pipeline shares passes between its stages"


def test_passes_follow_the_memory_of_the_gpu() -> None:
    """A smaller one has shorter passes, and a fifth of it is left where more than 4 sequences go at once."""
    sizes = [small(Gpus(1, gib)) for gib in (40.0, 6.0, 4.0)]
    assert [each.micro_batch for each in sizes] == sorted((each.micro_batch for each in sizes), reverse=True)
    assert sizes[0].micro_batch == 64
    assert 4 < sizes[1].micro_batch < 64
    for each, gib in zip(sizes, (40.0, 6.0, 4.0), strict=True):
        assert each.memory.peak <= (ROOM if each.micro_batch > 4 else 1.0) * gib * GIB
        assert each.recompute.mode == "none"


def test_what_four_sequences_do_not_leave_room_for_is_smaller() -> None:
    """And still more than the device has is refused as before."""
    task = {"seq_len": 8192, "global_batch": 32, "micro_batch": None}
    eight: dict[str, Any] = {"model": "llama3_8b", "parallel": "fsdp8", "precision": "bf16", "recompute": "none"}
    two = plan(make_run(task | {"micro_batch": 2}, **eight)).memory.peak / GIB
    found = plan(make_run(task, **eight), devices=Gpus(8, two + 0.01))
    assert (found.micro_batch, found.micro_batches) == (2, 2)
    with pytest.raises(PlanError, match=r"does not fit: .*task\.micro_batch=2 frees"):
        plan(make_run(task, **eight), devices=Gpus(8, 10.0))


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
