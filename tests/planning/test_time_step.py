"""Collectives by hand, and what must hold for every step: more bandwidth never slows, more GPUs never cost time."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from src.planning.plan import Plan, load_of, plan
from src.planning.table import render
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
from src.planning.time.devices import GPUS
from src.planning.time.site import NO_FACTS, SiteFacts, recognised
from src.planning.time.step import Question, StepTime, step_time, terms
from tests.train.runs import Gpus, changed, make_run, section

GB = 1e9
PLAIN = Fabric(nvlink=200 * GB, network=50 * GB, nvlink_latency=0.0, network_latency=0.0)
EIGHT = {"seq_len": 8192, "micro_batch": 1, "global_batch": 256}


class OneSite(SiteFacts):
    """A cluster of nodes of eight."""

    gpu_memory_gib: float | None
    gpus_per_node: int
    grace_seconds: float

    def devices(self) -> Gpus:
        return Gpus()


def site(**facts: Any) -> OneSite:
    known = {"gpu_memory_gib": None, "gpus_per_node": 8, "grace_seconds": 60.0, "gpu_model": "H200"}
    return OneSite(**NO_FACTS | known | facts)


def seconds(fabric: Fabric = PLAIN, task: dict[str, Any] | None = None, gpu: str = "H200", **sections: Any) -> StepTime:
    presets = {"model": "llama3_8b", "precision": "bf16", "compile": "blocks"}
    run = make_run(EIGHT | (task or {}), **presets | sections)
    return step_time(Question(load_of(run), GPUS[gpu], fabric))


def layout(**degrees: Any) -> Any:
    return changed(section("parallel", "single"), **degrees)


def test_collectives_by_hand() -> None:
    """16 GB. Inside of a node NVLink passes 7/8 of it; two whole nodes enter through eight cards, 16 nodes with a rank
    each through one.
    """
    node, two, far = (RankGroup.along(*each, per_node=8) for each in ((8, 1), (16, 1), (16, 8)))
    assert (node.nodes, two.nodes, far.nodes, far.local) == (1, 2, 16, 1)
    size = 16 * GB
    assert gather_seconds(size, node, PLAIN) == pytest.approx(14 / 200)
    assert gather_seconds(size, two, PLAIN) == pytest.approx(max(15 / 200, 15 / (8 * 50)))
    assert gather_seconds(size, far, PLAIN) == pytest.approx(15 / 50)
    assert all_reduce_seconds(size, far, PLAIN) == pytest.approx(30 / 50)
    assert all_to_all_seconds(size, node, PLAIN) == pytest.approx(14 / 200)
    assert all_to_all_seconds(size, two, PLAIN) == pytest.approx(max(7 / 200, 8 / 50))
    assert sent_once_seconds(GB, node, PLAIN, Reached(4.5, 1.0)) == pytest.approx(4.5 * 7 / 8 / 200)
    assert sent_once_seconds(GB, two, PLAIN, Reached(4.5, 1.5)) == pytest.approx(max(4.5 * 7 / 8 / 200, 1.5 / 2 / 50))
    assert sent_once_seconds(GB, two, PLAIN, Reached(1.0, 1.0)) < all_to_all_seconds(6 * GB, two, PLAIN)
    assert send_seconds(GB, PLAIN, same_node=True) == pytest.approx(1 / 200)
    assert send_seconds(GB, PLAIN, same_node=False) == pytest.approx(1 / 50)
    alone = RankGroup(1, 1)
    assert gather_seconds(size, alone, PLAIN) == all_reduce_seconds(size, alone, PLAIN) == 0.0
    slow = replace(PLAIN, nvlink_latency=1e-3, network_latency=1e-2)
    assert gather_seconds(0.0, node, slow) == pytest.approx(7e-3)
    assert gather_seconds(0.0, two, slow) == pytest.approx(2e-2 + 14e-3)
    assert all_reduce_seconds(0.0, far, slow) == pytest.approx(2 * 4 * 1e-2)  # a tree of 16 nodes


def test_an_all_reduce_is_a_reduction_and_a_gather() -> None:
    """Bytes are conserved: two rounds of a ring in the time of one all-reduce, for any group."""
    for degree, stride in ((2, 1), (8, 1), (64, 8), (256, 1)):
        group = RankGroup.along(degree, stride, 8)
        both = 2 * gather_seconds(GB, group, PLAIN)
        assert all_reduce_seconds(GB, group, PLAIN) == pytest.approx(both)


LAYOUTS = [
    layout(shard=64),
    layout(replicate=8, shard=8),
    layout(shard=8, tensor=8),
    layout(shard=16, context=4),
    layout(shard=8, pipeline=8),
    layout(shard=8, pipeline=4, tensor=2, pipeline_schedule="Interleaved1F1B"),
]


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_more_bandwidth_never_slows(parallel: Any) -> None:
    for change in ({"nvlink": 400 * GB}, {"network": 100 * GB}, {"network_latency": 0.0, "nvlink_latency": 0.0}):
        base = replace(PLAIN, network_latency=1e-5, nvlink_latency=1e-6)
        assert seconds(replace(base, **change), parallel=parallel).seconds <= seconds(base, parallel=parallel).seconds
    fast, slow = (seconds(parallel=parallel, gpu=gpu).seconds for gpu in ("H200", "H100"))
    assert fast <= slow < seconds(parallel=parallel, gpu="A100").seconds
    assert seconds(parallel=parallel, gpu="B200").seconds < fast


def test_more_gpus_never_cost_time() -> None:
    """The same 256 sequences on twice the ranks, data parallel, beyond a fiftieth for links and stragglers."""
    times = [seconds(parallel=layout(shard=shard)).seconds for shard in (8, 16, 32, 64, 128, 256)]
    assert all(after < 1.02 * before for before, after in pairwise(times))
    assert times[-1] > times[0] / 32, "nor do they do more than their share"


def test_parts_of_a_step() -> None:
    dense = seconds(parallel=layout(shard=64))
    assert dense.seconds == pytest.approx(sum(dense.parts.values()))
    assert (dense.experts, dense.bubble, dense.tensor, dense.context, dense.travel) == (0.0,) * 5
    assert seconds(parallel=layout(shard=8, tensor=8)).tensor > 0
    assert seconds(parallel=layout(shard=16, context=4)).context > 0
    assert seconds(parallel=layout(shard=8, pipeline=8)).bubble > 0
    again = seconds(parallel=layout(shard=64), recompute="full")
    assert again.recompute == pytest.approx((again.products + again.attention) / 3, rel=0.25)
    assert seconds(parallel=layout(shard=64), compile="off").memory > 2 * dense.memory
    alone = seconds(task={"global_batch": 1}, parallel="single")
    assert (alone.copies, alone.exposed, alone.contention, alone.stragglers) == (0.0,) * 4
    experts = seconds(task={"seq_len": 4096}, model="deepseek_v3_16b", parallel=layout(shard=8, expert=8))
    assert experts.experts > 0
    assert experts.travel > 0


def test_rows_travel_to_experts_beside_the_shared_ones() -> None:
    """By hand, of 16B: the way there hides behind two shared experts of 1,408, the way back behind nothing. A slow
    network hides no more than that, and without shared experts nothing is hidden.
    """
    gpu, rows, width, dim = GPUS["H200"], 4096, 2 * 1408, 2048
    forward = 2 * gpu.product_seconds(rows, width, dim) + gpu.product_seconds(rows, dim, width)
    backward = sum(
        times * (gpu.product_seconds(rows, inner, columns) + gpu.product_seconds(columns, inner, rows))
        for times, columns, inner in ((2, width, dim), (1, dim, width))
    )
    for network, per_node in ((50 * GB, 8), (50 * GB, 1), (5 * GB, 1)):
        fabric = replace(PLAIN, network=network, per_node=per_node)
        task = {"seq_len": rows, "micro_batch": 1, "global_batch": 8}
        run = make_run(task, model="deepseek_v3_16b", parallel=layout(shard=8, expert=8), precision="bf16",
                       compile="blocks")  # fmt: skip
        there, back = [each for each in terms(Question(load_of(run), gpu, fabric)).collectives if each.what == "travel"]
        assert (there.exposed < 1.0, back.exposed) == (True, 1.0)
        assert there.seconds == pytest.approx(rows * 6 * dim * 2 * 7 / 8 / (network if per_node == 1 else 200 * GB))
        hidden = (min(there.seconds, forward) + min(there.seconds, backward)) / 2
        assert there.exposed == pytest.approx(1.0 - hidden / there.seconds)
    qwen = make_run(task, model="qwen3_30b_a3b", parallel=layout(shard=8, expert=8), precision="bf16", compile="blocks")
    (both,) = [each for each in terms(Question(load_of(qwen), gpu, PLAIN)).collectives if each.what == "travel"]
    assert both.exposed == 1.0


def test_gradients_of_experts_are_added_up_among_their_own_ranks() -> None:
    """At the end of a pipeline nothing hides them: two copies of each expert, a node apart, are joined by one card, not
    by the eight through which 16 ranks of other weights enter a node.
    """
    sections = {"model": "deepseek_v3_16b", "parallel": layout(shard=16, expert=8, pipeline=2)}
    task = {"seq_len": 4096, "micro_batch": 1, "global_batch": 128}
    slow, fast = (seconds(replace(PLAIN, network=speed), task, **sections) for speed in (25 * GB, 50 * GB))
    routed = 13 * 64 * 3 * 2048 * 1408 / 8  # weights of a rank, of half of the 26 layers
    assert slow.exposed - fast.exposed == pytest.approx(routed * 4 / 2 * (1 / 25 - 1 / 50) / GB, rel=0.02)


def test_the_plan_says_it() -> None:
    run = make_run(EIGHT, site(price_per_gpu_hour=2.0), model="llama3_8b", parallel="tp8_fsdp8", precision="bf16",
                   compile="blocks")  # fmt: skip
    found = plan(run)
    time = found.time
    assert time is not None
    assert (time.gpu, time.measured, time.within) == ("H200", True, 0.25)
    assert time.tokens_per_second == pytest.approx(256 * 8192 / time.step.seconds / 64)
    assert time.hours == pytest.approx(1000 * time.step.seconds / 3600)
    assert (time.gpu_hours, time.money) == pytest.approx((64 * time.hours, 128 * time.hours))
    assert time.kilowatt_hours == pytest.approx(time.gpu_hours * 0.7)
    assert 0.1 < time.mfu < 0.7
    titles = [str(getattr(table, "title", "")) for table in render(found).renderables]
    assert "time on 64 x H200, predicted" in titles


def test_it_comes_back_from_a_folder(tmp_path: Any) -> None:
    known = site(mtbf_hours_per_gpu=1000.0)
    found = plan(make_run(EIGHT, known, model="llama3_8b", parallel="fsdp8", precision="bf16", compile="blocks"))
    (tmp_path / "plan.json").write_text(found.to_json())
    assert Plan.read(tmp_path) == found


def test_a_device_that_is_not_known_has_no_time() -> None:
    assert plan(make_run(EIGHT, site(gpu_model=None), parallel="fsdp8", model="llama3_8b")).time is None
    assert plan(make_run()).time is None
    assert recognised(Gpus(8, 139.8, (9, 0))) == "H200"
    assert recognised(Gpus(8, 79.2, (9, 0))) == "H100"
    assert recognised(Gpus(8, 79.2, (8, 0))) == "A100"
    assert recognised(Gpus(8, 44.0, (8, 9))) is None
    assert recognised(Gpus()) is None


@pytest.mark.parametrize(("parallel", "nodes"), [("fsdp16", None), ("tp8_fsdp8", 8)])
def test_more_gpus_than_a_machine_has_are_nodes(parallel: str, nodes: int | None) -> None:
    """Of `cluster.gpus=64` nobody has said how they are wired: no machine of these devices has more than 16."""

    class NoNodes(OneSite):
        gpus_per_node: None  # type: ignore[assignment]  # as cluster=local

    sections = {"model": "llama3_8b", "parallel": parallel, "precision": "bf16", "compile": "blocks"}
    found = plan(make_run(EIGHT, NoNodes(**dict(site()) | {"gpus_per_node": None}), **sections))
    assert [line for line in found.warnings if "are no one machine" in line] == (
        []
        if nodes is None
        else [
            "64 GPUs are no one machine: times are those of nodes of 8; cluster.gpus_per_node of a cluster of nodes "
            "says otherwise"
        ]
    )
    told = plan(make_run(EIGHT, site(), **sections)).time
    assert found.time is not None
    assert told is not None
    assert (found.time.step.seconds == told.step.seconds) == (nodes is not None)


def test_factors_of_a_site() -> None:
    run = make_run(EIGHT, site(), model="llama3_8b", parallel="fsdp8", precision="bf16", compile="blocks")
    slower = replace(run, cluster=site(time_factors={"products": 0.5}))
    before, after = plan(run).time, plan(slower).time
    assert before is not None
    assert after is not None
    assert after.step.products == pytest.approx(2 * before.step.products, rel=0.05)
    with pytest.raises(ValueError, match="'product' is no share of a device; there are products, "):
        site(time_factors={"product": 0.5})


def test_failures_and_what_to_do_about_them() -> None:
    """Of 64 GPUs with 6,400 hours each, one fails every 100 hours; ten times as many failures ask for more saves."""
    run = make_run(EIGHT, site(mtbf_hours_per_gpu=6400.0), model="llama3_8b", parallel="tp8_fsdp8", precision="bf16",
                   compile="blocks")  # fmt: skip
    rare, often = (plan(replace(run, cluster=site(mtbf_hours_per_gpu=hours))).time for hours in (6400.0, 640.0))
    assert rare is not None
    assert often is not None
    assert rare.failures is not None
    assert often.failures is not None
    assert rare.failures.hours_between == 100.0
    assert often.failures.checkpoint_every < rare.failures.checkpoint_every
    assert often.failures.goodput < rare.failures.goodput < 1.0
    wanted = (2 * rare.failures.save_seconds * 360_000.0) ** 0.5 / rare.step.seconds
    assert rare.failures.checkpoint_every == pytest.approx(wanted, rel=0.1)


def test_a_gpu_waits_for_python_by_the_kernel() -> None:
    """Presets on an H200 in passes of four sequences, which leave it idle: the first version of presets_h200.json. And
    rounding for float8 takes what it wins where matrices are narrow.
    """
    for model, length, batch, measured in (
        ("llama3_20m", 512, 64, 0.2622),
        ("llama3_60m", 1024, 64, 0.3024),
        ("llama3_125m", 2048, 256, 1.7604),
    ):
        task = {"seq_len": length, "micro_batch": 4, "global_batch": batch}
        found = seconds(task=task, model=model, parallel="single")
        assert found.seconds == pytest.approx(measured, rel=0.08)
        assert found.host > found.products
    wide, narrow = {"micro_batch": 2, "global_batch": 2}, {"seq_len": 512, "micro_batch": 64, "global_batch": 64}
    for model, task, share in (("llama3_8b", wide, 0.8), ("llama3_20m", narrow, 1.0)):
        plain, float8 = (seconds(task=task, model=model, parallel="single", precision=each) for each in ("bf16", "fp8"))
        assert (float8.products < share * plain.products) == (model == "llama3_8b")
