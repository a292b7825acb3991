"""folder=<run> alone goes on with the run as it was; a key that decides numbers makes it a whole question again."""

from pathlib import Path
from typing import Any

import pytest

from src.config.composition.requests import asked
from src.config.tree import Tree, difference, write
from src.launch.as_it_was import completed
from src.tasks import source
from tests.runs.made import composed

RUN = ("model.n_layers=3", "optim.lr=2e-4", "schedule=cosine", "parallel=tp2", "cluster.grace_seconds=7")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "a-1"
    folder.mkdir(parents=True)
    write(folder / "config.yaml", composed(*RUN) | {"root": "elsewhere"})
    return folder


def meant(folder: Path, *argv: str) -> Tree:
    return asked([f"folder={folder}", *argv], completed).trees[0]


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        ([], set()),
        (["dry_run=true"], set()),
        (["parallel=fsdp2"], {"parallel.shard: 1 -> 2", "parallel.tensor: 2 -> 1"}),
        (["parallel.shard=2", "checkpoint.every=7"], {"parallel.shard: 1 -> 2", "checkpoint.every: 500 -> 7"}),
        (["task.log_every=3", "compile.blocks=true"], {"task.log_every: 10 -> 3", "compile.blocks: false -> true"}),
    ],
)
def test_what_may_change_is_laid_over_the_run(folder: Path, argv: list[str], changes: set[str]) -> None:
    tree = meant(folder, *argv)
    assert set(difference(composed(*RUN), tree, steering=True)) == changes
    assert tree["cluster"]["grace_seconds"] == 7
    assert (tree["folder"], tree["dry_run"]) == (str(folder), "dry_run=true" in argv)


def test_its_site_is_its_own_unless_typed(folder: Path, tmp_path: Path) -> None:
    assert meant(folder)["root"] == "elsewhere"
    (folder.parent / "cache").mkdir()
    assert meant(folder)["root"] == str(folder.parent)
    tree = meant(folder, f"root={tmp_path}", "cluster=slurm", "cluster.partition=p", "tracker=tensorboard")
    assert tree["root"] == str(tmp_path)
    assert tree["cluster"]["partition"] == "p"
    assert tree["tracker"]["tensorboard"] is not None


@pytest.mark.parametrize("argv", [["optim.lr=3e-4"], ["model=llama3_debug"], ["experiment=demo"], ["seed=0"]])
def test_a_key_that_decides_numbers_asks_for_all_of_them(folder: Path, argv: list[str]) -> None:
    expected: dict[str, Any] = asked([f"folder={folder}", *argv], source.completed).trees[0]
    assert meant(folder, *argv) == expected


def test_a_folder_that_is_none_yet_is_begun(tmp_path: Path) -> None:
    assert meant(tmp_path / "new")["optim"] == composed()["optim"]
