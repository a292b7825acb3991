import re

import pytest

from src.distributed.parallel_dims import ParallelDims
from src.distributed.precision.config import BYTES, Precision
from tests.train.runs import CONF, changed, section

AXES = {"ddp": "replicate", "fsdp": "shard", "tp": "tensor", "cp": "context", "pp": "pipeline", "ep": "expert"}
LAYOUTS = sorted(file.stem for file in (CONF / "parallel").glob("*.yaml"))


def named(preset: str) -> dict[str, int]:
    """What a preset's name promises."""
    found: dict[str, int] = {}
    for part in preset.split("_"):
        if match := re.fullmatch(r"hsdp(\d+)x(\d+)", part):
            found |= {"replicate": int(match[1]), "shard": int(match[2])}
        elif match := re.fullmatch(r"([a-z]+)(\d+)", part):
            found[AXES[match[1]]] = int(match[2])
    return found


@pytest.mark.parametrize("preset", LAYOUTS)
def test_the_name_of_a_layout_says_the_truth(preset: str) -> None:
    degrees: ParallelDims = section("parallel", preset)
    told = degrees.axes | {"expert": degrees.expert}
    assert {axis: degree for axis, degree in told.items() if degree > 1} == named(preset)


def test_derived_sizes() -> None:
    sizes = {"replicate": 2, "shard": 3, "context": 5, "tensor": 7, "expert": 15, "pipeline": 11}
    degrees = changed(section("parallel", "single"), **sizes)
    assert degrees.world == 2 * 3 * 5 * 7 * 11  # experts live on ranks that are already counted
    assert degrees.data_ranks == 2 * 3
    assert degrees.fsdp == 3 * 5
    assert degrees.expert_shard == 3 * 5 * 7 // 15
    assert list(degrees.axes.items()) == [
        ("pipeline", 11),
        ("replicate", 2),
        ("shard", 3),
        ("context", 5),
        ("tensor", 7),
    ]


def test_a_layout_in_words() -> None:
    """Of all that a search decides nothing is left out; what is so by default is."""
    single: ParallelDims = section("parallel", "single")
    assert single.told(4, "none") == "micro_batch=4 recompute=none"
    sizes = {"shard": 8, "pipeline": 4, "expert": 2, "layers_per_stage": 2, "pipeline_schedule": "Interleaved1F1B"}
    degrees = changed(single, **sizes, reshard="never", sync_each_micro_batch=True)
    assert degrees.told(1, "full") == (
        "pipeline=4 shard=8 expert=2 Interleaved1F1B layers_per_stage=2 reshard=never sync_each_micro_batch "
        "micro_batch=1 recompute=full"
    )
    assert degrees.product == "pipeline=4 * shard=8"


@pytest.mark.parametrize(
    ("expert_tensor", "expert", "left"),
    [(1, 4, 2), (2, 4, 1)],  # of the 8 ranks of shard 4 and tensor 2
)
def test_experts_share_the_ranks_of_other_weights(expert_tensor: int, expert: int, left: int) -> None:
    degrees = changed(section("parallel", "single"), shard=4, tensor=2, expert=expert, expert_tensor=expert_tensor)
    assert degrees.expert_shard == left
    assert degrees.world == 8
    assert degrees.divides_tokens == (expert_tensor == 1)


@pytest.mark.parametrize(
    "changes", [{"tensor": 0}, {"shard": -1}, {"replicate": 2.0}, {"reshard": "sometimes"}, {"world": 2}]
)
def test_what_is_no_layout(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        ParallelDims(**(dict(section("parallel", "single")) | changes))


def test_precisions_are_dtypes_of_torch() -> None:
    import torch

    for name, size in BYTES.items():
        assert getattr(torch, name).itemsize == size
    with pytest.raises(ValueError, match="float16"):
        Precision(storage="float32", compute="float16", reduce="float32", float8=None)  # type: ignore[arg-type]
