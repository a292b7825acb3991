"""The plan's memory beside every peak that GPUs have measured: Llama 3 8B, 8192 tokens, compiled blocks."""

import json
from pathlib import Path
from typing import Any

import pytest

from src.train.estimate import GIB, estimate
from src.train.plan import load_of
from tests.train.runs import changed, make_run, section

RECORDS = Path(__file__).parents[2] / "benchmarks" / "records"
FOUR_GPUS = ("fsdp4", "tp2_fsdp2", "tp4", "cp2_fsdp2", "hsdp2x2", "pp2_fsdp2")
ONE, TWO = {"micro_batch": 1, "global_batch": 4}, {"micro_batch": 2, "global_batch": 4}


def layout(preset: str, **changes: Any) -> Any:
    return changed(section("parallel", preset), **changes)


# record: layout, batch, further presets
MEASURED: dict[str, tuple[Any, dict[str, int], dict[str, str]]] = {
    "2xh200_fsdp2": (layout("fsdp2", sync_each_micro_batch=True), ONE, {}),
    "2xh200_tp2": ("tp2", ONE, {}),
    "2xh200_cp2": ("cp2", ONE, {}),
    "2xh200_pp2": ("pp2", ONE, {}),
    "2xh200_pp2i": (layout("pp2", pipeline_schedule="Interleaved1F1B"), ONE, {}),
    "2xh200_sel": ("fsdp2", TWO, {"recompute": "selective"}),
    "fsdp4_bf16_mb1": ("fsdp4", ONE, {}),
    "fsdp4_bf16_mb2": (layout("fsdp4", reshard="never"), TWO | {"global_batch": 8}, {}),
    **{f"4xh200_{name}": (name, ONE, {}) for name in FOUR_GPUS},
    "4xh200_pp2_fsdp2i": (layout("pp2_fsdp2", pipeline_schedule="Interleaved1F1B"), ONE, {}),
    "2xh200_fsdp2_fp8_gather": ("fsdp2", {"micro_batch": 1, "global_batch": 2}, {"precision": "fp8_gather"}),
    "2xh200_fsdp2_fp8_gather_mb2_selective": ("fsdp2", TWO, {"precision": "fp8_gather", "recompute": "selective"}),
}


@pytest.mark.parametrize("record", MEASURED)
def test_planned_is_near_measured(record: str) -> None:
    parallel, batch, presets = MEASURED[record]
    measured = json.loads((RECORDS / f"llama3_8b_{record}.json").read_text())["peak_allocated_gib"]
    presets = {"model": "llama3_8b", "precision": "bf16", "compile": "blocks", **presets}
    planned = estimate(load_of(make_run({"seq_len": 8192, **batch}, parallel=parallel, **presets)))
    assert planned.allocated / GIB == pytest.approx(measured, rel=0.05)
    assert 0.99 * measured < planned.peak / GIB < 1.10 * measured, "what a GPU must have: not less, nor much more"
