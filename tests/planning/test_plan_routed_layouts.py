"""What a plan says of layouts in which tokens travel to their experts."""

from typing import Any

import pytest

from src.errors import PlanError
from src.planning.plan import plan
from src.run import Run
from tests.train.runs import changed, make_run, section


def run_of(model: str = "deepseek_v3_debug", moe: dict[str, Any] | None = None, **degrees: Any) -> Run:
    """A DeepSeek with a changed mixture in a layout."""
    config = section("model", model)
    precision = degrees.pop("precision", "fp32")
    config = changed(config, moe=changed(config.moe, **(moe or {})))  # type: ignore[attr-defined]
    layout = changed(section("parallel", "single"), **degrees)
    return make_run({"global_batch": 8, "micro_batch": 1}, model=config, precision=precision, parallel=layout)


REFUSALS: dict[str, tuple[Run, str]] = {
    "experts on too many ranks": (
        run_of(shard=16, expert=16),
        "parallel.expert=16 does not divide model.moe.num_experts=8 (1, 2, 4 or 8 do)",
    ),
    "no such ranks": (
        run_of(shard=2, expert=4),
        "parallel.expert=4 * parallel.expert_tensor=1 does not divide the 2 ranks of shard * context * tensor; "
        "parallel.expert=2 does",
    ),
    "experts cut by some tensor ranks": (
        run_of(tensor=4, shard=2, expert_tensor=2),
        "parallel.expert_tensor=2 is neither 1 nor parallel.tensor=4; pass one of the two",
    ),
    "experts cut too thin": (
        run_of(moe={"hidden_dim": 24, "num_shared_experts": 4}, tensor=2, expert_tensor=2),
        "parallel.expert_tensor=2 cuts model.moe.hidden_dim=24 into parts that are no multiples of 8 (1 or 3 do)",
    ),
    "nobody can be dealt an expert": (
        run_of(moe={"num_experts": 6, "hidden_dim": 248}, shard=64, expert=2),
        "parallel.shard * context * tensor / (expert * expert_tensor) is 32: FSDP cannot deal 3 experts out to as many "
        "ranks, nor cut 248 x 256 features so often; pass another parallel.expert, or more ranks as parallel.replicate",
    ),
    "heads": (
        run_of(tensor=32),
        "parallel.tensor=32 does not divide model.n_heads=16 (1, 2, 4, 8 or 16 do)",
    ),
    "one scale for a matrix in parts": (
        run_of(tensor=2, precision="fp8"),
        "precision.float8.recipe=tensorwise scales a whole matrix, of which parallel.tensor=2 ranks of a model with "
        "routed experts hold parts without asking each other; pass precision=fp8_rowwise or parallel.tensor=1",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case: str) -> None:
    run, said = REFUSALS[case]
    with pytest.raises(PlanError) as caught:
        plan(run)
    assert any(line.startswith(said) for line in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("degrees", "axes"),
    [
        ({"shard": 4}, {}),
        ({"shard": 4, "expert": 2}, {"expert_shard": 2, "expert": 2}),
        ({"shard": 4, "tensor": 2, "expert": 4}, {"expert_shard": 2, "expert": 4}),
        ({"shard": 4, "tensor": 2, "expert": 4, "expert_tensor": 2}, {"expert": 4, "expert_tensor": 2}),
        ({"replicate": 2, "shard": 2, "context": 2, "expert": 4}, {"replicate": 2, "expert": 4}),
        ({"tensor": 2, "expert_tensor": 2}, {}),
        ({"tensor": 2}, {"expert_shard": 2}),
    ],
)
def test_where_experts_lie(degrees: dict[str, int], axes: dict[str, int]) -> None:
    assert plan(run_of(**degrees)).expert_axes == axes


def test_experts_are_counted_where_they_lie() -> None:
    """16B's 64 experts of 3 * 2048 * 1408 numbers in 26 layers, spread over 4 of 8 ranks; all else cut in 8."""
    whole, spread = (plan(run_of("deepseek_v3_16b", precision="bf16", shard=8, expert=degree)) for degree in (1, 4))
    assert whole.parameters_per_gpu == spread.parameters_per_gpu
    experts = 26 * 64 * 3 * 2048 * 1408
    assert 0 < spread.parameters_per_gpu - experts // 8 < (spread.parameters - experts) // 8 + 4096
    # Of each layer's 64 experts one rank gathers 16.
    assert spread.memory.gathered < whole.memory.gathered / 2
