"""The plan's memory beside every peak that GPUs have measured, of compiled blocks."""

import json
from pathlib import Path
from typing import Any

import pytest

from src.planning.memory import GIB, estimate
from src.planning.plan import load_of
from tests.train.runs import changed, make_run, section

RECORDS = Path(__file__).parents[2] / "benchmarks" / "records"
FOUR_GPUS = ("fsdp4", "tp2_fsdp2", "tp4", "cp2_fsdp2", "hsdp2x2", "pp2_fsdp2")
ONE, TWO = {"micro_batch": 1, "global_batch": 4}, {"micro_batch": 2, "global_batch": 4}
LEAN = {"optim": "adamw_bf16", "precision": "bf16_reduce16"}


def layout(preset: str, **changes: Any) -> Any:
    return changed(section("parallel", preset), **changes)


# Llama 3 8B, 8192 tokens. record: layout, batch, further presets
LLAMA: dict[str, tuple[Any, dict[str, int], dict[str, str]]] = {
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


# DeepSeek-V3 16B with 9 of its 27 layers, 4096 tokens, 4 sequences on each of 2 GPUs. record: layout, further presets
EXPERTS: dict[str, tuple[Any, dict[str, str]]] = {
    "fsdp2": ("fsdp2", {}),
    "fsdp2_gathered": (layout("fsdp2", reshard="never"), {}),
    "fsdp2_lean": (layout("fsdp2", reshard="never"), LEAN),
    "fsdp2_ep2_graphs": ("fsdp2_ep2", {}),
    "fsdp2_ep2_lean": (layout("fsdp2_ep2", reshard="never"), LEAN),
}


def compare(record: str, allocated: float, peak: float, **sections: Any) -> None:
    """How far the plan may be from the record, relatively: what tensors take, and what a GPU must have."""
    measured = json.loads((RECORDS / f"{record}.json").read_text())["peak_allocated_gib"]
    planned = estimate(load_of(make_run(**{"precision": "bf16", "compile": "blocks", **sections})))
    assert planned.allocated / GIB == pytest.approx(measured, rel=allocated)
    assert 0.99 * measured < planned.peak / GIB < (1 + peak) * measured, "not less, nor much more"


@pytest.mark.parametrize("record", LLAMA)
def test_planned_is_near_measured(record: str) -> None:
    parallel, batch, presets = LLAMA[record]
    task = {"seq_len": 8192, **batch}
    compare(f"llama3_8b_{record}", 0.05, 0.10, model="llama3_8b", task=task, parallel=parallel, **presets)


@pytest.mark.parametrize("record", EXPERTS)
def test_planned_is_near_measured_with_experts(record: str) -> None:
    parallel, presets = EXPERTS[record]
    model = changed(section("model", "deepseek_v3_16b"), n_layers=9)
    task = {"seq_len": 4096, "micro_batch": 4, "global_batch": 8}
    record = f"deepseek_v3_16b_9layers_2xh200_{record}"
    compare(record, 0.06, 0.11, model=model, task=task, parallel=parallel, **presets)


def test_planned_is_near_measured_on_all_layers_of_16b() -> None:
    task = {"seq_len": 4096, "micro_batch": 4, "global_batch": 16}
    compare("deepseek_v3_16b_4xh200_fsdp4", 0.05, 0.10, model="deepseek_v3_16b", task=task, parallel="fsdp4")
