"""Every derived number, and one case for each reason to refuse."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from src.errors import ConfigError, PlanError
from src.planning.plan import Plan, plan
from src.planning.table import render
from src.run import Run
from tests.train.runs import Gpus, Here, There, Tokens, changed, make_run, section

BIG = {"seq_len": 8192, "micro_batch": 1, "global_batch": 64}


def layout(**degrees: Any) -> Any:
    return changed(section("parallel", "single"), **degrees)


def test_numbers_of_a_layout() -> None:
    run = make_run(
        {"steps": 500, "seq_len": 8192, "global_batch": 32, "micro_batch": 2},
        cluster=There(gpus_per_node=4),
        model="llama3_8b",
        parallel="tp2_fsdp4",
        precision="bf16",
    )
    found = plan(run)
    assert (found.world, found.nodes, found.ranks_per_node, found.data_ranks) == (8, 2, 4, 4)
    assert list(found.axes.items()) == [("shard", 4), ("tensor", 2)]
    assert found.micro_batches * found.micro_batch * found.data_ranks == found.sequences_per_step == 32
    assert found.micro_batches == 4
    assert (found.tokens_per_step, found.steps, found.tokens) == (32 * 8192, 500, 500 * 32 * 8192)
    assert found.parameters == found.active_parameters == 8_030_261_248
    norms = (2 * 32 + 1) * 4096  # on both tensor ranks
    assert found.parameters_per_gpu == (found.parameters + norms) // 8
    assert (found.flops_per_token, found.flops_per_token_causal) == (57_914_449_920, 51_471_998_976)
    assert found.schedule_end == 500
    assert found.last_lr == pytest.approx(8e-4 * run.schedule.multiplier(499, 500))
    assert (found.memory_limit, found.fits, found.epochs) == (None, None, None)


def test_one_machine_is_one_node() -> None:
    found = plan(make_run({"global_batch": 32}, parallel="hsdp2x4"))
    assert (found.world, found.nodes, found.ranks_per_node) == (8, 1, 8)
    assert list(found.axes) == ["replicate", "shard"]


def test_the_largest_model_is_planned_at_once() -> None:
    run = make_run(
        BIG,
        cluster=There(gpu_memory_gib=79.6),
        model="llama3_405b",
        parallel=layout(tensor=8, shard=64),
        precision="bf16",
        recompute="full",
        compile="blocks",
    )
    started = time.process_time()
    found = plan(run)
    assert time.process_time() - started < 5.0  # takes 0.1 s
    assert (found.world, found.nodes, found.parameters) == (512, 64, 405_853_388_800)
    assert found.fits is True
    json.dumps(found.to_dict())


def test_json_and_table_say_the_same() -> None:
    import io

    from rich.console import Console

    found = plan(make_run({"steps": 15}, parallel="fsdp2"))
    values = json.loads(found.to_json())
    assert values == json.loads(json.dumps(found.to_dict()))
    assert values["memory"]["peak"] == found.memory.peak
    assert values["warnings"] == ["schedule.warmup_steps=20 is cut to the 15 steps there are", *values["warnings"][1:]]
    console = Console(file=io.StringIO(), width=120)
    console.print(render(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for said in ("2 on 1 node", "shard 2", "1 x 4 x 2", f"{found.parameters:,}", "warning: schedule.warmup_steps=20"):
        assert said in text


def test_ranks_read_what_the_launcher_has_computed(tmp_path: Path) -> None:
    run = make_run({"global_batch": 96, "steps": 99}, model="llama3_8b", parallel=layout(pipeline=2, shard=4))
    before = plan(run, None, Gpus())
    fed = before.with_data(run, Tokens())
    assert fed == plan(run, Tokens(), Gpus()) != before
    for each in (before, fed):
        (tmp_path / "plan.json").write_text(each.to_json())
        assert Plan.read(tmp_path) == each


def test_a_plan_needs_no_torch() -> None:
    """So that a mistake is told at once."""
    code = "import sys, src.planning.plan, src.planning.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


LAYERS = [f"layers.{layer}" for layer in range(6)]

REFUSALS: dict[str, tuple[Run, dict[str, Any], str]] = {
    "experts of a dense model": (
        make_run(parallel=layout(shard=2, expert=2)),
        {},
        "parallel.expert=2: this llama3 has no routed experts; pass parallel.expert=1",
    ),
    "fewer micro-batches than stages": (
        make_run({"global_batch": 8, "micro_batch": 8}, parallel="pp2"),
        {},
        "parallel.pipeline_schedule=1F1B needs at least as many micro-batches as its 2 stages, and task.global_batch "
        "over data ranks and task.micro_batch makes 1; 2 would do, or parallel.pipeline_schedule=GPipe",
    ),
    "micro-batches in no rounds": (
        make_run({"global_batch": 20}, parallel=layout(pipeline=2, pipeline_schedule="Interleaved1F1B")),
        {},
        "parallel.pipeline_schedule=Interleaved1F1B takes micro-batches in equal rounds of about parallel.pipeline=2, "
        "and task.global_batch over task.micro_batch makes 5 (4 or 6 would do)",
    ),
    "one stage where several are due": (
        make_run(parallel=layout(pipeline=2, pipeline_schedule="LoopedBFS", layers_per_stage=4)),
        {},
        "parallel.pipeline_schedule=LoopedBFS takes several stages a rank, and parallel.layers_per_stage=4 makes one; "
        "4 stages in all, or parallel.pipeline_schedule=1F1B",
    ),
    "several stages where one is due": (
        make_run(parallel=layout(pipeline=2, layers_per_stage=2)),
        {},
        "parallel.pipeline_schedule=1F1B takes one stage a rank, and parallel.layers_per_stage=2 makes 2; "
        "2 stages in all, or parallel.pipeline_schedule=Interleaved1F1B",
    ),
    "a V of more than two": (
        make_run(parallel=layout(pipeline=2, pipeline_schedule="ZBVZeroBubble", layers_per_stage=1)),
        {},
        "parallel.pipeline_schedule=ZBVZeroBubble takes exactly two stages a rank, and parallel.layers_per_stage=1 "
        "makes 4; 4 stages in all",
    ),
    "stages that ranks cannot share": (
        make_run(parallel=layout(pipeline=2, layers_per_stage=3)),
        {},
        "parallel.layers_per_stage=3 makes 3 stages, no multiple of parallel.pipeline=2 (2 or 4 stages would do)",
    ),
    "too few layers": (
        make_run({"global_batch": 64}, parallel=layout(pipeline=16)),
        {},
        "parallel.pipeline=16 with parallel.first_stage_less=1 and last_stage_less=1 cannot cut model.n_layers=6: "
        "16 stages for 8 units (layers, and what the first and last stage hold less)",
    ),
    "a forgotten layer": (
        make_run(
            parallel=layout(pipeline=2, stages=[["tok_embeddings", *LAYERS[:2]], [*LAYERS[3:], "norm", "output"]])
        ),
        {},
        "parallel.stages must name tok_embeddings, layers.0 to layers.5, norm and output once each, in this order; "
        "here: missing ['layers.2']",
    ),
    "a head in two pieces": (
        make_run(
            {"global_batch": 16}, parallel=layout(pipeline=2, stages=[["tok_embeddings", *LAYERS, "norm"], ["output"]])
        ),
        {},
        "parallel.stages parts norm from output; both belong to the last stage",
    ),
    "two ways to cut": (
        make_run(
            parallel=layout(pipeline=2, layers_per_stage=4, stages=[["tok_embeddings", *LAYERS], ["norm", "output"]])
        ),
        {},
        "parallel.stages and parallel.layers_per_stage both say where to cut; pass one of them as null",
    ),
    "a cut without a pipeline": (
        make_run(parallel=layout(layers_per_stage=4)),
        {},
        "parallel.layers_per_stage cuts a pipeline, and there is none: parallel.pipeline=1; pass "
        "parallel.layers_per_stage=null",
    ),
    "a pipeline that reduces too often": (
        make_run(parallel=layout(pipeline=2, sync_each_micro_batch=True)),
        {},
        "parallel.sync_each_micro_batch=true: parallel.pipeline=2 reduces gradients once, after the last micro-batch; "
        "pass false",
    ),
    "a tied head on two stages": (
        make_run(model=changed(section("model", "llama3_debug"), tie_word_embeddings=True), parallel="pp2"),
        {},
        "parallel.pipeline=2 would part model.tie_word_embeddings=true over two stages; pass parallel.pipeline=1",
    ),
    "a compiled block in halves": (
        make_run({"global_batch": 16}, compile="blocks", parallel=layout(pipeline=2, pipeline_schedule="DualPipeV")),
        {},
        "parallel.pipeline_schedule=DualPipeV asks for the gradients of inputs and of weights apart, and a compiled "
        "block gives them at once; pass compile.blocks=false or parallel.pipeline_schedule=Interleaved1F1B",
    ),
    "a context cut in unequal chunks": (
        make_run({"seq_len": 252}, parallel=layout(context=2, tensor=2)),
        {},
        "task.seq_len=252 is no multiple of parallel.tensor=2 * 2 * parallel.context=2 (248 or 256 would do)",
    ),
    "rotation without a cut": (
        make_run(parallel=layout(rotate="alltoall")),
        {},
        "parallel.rotate=alltoall moves nothing: parallel.context=1; pass parallel.rotate=allgather",
    ),
    "rotation of a mask": (
        make_run(
            parallel=layout(context=2, rotate="alltoall"),
            model=changed(section("model", "llama3_debug"), attention="flex"),
        ),
        {},
        "parallel.rotate=alltoall joins parts of causal attention, and model.attention=flex has a mask; "
        "pass parallel.rotate=allgather or model.attention=sdpa",
    ),
    "asynchronous products without a cut": (
        make_run(parallel=layout(async_tensor=True), compile="blocks"),
        {},
        "parallel.async_tensor=true overlaps nothing: parallel.tensor=1; pass parallel.async_tensor=false",
    ),
    "asynchronous products without a compiler": (
        make_run(parallel=layout(tensor=2, async_tensor=True)),
        {},
        "parallel.async_tensor=true is the compiler's work; pass compile=blocks",
    ),
    "asynchronous products on the CPU": (
        make_run(parallel=layout(tensor=2, async_tensor=True), compile="blocks"),
        {"devices": Gpus(count=None)},
        "parallel.async_tensor=true needs GPUs; pass parallel.async_tensor=false",
    ),
    "tensor and kv heads": (
        make_run(BIG, model="llama3_8b", parallel=layout(tensor=16, shard=4)),
        {},
        "parallel.tensor=16 does not divide model.n_kv_heads=8 (1, 2, 4 or 8 do)",
    ),
    "tensor and heads": (
        make_run(parallel=layout(tensor=32), model=changed(section("model", "llama3_debug"), n_heads=16)),
        {},
        "parallel.tensor=32 does not divide model.n_heads=16 (1, 2, 4, 8 or 16 do)",
    ),
    "tensor and vocabulary": (
        make_run(parallel="tp2", model=changed(section("model", "llama3_debug"), vocab_size=2047)),
        {},
        "parallel.tensor=2 does not divide model.vocab_size=2047 (1, 23, 89 or 2047 do)",
    ),
    "tensor and sequence": (
        make_run({"seq_len": 255}, parallel="tp4"),
        {},
        "task.seq_len=255 is no multiple of parallel.tensor=4 (252 or 256 would do)",
    ),
    "sequence too long": (
        make_run({"seq_len": 8194}),
        {},
        "task.seq_len=8194 is beyond model.max_seq_len=8192; at most 8192 tokens",
    ),
    "batch no multiple of a pass": (
        make_run({"global_batch": 10, "micro_batch": 4}, parallel="fsdp2"),
        {},
        "task.global_batch=10 is no multiple of task.micro_batch=4 * 2 data ranks "
        "(8 or 16 would do; or task.micro_batch: 1 or 5 do)",
    ),
    "batch below the data ranks": (
        make_run({"global_batch": 3, "micro_batch": 1}, parallel="hsdp2x2"),
        {},
        "task.global_batch=3 is no multiple of task.micro_batch=1 * 4 data ranks (4 would do)",
    ),
    "more ranks than GPUs": (
        make_run({"global_batch": 16}, parallel="hsdp2x2"),
        {"devices": Gpus(2, 80.0)},
        "parallel asks for 4 ranks (replicate=2 * shard=2) and there are 2 GPUs; choose a layout of at most 2 ranks",
    ),
    "nodes half filled": (
        make_run({"global_batch": 48}, parallel=layout(shard=12), cluster=There(gpus_per_node=8)),
        {},
        "parallel asks for 12 ranks (shard=12), which do not fill nodes of cluster.gpus_per_node=8 (8 or 16 do)",
    ),
    "float8 of a GPU that has none": (
        make_run(precision="fp8"),
        {"devices": Gpus(8, capability=(8, 0))},
        "precision.float8: this GPU has compute capability 8.0, this needs 8.9; pass precision=bf16",
    ),
    "float8 experts before Hopper": (
        make_run(model="deepseek_v3_debug", precision="fp8_experts"),
        {"devices": Gpus(8, capability=(8, 9))},
        "precision.float8: this GPU has compute capability 8.9, this needs 9.0; pass precision=bf16",
    ),
    "heads too narrow for FlexAttention's kernel": (
        make_run(model=changed(section("model", "llama3_debug"), attention="flex", head_dim=8)),
        {"devices": Gpus(8)},
        "model.attention=flex has no GPU kernel for heads of 8 elements, only from 16; pass wider or fewer heads, "
        "model.attention=sdpa, or cluster.gpus=0",
    ),
    "a budget without a compiler": (
        make_run(recompute="budget"),
        {},
        "recompute.mode=budget is kept by the compiler; pass compile=blocks, or recompute=selective",
    ),
    "documents unknown": (
        make_run(model=changed(section("model", "llama3_debug"), attention="flex", mask="block_causal")),
        {},
        "model.mask=block_causal needs to know the documents; pass data.document_masks=true",
    ),
    "documents unused": (
        make_run(data=changed(section("data", "synthetic"), document_masks=True)),
        {},
        "data.document_masks=true does nothing to this model's attention; pass model.attention=flex "
        "model.mask=block_causal, or data.document_masks=false",
    ),
    "nothing to validate on": (
        make_run({"validate_every": 5}, data=changed(section("data", "synthetic"), validation_fraction=0.0)),
        {},
        "task.validate_every=5 has nothing to read: data.validation_fraction=0; "
        "pass task.validate_every=0 or a fraction such as 0.01",
    ),
    "no layer is repeated": (
        make_run(recompute=changed(section("recompute", "every2"), every=100)),
        {},
        "recompute.every=100 repeats none of model.n_layers=6; at most recompute.every=6, or recompute=none",
    ),
    "a learning rate of 0 for most of the run": (
        make_run({"steps": 1000}, schedule=changed(section("schedule", "wsd"), total_steps=100)),
        {},
        "schedule.total_steps=100 leaves a learning rate of 0 for the rest of task.steps=1000; pass "
        "schedule.total_steps=null, at least 1000, or a schedule.min_factor above 0",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case: str) -> None:
    run, given, said = REFUSALS[case]
    with pytest.raises(PlanError) as caught:
        plan(run, **given)
    assert said in caught.value.problems


def test_only_the_fault_is_told() -> None:
    """Each single fault above, but for those that bring another with them, is told in one line."""
    alone = [case for case, (_, _, said) in REFUSALS.items() if "parallel.tensor" not in said]
    for case in alone:
        run, given, said = REFUSALS[case]
        with pytest.raises(PlanError) as caught:
            plan(run, **given)
        assert caught.value.problems == (said,), case


def test_every_problem_at_once() -> None:
    run = make_run(
        {"seq_len": 8195, "global_batch": 7, "micro_batch": 2},
        cluster=Here(gpu_memory_gib=0.5),
        parallel=layout(tensor=3, shard=2, pipeline=2),
    )
    with pytest.raises(PlanError) as caught:
        plan(run, devices=Gpus(4, 80.0), problems=["data.files: no such file"])
    starts = [
        "data.files: no such file",
        "parallel.tensor=3 does not divide model.n_heads=16",
        "parallel.tensor=3 does not divide model.n_kv_heads=16",
        "parallel.tensor=3 does not divide model.vocab_size=2048",
        "parallel asks for 12 ranks (pipeline=2 * shard=2 * tensor=3) and there are 4 GPUs",
        "task.seq_len=8195 is beyond",
        "task.seq_len=8195 is no multiple of parallel.tensor=3",
        "task.global_batch=7 is no multiple",
        "does not fit: ",
    ]
    assert len(caught.value.problems) == len(starts)
    for problem, start in zip(caught.value.problems, starts, strict=True):
        assert problem.startswith(start)


def test_the_cpu_takes_any_number_of_ranks() -> None:
    assert plan(make_run(parallel="fsdp8", task={"global_batch": 32}), devices=Gpus(None, None)).world == 8


def test_warnings() -> None:
    calm = plan(make_run({"steps": 1000}), corpus=Tokens())
    assert calm.warnings == ("task.steps=1000 reads the training data 2.0 times",)
    assert calm.epochs == pytest.approx(8000 / 3906)
    across = make_run(BIG, model="llama3_8b", parallel=layout(tensor=8, shard=2), cluster=There(gpus_per_node=4))
    assert "parallel.tensor=8 crosses nodes of 4 GPUs: slow" in plan(across).warnings


def test_sections_of_the_wrong_kind() -> None:
    run = make_run()
    sections = {name: getattr(run, name) for name in Run.__dataclass_fields__}
    assert Run.from_sections(sections) == run
    with pytest.raises(ConfigError) as caught:
        Run.from_sections(sections | {"model": run.parallel, "task": run.optim})
    assert sorted(caught.value.problems) == [
        "model: _target_ is a ParallelDims, which is no ModelConfig",
        "task: _target_ is a AdamW, which is no Task",
    ]


def test_weights_in_bfloat16_go_with_every_optimizer() -> None:
    for optim in ("adamw", "adamw_bf16", "lion"):
        assert plan(make_run(precision="bf16_full", optim=section("optim", optim))).world == 1
