"""Where values come from, as a dry run, --cfg and the launcher say it."""

import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from src.config.composition.composer import composer
from src.config.composition.origins import ValueOrigins, annotated
from src.config.composition.requests import ConfigPoint, asked


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    GlobalHydra.instance().clear()
    return tmp_path


def one(*argv: str) -> ConfigPoint:
    (point,) = asked(list(argv)).points
    return point


def test_each_value_has_the_one_that_decided_it() -> None:
    point = one("model=llama3_8b", "experiment=llama3_ft_8b", "optim.beta1=0.8", "precision=fp8", "seq_len=4096")
    expected = {
        "seed": "default",
        "optim.beta2": "recipe llama3_8b, optim=adamw",
        "optim.lr": "recipe llama3_8b",
        "schedule.shape": "recipe llama3_8b, schedule=llama3",
        "schedule.warmup_steps": "experiment llama3_ft_8b",
        "task.global_batch": "experiment llama3_ft_8b",
        "compile.blocks": "experiment llama3_ft_8b, compile=blocks",
        "optim.beta1": "command line",
        "task.seq_len": "command line",
        "precision.float8.recipe": "command line, precision=fp8",
        "model.dim": "command line, model=llama3_8b",
        "task.log_every": "default",
    }
    assert {key: str(point.origins.of(key)) for key in expected} == expected


def test_an_option_of_a_group_is_one_line_and_defaults_are_none() -> None:
    assert one().origins.listed(one().tree) == []
    point = one("model=qwen3_8b", "seed=3")
    listed = {key: (value, str(origin)) for key, value, origin in point.origins.listed(point.tree)}
    assert listed["model"] == ("qwen3_8b", "command line")
    assert listed["precision"] == ("bf16", "recipe qwen3_8b")
    assert listed["task.seq_len"] == (4096, "recipe qwen3_8b")
    assert listed["seed"] == (3, "command line")
    assert not any(key.startswith("model.") for key in listed)


def test_cfg_says_it_beside_the_value_and_stays_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    asked(["model=llama3_8b", "data.processes=2", "--cfg", "job"])
    text = capsys.readouterr().out
    assert "  lr: 0.0003 # recipe llama3_8b\n" in text
    assert "  processes: 2 # command line\n" in text
    assert "  compute: bfloat16 # recipe llama3_8b, precision=bf16\n" in text
    assert "seed: 0\n" in text
    assert yaml.safe_load(text)["task"]["seq_len"] == 8192
    asked(["model=llama3_8b", "--cfg", "job", "--package", "schedule"])
    assert "warmup_steps: 8000 # recipe llama3_8b\n" in capsys.readouterr().out


def test_values_of_several_lines_keep_their_text() -> None:
    text = "a:\n  b: one\n    two\n  c:\n  - x\n  - y\n"
    said = annotated(text, ValueOrigins(typed=["a"]))
    assert said == "a:\n  b: one\n    two\n  c: # command line\n  - x\n  - y\n"
    assert yaml.safe_load(said) == yaml.safe_load(text)


def test_files_are_read_for_it_once_and_only_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with composer() as hydras:
        asked_for: list[object] = []

        def asked(_: object, choices: object) -> dict[str, str]:
            asked_for.append(choices)
            return {}

        monkeypatch.setattr("src.config.composition.composer.file_origins", asked)
        first, second = (hydras.origins(["model=llama3_8b", f"++seed={seed}"]) for seed in (1, 2))
        assert asked_for == []
        assert [str(each.of("seed")) for each in (first, second)] == ["command line"] * 2
        assert [str(each.of("name")) for each in (first, second)] == ["default"] * 2
        assert asked_for == [("model=llama3_8b",)]
