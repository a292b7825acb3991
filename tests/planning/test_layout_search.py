"""parallel=auto: what is found is legal, fits, and is what looking at everything would find."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src.config.build import build
from src.config.composition.requests import asked
from src.errors import PlanError
from src.launch.auto_layout import decided
from src.planning.auto_layout import decide
from src.planning.layout_search import Found, Space, best, fitting, legal
from src.planning.memory import GIB
from src.planning.plan import load_of, plan
from src.planning.time.collectives import Fabric
from src.planning.time.devices import GPUS
from src.planning.time.step import Question, step_time
from src.run import Run
from tests.planning.test_time_step import site
from tests.train.runs import make_run

FABRIC = Fabric(nvlink=209e9, network=42e9)
COMPILED = {"precision": "bf16", "compile": "blocks"}


def question(model: str, global_batch: int, seq_len: int = 8192) -> Question:
    task = {"seq_len": seq_len, "micro_batch": 1, "global_batch": global_batch}
    return Question(load_of(make_run(task, model=model, **COMPILED)), GPUS["H100"], FABRIC)


def space(gpus: int, global_batch: int, **given: Any) -> Space:
    return Space(gpus, **{"degrees": {}, "micro_batch": None, "recompute": None, "global_batch": global_batch} | given)


def test_the_best_are_those_of_looking_at_everything() -> None:
    asked_for, where, room = question("llama3_8b", 32), space(16, 32), int(80 * GIB)
    loads = [replace(asked_for, load=load) for load in legal(asked_for.load, where)]
    fits = [found for each in loads if (found := fitting(each, where, room)) is not None]
    exact = [Found(each.load, step_time(each), peak) for each, peak in fits]
    assert len(exact) > 20
    wanted = sorted(each.step.seconds for each in exact)[:5]
    assert [each.step.seconds for each in best(asked_for, where, room)] == pytest.approx(wanted, rel=0.02)


def test_what_is_given_stays() -> None:
    asked_for = question("llama3_8b", 32)
    for each in best(asked_for, space(16, 32, degrees={"tensor": 2, "pipeline": 2}, micro_batch=2), int(80 * GIB)):
        assert (each.load.degrees.tensor, each.load.degrees.pipeline, each.load.micro_batch) == (2, 2, 2)
        assert each.load.degrees.world == 16
        assert each.peak <= 80 * GIB
    assert best(asked_for, space(1, 32), int(80 * GIB)) == []


def test_short_sequences_go_together() -> None:
    """With four of 512 tokens a GPU waits for Python: 124,958 tokens/s of llama3_20m beside 1,599,030 on an H200."""
    (found, *_) = best(question("llama3_20m", 256, 512), space(8, 256), int(80 * GIB))
    assert found.load.micro_batch == 32
    sizes = {each.micro_batch for each in legal(question("llama3_20m", 256, 4096).load, space(8, 256))}
    assert sizes == {1, 2, 4}


def test_the_largest_model_on_the_largest_machine() -> None:
    """16,384 GPUs, 671 B parameters: less than 10 s of an idle core; CPU seconds of a busy one are more."""
    asked_for, before = question("deepseek_v3_671b", 15_360, 4096), time.process_time()
    found = best(asked_for, space(16_384, 15_360), int(80 * GIB))
    assert time.process_time() - before < 30.0
    assert len(found) == 5
    assert [each.step.seconds for each in found] == sorted(each.step.seconds for each in found)


def auto(*given: str) -> Run:
    (tree,) = asked(
        ["task=bench", "model=llama3_8b", "parallel=auto", "compile=blocks", "precision=bf16", *given]
    ).trees
    return Run.from_sections(build(tree))


def test_the_decision_is_a_plan_without_problems() -> None:
    batch = {"seq_len": 8192, "micro_batch": 1, "global_batch": 64}
    run = auto("parallel.gpus=32", "parallel.tensor=2", "task.seq_len=8192", "task.global_batch=64")
    run = replace(run, cluster=site(gpu_model="H100", gpu_memory_gib=80.0))
    made = decide(run, {"parallel.tensor": "2"}, None)
    assert made.degrees.tensor == 2
    chosen = made.chosen.load
    legal = make_run(batch | {"micro_batch": chosen.micro_batch}, run.cluster, model="llama3_8b", parallel=made.degrees,
                     recompute=chosen.recompute, **COMPILED)  # fmt: skip
    planned = plan(legal)
    assert planned.time is not None
    assert planned.time.step.seconds == pytest.approx(made.chosen.step.seconds)
    assert planned.memory.peak == made.chosen.peak
    with pytest.raises(PlanError, match="the number of GPUs is not known"):
        decide(replace(run, parallel=run.parallel.model_copy(update={"gpus": None})), {}, None)
    with pytest.raises(PlanError, match=r"the device is not known; pass cluster.gpu_model \(A100, B200, H100, H200\)"):
        decide(replace(run, cluster=site(gpu_model=None)), {}, None)


@pytest.mark.parametrize(
    ("gpu", "typed", "words"),
    [
        (
            "H100",
            {"parallel.gpus": "7"},
            r"no layout of 7 GPUs has .* pass parallel.gpus=4, or pass task.global_batch=21",
        ),
        (
            "H100",
            {"parallel.gpus": "8", "parallel.tensor": "3"},
            r"no layout of 8 GPUs with parallel.tensor=3 .* leave degrees open$",
        ),
        (
            "A100",
            {"parallel.gpus": "1"},
            r"no layout of 1 A100 with 79.2 GiB holds this model .* pass more parallel.gpus",
        ),
        (
            "A100",
            {"parallel.gpus": "8", "precision": "fp8"},
            r"holds this model .*\nprecision.float8: cluster.gpu_model=A100 has no float8",
        ),
    ],
)
def test_why_there_is_none(gpu: str, typed: dict[str, str], words: str) -> None:
    """Of a batch that no number of these GPUs divides, the numbers that would do; else the memory, or the device."""
    run = auto("task.global_batch=16", *(f"{key}={text}" for key, text in typed.items()))
    with pytest.raises(PlanError, match=words):
        decide(replace(run, cluster=site(gpu_model=gpu)), typed, None)


def test_the_config_gets_what_was_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = {"parallel": "auto", "parallel.gpus": "8", "parallel.write": "mine"}
    argv = ["task=bench", "model=llama3_8b", "compile=blocks", "precision=bf16", "cluster.gpus=8"]
    argv += ["cluster.gpu_model=H100", "cluster.gpu_memory_gib=80", *(f"{key}={text}" for key, text in typed.items())]
    (tree,) = asked(argv).trees
    (tmp_path / "parallel").mkdir()
    monkeypatch.setattr("src.launch.kept_layout.CONF", tmp_path)
    monkeypatch.setattr("src.cluster.local.config.Local.devices", lambda _: None)
    found = decided(tree, typed)
    run = Run.from_sections(build(found))
    assert run.parallel.world == 8
    assert "the first is taken" in capsys.readouterr().err
    kept = (tmp_path / "parallel" / "mine.yaml").read_text()
    assert kept.startswith("# Chosen by parallel=auto for 8 x H100: ")
    assert "defaults: [single, _self_]" in kept
    assert decided(found, typed) == found, "a layout is there"
