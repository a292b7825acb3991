"""recompute=auto: the cheapest that fits, the same for launcher and ranks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src.distributed.parallel_dims import SPLITTING
from src.errors import PlanError
from src.planning.memory import GIB, estimate
from src.planning.plan import Plan, load_of, plan
from src.planning.recompute_choice import FULL, LADDER, NONE, SELECTIVE, cheapest, resolve_auto_recompute
from src.planning.table import render
from tests.distributed.layouts import degrees
from tests.train.runs import Gpus, Here, make_run

EIGHT = {"seq_len": 8192, "micro_batch": 2, "global_batch": 8}


def run(limit_gib: float | None = None, **choices: Any) -> Any:
    presets = {"model": "llama3_8b", "parallel": "fsdp4", "precision": "bf16", "compile": "blocks"}
    return make_run(EIGHT, Here(gpu_memory_gib=limit_gib), **(presets | {"recompute": "auto"} | choices))


def test_the_ladder_goes_down() -> None:
    """Each step keeps less than the one before, or is passed over: every second block keeps more than selective."""
    load = load_of(run())
    peaks = [estimate(load.changed(recompute=option)).peak for option in LADDER]
    assert peaks[0] > peaks[1] > peaks[2]
    assert min(peaks) == peaks[-1]
    for option, peak in zip(LADDER, peaks, strict=True):
        chosen = cheapest(load, peak)
        assert LADDER.index(chosen) <= LADDER.index(option)
        assert estimate(load.changed(recompute=chosen)).peak <= peak


def test_the_first_that_fits() -> None:
    load = load_of(run())
    peaks = {option: estimate(load.changed(recompute=option)).peak for option in LADDER}
    assert cheapest(load, peaks[NONE]) == NONE
    assert cheapest(load, peaks[NONE] - 1) == LADDER[1]
    assert cheapest(load, peaks[SELECTIVE]) == SELECTIVE
    assert cheapest(load, peaks[FULL] - 1) == FULL  # told in the refusal
    assert cheapest(load, None) == NONE


def test_the_plan_takes_it_and_says_so() -> None:
    roomy, tight = plan(run(), devices=Gpus(4, 139.8)), plan(run(79.6))
    assert (roomy.recompute, tight.recompute) == (NONE, SELECTIVE)
    assert tight.memory == plan(run(79.6, recompute="selective")).memory
    assert tight.memory.peak <= 79.6 * GIB < estimate(load_of(run())).peak
    assert plan(run()).recompute == NONE
    assert json.loads(tight.to_json())["recompute"] == {"mode": "selective", "every": None, "budget": None}
    table = render(tight).renderables[0]
    assert "selective" in list(table.columns[1].cells)


@pytest.mark.parametrize("schedule", SPLITTING)
def test_a_backward_in_halves_computes_nothing_again(schedule: str) -> None:
    """Neither on request, nor by choice, nor as advice; one that is whole does."""

    def asked(limit_gib: float | None, mode: str, schedule: str) -> Plan:
        layout = degrees("pp2_fsdp4", pipeline_schedule=schedule)
        chosen = run(limit_gib, parallel=layout, compile="off", recompute=mode)
        return plan(replace(chosen, task=replace(chosen.task, micro_batch=1, global_batch=32)))

    for mode in ("selective", "full", "every2"):
        with pytest.raises(PlanError) as caught:
            asked(None, mode, schedule)
        (problem,) = caught.value.problems
        assert problem.startswith(f"recompute.mode={mode.rstrip('2')} with parallel.pipeline_schedule={schedule} would")
        assert problem.endswith("pass recompute=none or parallel.pipeline_schedule=Interleaved1F1B")
    assert asked(None, "auto", schedule).recompute == NONE
    with pytest.raises(PlanError) as caught:
        asked(60.0, "auto", schedule)
    (problem,) = caught.value.problems
    assert problem.startswith("does not fit")
    assert "recompute=" not in problem
    assert asked(60.0, "auto", "Interleaved1F1B").recompute != NONE


def test_what_nothing_fits_is_refused_with_all_of_it_recomputed() -> None:
    with pytest.raises(PlanError) as caught:
        plan(run(30.0))
    (problem,) = caught.value.problems
    assert problem.startswith(f"does not fit: {estimate(load_of(run(recompute='full'))).peak / GIB:.1f} GiB a GPU")
    assert "recompute=" not in problem


def test_ranks_build_what_the_launcher_chose(tmp_path: Path) -> None:
    asked = run(79.6)
    (tmp_path / "plan.json").write_text(plan(asked).to_json())
    assert resolve_auto_recompute(asked, tmp_path).recompute == SELECTIVE
    chosen = run(recompute="full")
    assert resolve_auto_recompute(chosen, tmp_path) is chosen


def test_a_budget_needs_the_compiler() -> None:
    with pytest.raises(PlanError, match=r"recompute\.mode=budget is kept by the compiler; pass compile=blocks"):
        plan(run(recompute="budget", compile="off"))
    assert plan(run(recompute="budget")).recompute.budget == 0.5


def test_resting_in_the_host_frees_the_gpu() -> None:
    held = run(recompute="none")
    freed = replace(held, parallel=held.parallel.model_copy(update={"cpu_offload": True}))
    there, here = plan(freed).memory, plan(held).memory
    assert (there.parameters, there.optimizer, there.gradients) == (0, 0, 0)
    assert here.at_backward - there.at_backward == here.parameters + here.optimizer


def test_float8_of_the_launcher() -> None:
    """Its problems are the plan's, what it leaves out is a warning, and gathered blocks are a byte a number."""
    wide, narrow = plan(run(recompute="none")), plan(run(recompute="none", precision="fp8_gather"))
    block = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336 + 2)
    assert wide.memory.gathered - narrow.memory.gathered == 2 * block
    assert narrow.warnings == wide.warnings
    with pytest.raises(PlanError, match=r"precision\.float8\.all_gather=true gathers nothing"):
        plan(make_run(model="llama3_debug", precision="fp8_gather"))
    with pytest.raises(PlanError, match="the CPU has no float8 products"):
        plan(make_run(model="llama3_debug", precision="fp8"), devices=Gpus(None, None))
