"""Runs that older versions began go on under this one: see README.md beside."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from hydra.core.global_hydra import GlobalHydra

from src.config import upgrades
from src.config.base import Config
from src.config.composition.requests import asked
from src.config.tree import Tree, identity, read
from src.runs.folder import attempts, place
from src.version import VERSION
from tests.end_to_end.commands import command
from tests.end_to_end.lives import series
from tests.end_to_end.test_losses import PORTABLE

HERE = Path(__file__).parent
RUNS: dict[str, dict[str, Any]] = {
    f"{file.parent.name}/{name}": run
    for file in sorted(HERE.glob("*/runs.json"))
    for name, run in json.loads(file.read_text()).items()
}
LLAMA, DEEPSEEK = "f009f55/llama3-74a7757c", "f009f55/deepseek_v3-3a51a8a7"


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are composed as launch.py does it."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    GlobalHydra.instance().clear()


def kept(run: str, to: Path) -> Path:
    """A copy of a kept run folder."""
    return Path(shutil.copytree(HERE / run, to))


def composed(*argv: str) -> Tree:
    (tree,) = asked(argv).trees
    return tree


def goes_on(run: str, folder: Path, *argv: str) -> str:
    """What the command says; its losses are those of the run that nobody stopped."""
    stopped = max(series(folder))
    code, told = command(*argv, **PORTABLE)
    assert code == 0, told
    assert f"resumes {folder}" in told
    assert f"goes on after step {stopped}" in told
    assert list(series(folder)) == list(range(1, len(RUNS[run]["losses"]) + 1))
    # The same bits on the processor that wrote them; others round differently, by 1e-7 in the first steps.
    assert list(series(folder).values()) == pytest.approx(RUNS[run]["losses"], rel=1e-5, abs=0.0)
    first, second = attempts(folder)
    assert (first.version, second.version, second.ended) == (None, VERSION, "finished")
    return told


@pytest.mark.parametrize("run", [LLAMA, DEEPSEEK])
def test_the_same_command_goes_on(run: str, tmp_path: Path) -> None:
    folder = kept(run, tmp_path / Path(run).name)
    goes_on(run, folder, *RUNS[run]["command"], f"root={tmp_path}")
    assert (folder / "version").read_text() == f"{VERSION}\n"
    assert [each.name for each in tmp_path.iterdir() if each.name != "cache"] == [folder.name]


def test_a_folder_that_is_named_goes_on(tmp_path: Path) -> None:
    folder = kept(LLAMA, tmp_path / "moved")
    goes_on(LLAMA, folder, *RUNS[LLAMA]["command"], "name=other", f"root={tmp_path}", f"folder={folder}")


@pytest.mark.parametrize("run", RUNS)
def test_old_and_new_keys_find_the_run(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = kept(run, tmp_path / Path(run).name)
    old = RUNS[run]["command"]
    pairs = [argument.partition("=") for argument in old]
    new = [f"{upgrades.renamed(key)}={value}" for key, _, value in pairs]
    steered = [*new, "task.log_every=5", "checkpoint.keep=1", "checkpoint.trusted=true", "task.nonfinite=skip_step"]
    for argv in (old, new, steered):
        tree = composed(*argv, f"root={tmp_path}")
        assert place(tmp_path, tree["name"], identity(tree)) == folder
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"note: {key} is now called {upgrades.renamed(key)}" for key, *_ in pairs if key != upgrades.renamed(key)
    ]


@pytest.mark.parametrize("run", RUNS)
def test_a_recorded_config_has_the_classes_and_keys_of_this_version(run: str) -> None:
    assert identity(read(HERE / run / "config.yaml")) == identity(composed(*RUNS[run]["command"]))


CLASSES = [
    pytest.param(section, target, keys, id=f"{section}-{target.rpartition('.')[2]}")
    for file in sorted(HERE.glob("*/classes.json"))
    for section, targets in json.loads(file.read_text()).items()
    for target, keys in targets.items()
]


def strangers(cls: type[Config], values: Mapping[str, Any], path: str) -> Iterator[str]:
    """Keys that neither the class nor a class inside it has."""
    for key, value in values.items():
        if key not in cls.model_fields:
            yield f"{path}.{key}"
        elif isinstance(value, Mapping):
            kind = cls.model_fields[key].annotation
            for each in (kind, *get_args(kind)):
                if isinstance(each, type) and issubclass(each, Config):
                    yield from strangers(each, value, f"{path}.{key}")


@pytest.mark.parametrize(("section", "target", "keys"), CLASSES)
def test_every_class_and_key_of_an_older_version_has_one_today(section: str, target: str, keys: list[str]) -> None:
    """A class that moved needs a line in upgrades.MOVED, a renamed key one in upgrades.RENAMED."""
    values: dict[str, Any] = {"_target_": target}
    for key in keys:
        *parents, last = key.split(".")
        home = values
        for part in parents:
            home = home.setdefault(part, {})
        home[last] = None
    tree: dict[str, Any] = values
    for part in reversed(section.split(".")):
        tree = {part: tree}
    now = upgrades.upgraded(tree)
    for part in section.split("."):
        now = now[part]
    module, _, name = now.pop("_target_").rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    assert issubclass(cls, Config)
    assert list(strangers(cls, now, section)) == []
