"""The lines with which a run begins."""

from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from src.config.composition.requests import asked
from src.data.prepare import prepare
from src.launch.opening import WIDTH, opening_lines
from src.launch.start import checked


@pytest.mark.parametrize("words", [(), ("model=deepseek_v3_debug", "parallel=fsdp2_ep2", "precision=bf16")])
def test_a_start_says_what_it_is_about_to_do(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    GlobalHydra.instance().clear()
    small = ("data=synthetic", "data.documents=50", "task.validate_samples=1", "cluster.gpus=0", f"root={tmp_path}")
    ((_, run, plan),) = checked(asked([*small, *words]).trees)
    corpus = prepare(run.data, run.tokenizer, run.cache, progress=False)
    lines = opening_lines(run, plan.with_data(run, corpus), corpus, tmp_path / "a-run", "python launch.py")
    said = {line[2:11].strip(): line[13:] for line in lines if line[2:3].strip()}
    assert [*said] == ["model", "ranks", "step", "run", "data", "tokenizer", "watch", "stop"]
    assert f"{plan.parameters:,} parameters" in said["model"]
    assert said["ranks"].startswith("2 x CPU: " if words else "1 x CPU: one rank; float32, eager")
    assert said["step"] == "4,096 tokens: 16 sequences of 256"
    assert said["run"].startswith("100 steps, 409,600 tokens: ")
    assert said["tokenizer"] == "bytes, 258 ids"
    assert said["watch"] == f"python -m src.runs watch {tmp_path / 'a-run'}"
    assert said["stop"] == "Ctrl-C saves; to go on: python launch.py"
    assert [line for line in lines if len(line) > WIDTH and str(tmp_path) not in line] == []
