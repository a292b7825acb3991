"""A run folder that somebody else has made: nothing of it is run, through whichever door it comes in."""

import json
import os
import pickle
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from src.checkpoint.folder import measure
from src.checkpoint.metadata import read as read_metadata
from src.config.composition import requests
from src.config.composition.composer import composer
from src.errors import UserError
from src.launch.start import Shared, checked, prepare
from src.metrics.history import read as read_metrics
from src.runs.folder import attempts
from src.runs.frozen_code import Code
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


STEP = "checkpoints/step_00000002"
TEXTS = frozenset({"config.yaml", "plan.json", "data.json", "git.json", "git.diff", "version", "attempts.jsonl"})
LINES = frozenset({"metrics.jsonl", "lock", "logs/attempt_1/config.yaml", "loss.png"})
OF_STEP = frozenset(f"{STEP}/{name}" for name in ("values.json", "COMPLETE.json", ".metadata", "__0_0.distcp"))


def knock(folder: Path, same: list[str]) -> dict[str, str]:
    """What the launcher and those who look say at each door of a run folder: a UserError's words, or nothing."""
    elsewhere = [*same, f"root={folder.parent.parent / 'runs'}"]
    doors = {
        "run": ["task=generate", f"run={folder}", "prompt=a", elsewhere[-1], "cluster.gpus=0", "dry_run=true"],
        "initial": [*elsewhere, "name=mine", f"checkpoint.initial={folder}"],
        # These two make data.json and the like anew.
        "folder": [*elsewhere, f"folder={folder}"],
        "copied": [*same, f"root={folder.parent}"],
    }
    said = {}
    for door, argv in doors.items():
        try:
            for tree, run, plan in checked(requests.asked(argv, completed).trees):
                if not run.dry_run:
                    prepare(tree, run, plan, Shared())[0].close()
            said[door] = ""
        except UserError as error:
            said[door] = "\n".join(error.problems)
    attempts(folder)
    read_metrics(folder)
    return said


def test_a_pickle_in_the_place_of_any_file_is_not_run(
    made: Path, text: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of a run folder but its code, one after the other, and a config that names a function."""
    mark = tmp_path / "mark"
    same = [*text[:-1], "task.steps=4", "checkpoint.every=2", "name=theirs"]
    monkeypatch.setattr("sys.argv", ["launch.py"])
    with composer() as one:  # these 70 commands share their groups, and the code of this work tree
        monkeypatch.setattr(requests, "composer", lambda: nullcontext(one))
    monkeypatch.setattr(Code, "read", cache(Code.read))
    files = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    files = {name for name in files if not name.startswith(("code/", "traces/"))}
    assert files >= TEXTS | LINES | OF_STEP
    bomb, call = pickle.dumps(Bomb(mark)), f"!!python/object/apply:os.system ['touch {mark}']\n".encode()
    for number, (name, content) in enumerate([*((name, bomb) for name in sorted(files)), ("config.yaml", call)]):
        place = tmp_path / str(number) / made.name
        folder = Path(shutil.copytree(made, place, ignore=shutil.ignore_patterns("code")))
        (folder / name).write_bytes(content)
        if not name.endswith("COMPLETE.json"):
            vouched(folder / STEP)
        said = knock(folder, same)
        assert not mark.exists(), name
        for door in ("folder", "copied"):
            assert ("unreadable" in said[door]) == (name == "config.yaml"), (name, said[door])
        # A shard is read by ranks alone: below.
        assert bool(said["initial"]) == (name in OF_STEP and not name.endswith(".distcp")), (name, said["initial"])
        if name not in OF_STEP:
            assert bool(said["run"]) == (name in ("config.yaml", "data.json")), (name, said["run"])
        if name.endswith(".metadata"):
            assert "names posix.system, which no checkpoint of this project does" in said["initial"]


def test_a_pickle_in_the_place_of_a_tensor_is_not_run(made: Path, ranks: RankPool, tmp_path: Path) -> None:
    """The metadata are as they were: the ranks read each tensor where they say, and find another thing there."""
    mark, folder = tmp_path / "mark", Path(shutil.copytree(made, tmp_path / made.name))
    bomb = pickle.dumps(Bomb(mark))
    for place in read_metadata(folder / STEP / ".metadata").storage_data.values():
        with (folder / STEP / place.relative_path).open("r+b") as file:
            file.seek(place.offset)
            file.write(bomb.ljust(place.length, b"\0"))
    vouched(folder / STEP)
    own = opened("task=generate", f"run={folder}", "prompt=a", f"root={tmp_path / 'runs'}", "cluster.gpus=0")
    (said,) = ranks(1, live, own)
    assert isinstance(said, tuple), said
    words = "cannot be read by rank 0: a tensor's place holds something else; nothing of it was run"
    assert said == (f"{folder / STEP}: {words}",)
    assert not mark.exists()


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
