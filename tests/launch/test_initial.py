"""What a run must not start from is told by the launcher, and a refused command leaves every byte as it was."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from src.checkpoint.folder import step_folder
from src.cluster.backend import JobState, SilentError
from src.config.build import build
from src.config.composition.requests import asked
from src.config.tree import write
from src.errors import FolderError, UserError
from src.launch.start import Shared, checked, examine, prepare, refuse_queued
from src.optim.schedule import Schedule
from src.run import Run
from src.runs.records import SUBMISSIONS_FILE
from src.storage.json_lines import Lines
from src.tasks.source import completed
from tests.end_to_end.lives import TINY, live, opened, write_text
from tests.ranks import RankPool
from tests.test_conf import composed


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
        prepare(tree, run, plan, Shared())[0].close()


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


WSD: dict[str, Any] = {"shape": "sqrt", "warmup_steps": 1, "min_factor": 0.0, "total_steps": None}


@pytest.mark.parametrize(
    ("decayed", "decays", "lr", "words"),
    [
        (
            0.5,
            0.2,
            3e-3,
            "lowered the learning rate to 0.000879 by step 4, and this one goes on with 0.003; step_00000002",
        ),
        (0.5, 0.0, 3e-3, "this one goes on with 0.003; step_00000002 beside it is from before the decay"),
        (0.5, 0.2, 1e-4, None),  # no higher than it was
        (0.0, 0.2, 3e-3, None),  # it had not decayed
        (None, 0.2, 3e-3, None),  # nobody knows
    ],
)
def test_a_decay_that_is_continued_past_its_end_is_told(
    decayed: float | None,
    decays: float,
    lr: float,
    words: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """4 steps were done, `decayed` is the share of them that did; 6 are asked for, of which `decays`."""
    for step in (2, 4):
        folder = step_folder(tmp_path / "checkpoints", step)
        folder.mkdir(parents=True)
        (folder / "COMPLETE.json").touch()
        (folder / "values.json").write_text(json.dumps({"step": step, "position": 0, "digest": "", "rng.seed": 0}))
    if decayed is not None:
        before = {"task": {"steps": 4}, "optim": {"lr": 3e-3}, "schedule": WSD | {"decay_ratio": decayed}}
        write(tmp_path / "config.yaml", before)
    tree = composed()
    run = Run.from_sections(build(tree))
    run = replace(
        run,
        task=run.task.model_copy(update={"steps": 6}),  # type: ignore[attr-defined]
        optim=run.optim.model_copy(update={"lr": lr}),
        schedule=Schedule.model_validate(WSD | {"decay_ratio": decays}),
        checkpoint=run.checkpoint.model_copy(update={"initial": str(tmp_path)}),
        root=tmp_path / "runs",
    )
    monkeypatch.setattr("src.launch.initial.check_initial", lambda *_: None)
    examine(tree, run)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == (words is not None)
    assert words is None or (words in told[0] and told[0].startswith(f"warning: checkpoint.initial={folder}: its run"))


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


KEPT = ("config.yaml", "plan.json", "data.json", "git.json", "git.diff", "version", "attempts.jsonl", "lock")


@pytest.mark.parametrize("name", [*KEPT, SUBMISSIONS_FILE, "logs", "code", "checkpoints"])
def test_what_lies_in_the_place_of_a_file_is_named(
    made: Path, text: tuple[str, ...], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder instead of a file, a file instead of a folder: said in a line, whoever meets it first."""
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    if (folder / name).is_dir():
        shutil.rmtree(folder / name)
        (folder / name).write_text("{}")
    else:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
    assert str(folder / name) in told(monkeypatch, *text, f"folder={folder}", "parallel=fsdp2")


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

    def cancel_command(self, folder: Path, job: str) -> str:
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
