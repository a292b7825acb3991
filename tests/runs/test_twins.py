"""Runs in the root that are the same under another hash, or nearly."""

import json
import os
from pathlib import Path
from typing import Any

from src.config.tree import identity, write
from src.runs.folder import may_change, place
from src.runs.twins import near

TREE: dict[str, Any] = {
    "task": {"_target_": "src.tasks.pretrain.config.Pretrain", "steps": 9, "log_every": 1},
    "parallel": {"tensor": 1},
    "seed": 0,
    "name": "a",
}


def begun(folder: Path, tree: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    write(folder / "config.yaml", tree)
    (folder / "attempts.jsonl").write_text(json.dumps({"number": 1}) + "\n")
    return folder


def test_a_run_of_an_older_version_is_found_by_what_it_is(tmp_path: Path) -> None:
    """Its name has the hash that the older version gave it."""
    older = TREE | {"task": TREE["task"] | {"_target_": "src.tasks.pretrain.Pretrain"}}
    folder = begun(tmp_path / "a-01234567", older)
    begun(tmp_path / "a-89abcdef", older | {"seed": 1})
    (tmp_path / "a-fedcba98").mkdir()
    (tmp_path / "a-fedcba98/config.yaml").write_text("a: [")
    assert place(tmp_path, "a", identity(TREE)) == folder
    assert place(tmp_path, "b", identity(TREE)) == tmp_path / f"b-{identity(TREE)}"
    named = begun(tmp_path / f"a-{identity(TREE)}", TREE)
    assert place(tmp_path, "a", identity(TREE)) == named


def test_of_several_the_newest_goes_on(tmp_path: Path) -> None:
    """An older version took cadences for a difference."""
    for number, every in enumerate((1, 2, 3)):
        config = (
            begun(tmp_path / f"a-0000000{number}", TREE | {"task": TREE["task"] | {"log_every": every}}) / "config.yaml"
        )
        os.utime(config, (1000 + number % 2, 1000 + number % 2))
    assert place(tmp_path, "a", identity(TREE)) == tmp_path / "a-00000001"


def test_a_near_twin_is_named(tmp_path: Path) -> None:
    assert near(tmp_path, TREE, may_change) is None
    begun(tmp_path / "other-01234567", TREE | {"seed": 1})
    assert near(tmp_path, TREE, may_change) is None, "another seed is another run"
    twin = begun(tmp_path / "b-01234567", TREE | {"parallel": {"tensor": 2}})
    assert near(tmp_path, TREE, may_change) == (
        f"{twin} differs only in parallel.tensor: 2 -> 1; folder={twin} goes on with it"
    )


def test_a_run_without_a_key_that_now_does_something_is_told(tmp_path: Path) -> None:
    twin = begun(tmp_path / "a-01234567", TREE)
    busy = TREE | {"task": TREE["task"] | {"z_loss": 0.1}}
    assert near(tmp_path, busy, may_change) == (
        f"{twin} was begun by another version and is another run: task.z_loss: absent -> 0.1"
    )
