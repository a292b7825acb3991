"""What must hold of any step: random layouts on random sites, bytes of collectives, every term in the plan's table."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from src.planning.plan import load_of, plan
from src.planning.table import STEP_PARTS, render
from src.planning.time.bubbles import StagePass, simulate
from src.planning.time.collectives import (
    Fabric,
    RankGroup,
    all_reduce_seconds,
    all_to_all_seconds,
    gather_seconds,
)
from src.planning.time.devices import GPUS
from src.planning.time.orders import orders
from src.planning.time.step import Question, StepTime, Terms, step_time, terms
from tests.planning.test_time_step import GB, PLAIN, layout, site
from tests.train.runs import make_run

SEED, DRAWS = 20261130, 60
COMPILED = {"precision": "bf16", "compile": "blocks"}
SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS")


def drawn(random: Random) -> Question:
    """A legal layout of up to 1,024 GPUs, of a dense or a routed model, on links of any speed."""
    routed = random.random() < 0.4
    pipeline, tensor, context = random.choice((1, 1, 2, 4)), random.choice((1, 2, 8)), random.choice((1, 1, 2))
    degrees: dict[str, Any] = {
        "pipeline": pipeline,
        "tensor": 1 if routed else tensor,
        "context": context,
        "shard": random.choice((2, 8, 16)),
        "replicate": random.choice((1, 1, 4)),
        "expert": random.choice((1, 2, 4)) if routed else 1,
        "pipeline_schedule": random.choice(SCHEDULES) if pipeline > 1 else "1F1B",
        "reshard": random.choice(("default", "never")),
    }
    data = degrees["shard"] * degrees["replicate"]
    task = {"seq_len": 4096, "micro_batch": 1, "global_batch": data * 4 * pipeline}
    run = make_run(task, model="deepseek_v3_16b" if routed else "llama3_8b", parallel=layout(**degrees),
                   recompute=random.choice(("none", "selective", "full")), **COMPILED)  # fmt: skip
    fabric = Fabric(
        nvlink=random.uniform(50, 900) * GB,
        network=random.uniform(0.5, 100) * GB,
        nvlink_latency=random.uniform(0, 1e-5),
        network_latency=random.uniform(0, 1e-4),
    )
    return Question(load_of(run), GPUS[random.choice(("A100", "H100", "H200", "B200"))], fabric)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    random = Random(SEED)
    return [drawn(random) for _ in range(DRAWS)]


def test_a_better_site_never_slows_any_layout(questions: list[Question]) -> None:
    """More bandwidth and less latency of either link, more memory bandwidth, and more arithmetic."""
    for asked in questions:
        before, fabric, gpu = step_time(asked).seconds, asked.fabric, asked.gpu
        for better in (
            replace(asked, fabric=replace(fabric, nvlink=1.7 * fabric.nvlink)),
            replace(asked, fabric=replace(fabric, network=1.7 * fabric.network)),
            replace(asked, fabric=replace(fabric, network_latency=0.0, nvlink_latency=0.0)),
            replace(asked, gpu=replace(gpu, memory=1.7 * gpu.memory)),
            replace(asked, gpu=replace(gpu, bf16=1.7 * gpu.bf16)),
        ):
            assert step_time(better).seconds <= before * (1 + 1e-12), asked.load.degrees


def without_bubble(step: StepTime) -> float:
    return step.seconds - step.bubble


def test_twice_the_data_ranks_never_cost_time_beyond_the_bubble(questions: list[Question]) -> None:
    """Of the same sequences, where they can still be divided, on links that a copy of them more does not fill."""
    compared = 0
    for asked in questions:
        load = replace_fabric(asked).load
        if load.micro_batches % (2 * load.degrees.pipeline):
            continue
        twice = load.changed(
            degrees=load.degrees.model_copy(update={"shard": 2 * load.degrees.shard}),
            micro_batches=load.micro_batches // 2,
        )
        before, after = (step_time(replace(replace_fabric(asked), load=each)) for each in (load, twice))
        assert without_bubble(after) <= 1.02 * without_bubble(before), load.degrees
        compared += 1
    assert compared > DRAWS / 2


def replace_fabric(asked: Question) -> Question:
    return replace(asked, fabric=PLAIN)


def test_bytes_are_conserved_in_any_grouping() -> None:
    """Seconds times bandwidth are bytes: a reduction over shards, a sum over copies of a shard and a gather move what
    one sum over all ranks moves; and all-to-all moves as much as a gather of the same bytes.
    """
    flat = replace(PLAIN, network=PLAIN.nvlink, per_node=2**20)
    for shard, copies in ((2, 2), (8, 4), (64, 16), (1, 8), (8, 1)):
        inner, outer, whole = (
            RankGroup(shard, shard),
            RankGroup(copies, copies),
            RankGroup(shard * copies, shard * copies),
        )
        moved = 2 * gather_seconds(GB, inner, flat) + all_reduce_seconds(GB / shard, outer, flat)
        assert moved == pytest.approx(all_reduce_seconds(GB, whole, flat))
        assert all_to_all_seconds(GB, whole, flat) == pytest.approx(gather_seconds(GB, whole, flat))
        assert gather_seconds(GB, whole, flat) * flat.nvlink == pytest.approx(GB * (1 - 1 / whole.ranks))


def test_terms_add_up_to_the_parts(questions: list[Question]) -> None:
    """What the plan's tables list is what its parts are sums of, where no rank of a pipeline differs from another."""
    seen = 0
    for asked in questions:
        load = asked.load
        if load.degrees.pipeline > 1 or load.recompute.mode != "none":
            continue
        step, found = step_time(asked), terms(asked)
        products = load.micro_batches * sum(each.seconds for each in found.products)
        assert products == pytest.approx(step.products + step.experts)
        for name in ("tensor", "context", "travel"):
            waited = sum(each.times * each.seconds * each.exposed for each in found.collectives if each.what == name)
            assert waited == pytest.approx(getattr(step, name))
        seen += 1
    assert seen > 5


def test_bytes_of_a_step_by_hand() -> None:
    """Llama 3 8B on 8 ranks, one micro-batch: each gathers all 8.03 B weights twice in bf16, and reduces as many
    gradients once in fp32.
    """
    task = {"seq_len": 8192, "micro_batch": 1, "global_batch": 8}
    run = make_run(task, model="llama3_8b", parallel=layout(shard=8), **COMPILED)
    found = terms(Question(load_of(run), GPUS["H200"], PLAIN)).collectives
    assert [(each.what, each.algorithm, each.times, each.ranks, each.nodes) for each in found] == [
        ("weights", "gather", 2.0, 8, 1),
        ("gradients of weights", "reduce-scatter", 1.0, 8, 1),
    ]
    parameters = run.model.counts(8192).parameters
    assert [each.size for each in found] == [2 * parameters, 4 * parameters]
    for each in found:
        assert each.seconds == pytest.approx(each.size * 7 / 8 / PLAIN.nvlink)


def test_every_term_is_in_the_table() -> None:
    assert STEP_PARTS.keys() == StepTime(*[0.0] * 18).parts.keys()
    task = {"seq_len": 4096, "micro_batch": 1, "global_batch": 128}
    experts = make_run(
        task, site(), model="deepseek_v3_16b", parallel=layout(shard=16, expert=8, pipeline=2), **COMPILED
    )
    found = plan(experts)
    tables = {str(table.title): table for table in render(found).renderables if hasattr(table, "title")}
    products = tables["matrix products of blocks, on one rank, of a micro-batch"]
    told = "\n".join(str(cell) for cell in products.columns[0].cells)
    for name in ("attention.wkv_a", "attention.wq", "attention.wo", "feed_forward.w1", "moe.experts"):
        assert name in told
    assert "4,096 x 2,048 x 3,072" in told, "rows, inner dimension and columns of wq"
    told = "\n".join(str(cell) for cell in tables["collectives of one rank, of a step"].columns[0].cells)
    for word in (
        "all-to-all of travel",
        "send of stages",
        "gather of weights",
        "reduce-scatter of gradients of experts",
    ):
        assert word in told
    assert "8 ranks on 1 node" in told


def test_terms_come_back_from_json() -> None:
    run = make_run({"seq_len": 4096, "micro_batch": 1, "global_batch": 8}, site(), model="llama3_8b", parallel="fsdp8",
                   **COMPILED)  # fmt: skip
    time = plan(run).time
    assert time is not None
    assert isinstance(time.terms, Terms)
    assert type(time).from_dict(time.to_dict()) == time


def test_every_schedule_by_hand() -> None:
    """Two ranks, two micro-batches or four; forward, gradients of inputs and of weights take 1 s each in whole stages,
    half in halves of them. What is written beside each is the order of the rank that ends last.
    """
    whole, half = [StagePass(1.0, 1.0, 1.0)] * 2, [StagePass(0.5, 0.5, 0.5)] * 4

    def seconds(name: Any, micro_batches: int) -> float:
        passes = half if name not in ("GPipe", "1F1B") else whole
        return simulate(orders(name, 2, len(passes), micro_batches), passes, 0.0).seconds

    assert seconds("GPipe", 2) == seconds("1F1B", 2) == (2 + 1) * 3
    assert seconds("LoopedBFS", 2) == 2 * 3 + 1.5
    assert seconds("Interleaved1F1B", 2) == 2 * 3 + 1.5
    for name in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"):
        assert 4 * 3 <= seconds(name, 4) <= 4 * 3 + 1.5
