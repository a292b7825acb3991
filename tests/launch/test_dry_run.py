"""What a dry run prints and where, in this process; it starts nothing and writes nothing."""

import json
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

import launch

WIDTH = 80  # columns of a terminal that is none


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.delenv("RANK", raising=False)


def answered(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["launch.py", *words])
    return launch.main()


def test_tables_are_the_last_on_the_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert answered(monkeypatch, "dry_run=true", "optim.lr=1e-4", "cluster.gpus=0") == 0
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert told.out == ""
    assert lines[-1] == "nothing was started; as JSON: dry_run=json; as a batch script: dry_run=script"
    assert [line for line in lines if len(line) > WIDTH] == []
    titles = [line for line in lines if line.strip() in ("values that are no defaults", "plan")]
    assert [each.strip() for each in titles] == ["values that are no defaults", "plan"]
    assert list(tmp_path.iterdir()) == []


def test_json_and_scripts_are_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert answered(monkeypatch, "dry_run=json", "optim.lr=1e-4", "cluster.gpus=0") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["origins"]["optim.lr"] == "command line"
    assert "plan" not in told.err
    words = ("cluster=slurm", "parallel=fsdp2", "recipe=debug")
    assert answered(monkeypatch, "dry_run=script", *words) == 0
    assert "#SBATCH --ntasks" in capsys.readouterr().out
    assert answered(monkeypatch, "dry_run=script", "cluster.gpus=0") == 0
    assert capsys.readouterr() == ("", "dry_run=script: this cluster starts ranks itself, without a script\n")


def test_points_of_a_sweep_are_rows_of_one_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        answered(monkeypatch, "-m", "dry_run=true", "optim.lr=1e-4,2e-4", "model.n_layers=1,2", "cluster.gpus=0") == 0
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 20
    assert len([line for line in lines if "optim.lr=2" in line or "optim.lr=0.0002" in line]) == 2


def test_what_nobody_wants_is_told_unless_it_was_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    large = (
        "dry_run=true",
        "model=llama3_1b",
        "recipe=debug",
        "tokenizer=bpe",
        "model.vocab_size=8192",
        "cluster.gpus=1",
    )
    unwanted = ("precision=fp32", "compile=off", "task.seq_len=256")
    assert answered(monkeypatch, *large) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1].strip(",") for line in warned] == ["data=stdlib", *unwanted]
    assert answered(monkeypatch, *large, *unwanted, "data=synthetic") == 0
    assert "warning: " not in capsys.readouterr().err
    assert answered(monkeypatch, "dry_run=true", "cluster.gpus=1") == 0
    assert "warning: " not in capsys.readouterr().err, "a small model is a trial"


def test_files_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert answered(monkeypatch, "dry_run=true", "data=text", "data.files=my/*.text", "cluster.gpus=0") == 2
    assert capsys.readouterr().err.startswith("data.files=my/*.text: matches no file (looked from ")
