"""A run folder that somebody else has made: nothing of it is run, through whichever door it comes in."""

import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from src.checkpoint.folder import measure
from src.config.composition.requests import asked
from src.errors import UserError
from src.launch.start import Shared, checked, prepare
from src.metrics.history import read as read_metrics
from src.runs.folder import attempts
from src.tasks.source import completed
from tests.end_to_end.commands import command
from tests.end_to_end.lives import live, opened
from tests.ranks import RankPool

PORTABLE = {"OMP_NUM_THREADS": "1"}


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def made(text: tuple[str, ...], ranks: RankPool) -> Path:
    """A run of 4 steps with a checkpoint after 2 of them, as if it had been cut off there."""
    folder = opened(*text, "task.steps=4", "checkpoint.every=2", "name=theirs")
    assert ranks(1, live, folder) == [True]
    shutil.rmtree(folder / "checkpoints/step_00000004")
    (folder / "attempts.jsonl").write_text((folder / "attempts.jsonl").read_text().splitlines()[0] + "\n")
    return folder


def vouched(step: Path) -> None:
    """COMPLETE.json made anew, as whoever changes files of a checkpoint would."""
    marker = json.loads((step / "COMPLETE.json").read_text())
    marker["files"] = {name: asdict(measure(step / name)) for name in marker["files"]}
    (step / "COMPLETE.json").write_text(json.dumps(marker))


def poisoned(folder: Path, mark: Path) -> None:
    """Pickles wherever one could be read."""
    bomb, step = pickle.dumps(Bomb(mark)), folder / "checkpoints/step_00000002"
    (step / ".metadata").write_bytes(bomb)
    for shard in step.glob("*.distcp"):
        shard.write_bytes(bomb)
    vouched(step)
    for rank in range(2):
        (folder / "traces").mkdir(exist_ok=True)
        (folder / f"traces/rank_{rank}").write_bytes(bomb)
        (step / f".rank{rank}.metadata").write_bytes(bomb)


def added(folder: Path, mark: Path) -> list[str]:
    """Code beside the frozen code, which Python would run by its name or its place."""
    (frozen,) = (folder / "code").iterdir()
    line = f"import os; os.system('touch {mark}')\n"
    names = ["sitecustomize.py", "usercustomize.py", "yaml.py", "evil.pth", "src/evil.py", "yaml/__init__.py"]
    for name in names:
        (frozen / name).parent.mkdir(exist_ok=True)
        (frozen / name).write_text(line)
    (frozen / "torch").symlink_to(frozen / "yaml")
    return [*names[:4], "torch (a link)"]


@pytest.mark.parametrize("door", ["copied", "folder", "initial", "generate", "export"])
def test_nothing_is_run(door: str, made: Path, text: tuple[str, ...], tmp_path: Path) -> None:
    mark, root = tmp_path / "mark", tmp_path / "runs"
    folder = Path(shutil.copytree(made, (root if door == "copied" else tmp_path) / made.name, symlinks=True))
    same = [*text[:-1], "task.steps=4", "checkpoint.every=2", "name=theirs", f"root={root}"]
    argv = {
        "copied": same,
        "folder": [*same, f"folder={folder}"],
        "initial": [*same, "name=mine", f"checkpoint.initial={folder}"],
        "generate": ["task=generate", f"run={folder}", "prompt=a", f"root={root}", "cluster.gpus=0"],
        "export": ["task=export", f"run={folder}", f"root={root}", "cluster.gpus=0"],
    }[door]
    if door in ("copied", "folder"):
        names = added(folder, mark)
        code, told = command(*argv, **PORTABLE)
        assert code == 2, told
        assert all(name in told for name in names[:3]), told
        assert "no part of the code that was frozen here" in told
        shutil.rmtree(folder / "code")
    poisoned(folder, mark)
    code, told = command(*argv, **PORTABLE)
    assert code == 2, told
    assert "names posix.system, which no checkpoint of this project does; nothing of it was run" in told
    assert not mark.exists()


def knock(folder: Path, same: list[str]) -> list[str]:
    """What the launcher and those who look say at each door of a run folder: a UserError's words, or nothing."""
    said = []
    for argv in (
        ["task=generate", f"run={folder}", "prompt=a", *same[-1:], "cluster.gpus=0", "dry_run=true"],
        [*same, "name=mine", f"checkpoint.initial={folder}"],
        [*same, f"folder={folder}"],  # last: it makes data.json and the like anew
    ):
        try:
            for tree, run, plan in checked(asked(argv, completed).trees):
                if not run.dry_run:
                    prepare(tree, run, plan, Shared())[0].close()
            said.append("")
        except UserError as error:
            said.append("\n".join(error.problems))
    attempts(folder)
    read_metrics(folder)
    return said


FILES = ("config.yaml", "plan.json", "data.json", "git.json", "attempts.jsonl", "metrics.jsonl", "version", "lock")
STEP = "checkpoints/step_00000002"


@pytest.mark.parametrize("name", [*FILES, f"{STEP}/values.json", f"{STEP}/COMPLETE.json"])
def test_what_looks_like_text_is_read_as_text(
    name: str, made: Path, text: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickle in the place of each JSON or YAML file, and YAML that names a function: no door runs either."""
    mark = tmp_path / "mark"
    same = [*text[:-1], "task.steps=4", "checkpoint.every=2", "name=theirs", f"root={tmp_path / 'runs'}"]
    monkeypatch.setattr("sys.argv", ["launch.py"])
    call = f"!!python/object/apply:os.system ['touch {mark}']\n".encode()
    for number, content in enumerate([pickle.dumps(Bomb(mark)), *([call] if name == "config.yaml" else [])]):
        folder = Path(shutil.copytree(made, tmp_path / f"{number}", ignore=shutil.ignore_patterns("code")))
        (folder / name).write_bytes(content)
        if not name.endswith("COMPLETE.json"):
            vouched(folder / STEP)
        generate, initial, own = knock(folder, same)
        assert not mark.exists()
        assert ("unreadable" in own) == (name == "config.yaml"), own
        assert bool(initial) == name.startswith(STEP), initial
        assert bool(generate) == (name in ("config.yaml", "data.json")) or name.startswith(STEP), generate


def test_a_run_of_our_own_that_moved_goes_on(made: Path, text: tuple[str, ...], tmp_path: Path) -> None:
    """To another place, with its checkpoints on another disk: no flag is asked for."""
    folder = Path(shutil.copytree(made, tmp_path / "moved"))
    (folder / "checkpoints").rename(tmp_path / "disk")
    (folder / "checkpoints").symlink_to(tmp_path / "disk")
    same = [*text[:-1], "task.steps=4", "checkpoint.every=2", "name=theirs", f"root={tmp_path / 'runs'}"]
    code, told = command(*same, f"folder={folder}", **PORTABLE)
    assert code == 0, told
    assert "goes on after step 2" in told
    assert not list((folder / "code").rglob("__pycache__")), "bytecode beside frozen code would be run unread"
