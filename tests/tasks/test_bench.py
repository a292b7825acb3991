"""What a benchmark notes beside its speed: where the time went, and how tokens were routed."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from src.metrics.kernels import breakdown
from src.planning.plan import plan
from src.tasks.bench.rank import _kernels, _predicted, _routing
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.planning.test_time_step import site
from tests.train.runs import make_run


def profiled(device: torch.device, activity: ProfilerActivity) -> tuple[list[Any], dict[str, Any]]:
    """Events of four products and a sum within a span that has a name, and what is made of them."""
    x = torch.randn(256, 256, device=device)
    with profile(activities=[activity]) as profiler, record_function("FSDP::all_gather"):
        for _ in range(4):
            y = x @ x
        y.sum()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = list(profiler.events() or [])
    return events, breakdown(_kernels(events, device), steps=2)


def test_operators_of_a_cpu_count_their_own_time() -> None:
    events, parts = profiled(torch.device("cpu"), ProfilerActivity.CPU)
    (product,) = [one for one in parts["top"] if one["name"] == "aten::mm"]
    assert (product["calls"], product["kind"]) == (2, "gemm")
    own = sum(event.self_cpu_time_total for event in events if event.name == "aten::mm")
    assert product["ms"] == pytest.approx(own / 1000 / 2)
    # The name of a span is no work, whatever it sounds like.
    assert "communication" not in parts["kinds_ms"]
    assert parts["step_ms"] == pytest.approx(sum(parts["kinds_ms"].values()))


@pytest.mark.gpu
def test_kernels_of_a_gpu_are_not_counted_twice() -> None:
    _, parts = profiled(torch.device("cuda"), ProfilerActivity.CUDA)
    assert {"gemm"} <= set(parts["kinds_ms"]) <= {"gemm", "fused and pointwise", "copy"}
    assert sum(one["calls"] for one in parts["top"] if one["kind"] == "gemm") >= 2
    assert sum(parts["kinds_ms"].values()) <= parts["step_ms"] * 1.001


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (tiny_llama(), None),
        (tiny_deepseek(), "natural"),
        (tiny_deepseek(moe={"force_load_balance": True}), "forced balance"),
    ],
)
def test_routing_belongs_to_every_figure(model: Any, said: str | None) -> None:
    assert _routing(make_run(model=model)) == said


def test_what_the_plan_says_stands_beside() -> None:
    planned = plan(make_run({"seq_len": 8192, "micro_batch": 1}, site(), model="llama3_8b", parallel="fsdp8"))
    assert planned.time is not None
    found = _predicted(planned)
    assert found["predicted_of"] == "H200"
    assert found["predicted_tokens_per_second"] == planned.time.tokens_per_second
    assert sum(found["predicted_parts"].values()) == pytest.approx(found["predicted_step_seconds"])
    assert _predicted(plan(make_run())) == {}
