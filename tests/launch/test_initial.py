"""What a run must not start from is told by the launcher, and a refused command leaves every byte as it was."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from src.cluster.backend import JobState, SilentError
from src.config.composition.requests import asked
from src.errors import FolderError, UserError
from src.launch.start import checked, prepare, refuse_queued
from src.runs.records import SUBMISSIONS_FILE
from src.storage.json_lines import Lines
from src.tasks.source import completed
from tests.end_to_end.lives import TINY, live, opened, write_text
from tests.ranks import RankPool


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("initial")
    return (*TINY, *write_text(folder), f"root={folder / 'runs'}", "task.steps=4", "checkpoint.every=2")


@pytest.fixture(scope="module")
def made(text: tuple[str, ...], ranks: RankPool) -> Path:
    folder = opened(*text, "name=first")
    assert ranks(1, live, folder) == [True]
    return folder


def started(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    """What launch.py does before it submits."""
    monkeypatch.setattr("sys.argv", ["launch.py"])
    GlobalHydra.instance().clear()
    for tree, run, plan in checked(asked(list(argv), completed).trees):
        prepare(tree, run, plan)[0].close()


def told(monkeypatch: pytest.MonkeyPatch, *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        started(monkeypatch, *argv)
    return "\n".join(caught.value.problems)


def damaged(path: Path, name: str) -> None:
    (path / name).write_bytes((path / name).read_bytes()[:-1])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("checkpoint.initial=/nowhere",), "checkpoint.initial=/nowhere: does not exist"),
        (
            ("task.steps=4",),
            "has done 4 steps, with its optimizer and its samples, and goes on from there: task.steps=4",
        ),
        (("seed=3",), "has drawn its samples by seed=0, not 3; pass seed=0"),
        (("model.dim=64",), "model.tok_embeddings.weight: expected float32 [258, 64], found float32 [258, 32]"),
        (("model.n_layers=3",), "missing in it: model.layers.2."),
        (("model.n_layers=1",), "in it that this run has no place for: model.layers.1."),
        (("optim=lion",), "in it that this run has no place for: optimizer."),
        (("task.seq_len=16",), "its first 16 samples are not those of this config"),
        (("data=synthetic",), "its first 16 samples are not those of this config"),
    ],
)
def test_what_ranks_would_refuse(
    made: Path, text: tuple[str, ...], argv: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(made.parent.iterdir())
    base = (*text, "name=second", "task.steps=6", f"checkpoint.initial={made}")
    if "data=synthetic" in argv:
        base = tuple(each for each in base if not each.startswith("data"))
    assert words in told(monkeypatch, *base, *argv)
    assert sorted(made.parent.iterdir()) == before, "no dead folder is left"
    if "samples" not in words or "seed" in words:
        assert words in told(monkeypatch, *base, *argv, "dry_run=true")


@pytest.mark.parametrize("name", ["COMPLETE.json", ".metadata", "values.json", "__0_0.distcp"])
def test_a_damaged_file(
    made: Path, text: tuple[str, ...], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = Path(shutil.copytree(made / "checkpoints/step_00000004", tmp_path / "step_00000004"))
    (step / name).write_bytes((step / name).read_bytes()[:-5])
    said = told(monkeypatch, *text, "name=third", "task.steps=6", f"checkpoint.initial={step}")
    assert f"{step / name}: " in said


def test_what_fits_starts(made: Path, text: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for layout in ("parallel=single", "parallel=pp2", "parallel=fsdp2"):
        started(monkeypatch, *text, f"name=fits-{layout[9:]}", "task.steps=6", f"checkpoint.initial={made}", layout)


def prints(folder: Path) -> dict[str, str]:
    return {
        str(each.relative_to(folder)): hashlib.sha256(each.read_bytes()).hexdigest()
        for each in folder.rglob("*")
        if each.is_file()
    }


def test_a_refused_command_changes_no_byte(
    made: Path, text: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Other data under the same config: only the tokens differ; and a job that waits, whose plan this was."""
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    recipe = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(recipe | {"fingerprint": "0"}))
    before = prints(folder)
    same = (*text, f"folder={folder}", "parallel=fsdp2")
    assert "data or tokenizer changed since this run began" in told(monkeypatch, *same)
    assert prints(folder) == before
    (folder / "data.json").write_text(json.dumps(recipe))
    Lines(folder / SUBMISSIONS_FILE).append({"job": "49", "submitted": 0.0, "log": "log", "packed": False})
    monkeypatch.setattr("src.cluster.slurm.scheduler.SlurmScheduler.states", Fake("queued").states)
    before = prints(folder)
    assert "job 49 is queued or running it; wait for it, or scancel 49" in told(monkeypatch, *same)
    assert prints(folder) == before


class Fake:
    """A scheduler that says one thing of every job."""

    def __init__(self, phase: Any, current: str | None = None) -> None:
        self.phase, self.current = phase, current

    def states(self, *_: Any) -> dict[str, JobState]:
        if self.phase == "silent":
            raise SilentError("no answer")
        return {"49": JobState(self.phase, self.phase.upper())}

    def current_job(self) -> str | None:
        return self.current

    def cancel_command(self, job: str) -> str:
        return f"cancel {job}"


@pytest.mark.parametrize(
    ("phase", "current", "refused"),
    [
        *(("queued", None, True), ("running", "7", True), ("running", "49", False)),
        *(("ended", None, False), ("unknown", None, False), ("silent", None, False)),
    ],
)
def test_a_queued_run_is_left_alone(tmp_path: Path, phase: str, current: str | None, refused: bool) -> None:
    Lines(tmp_path / SUBMISSIONS_FILE).append({"job": "49", "submitted": 0.0, "log": "log", "packed": False})
    scheduler: Any = Fake(phase, current)
    if not refused:
        refuse_queued(tmp_path, scheduler)
        return
    with pytest.raises(FolderError, match="job 49 is queued or running it; wait for it, or cancel 49"):
        refuse_queued(tmp_path, scheduler)
