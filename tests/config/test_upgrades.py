"""Names of older versions, and keys that a later version added."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from src.config import upgrades
from src.config.composition.command_line import arguments, former
from src.config.tree import STEERING, difference, identity, read, steers
from src.config.upgrades import renamed, upgraded

OLD: dict[str, Any] = {
    "task": {"_target_": "src.old.Task", "steps": 100, "log_every": 10},
    "model": {"_target_": "src.Model", "mix": {"n_experts": 8, "top_k": 2}, "parts": [{"_target_": "src.old.Part"}]},
    "seed": 0,
}
NEW: dict[str, Any] = {
    "task": {"_target_": "src.newest.Task", "steps": 100, "log_every": 10, "z_loss": 0.0},
    "model": {"_target_": "src.Model", "moe": {"num_experts": 8, "top_k": 2}, "parts": [{"_target_": "src.new.Part"}]},
    "seed": 0,
}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that moved twice, a subtree and a key in it that were renamed, a key that was added."""
    moved = {"src.old.Task": "src.new.Task", "src.new.Task": "src.newest.Task", "src.old.Part": "src.new.Part"}
    monkeypatch.setattr(upgrades, "MOVED", moved)
    monkeypatch.setattr(upgrades, "RENAMED", {"model.mix": "model.moe", "model.moe.n_experts": "model.moe.num_experts"})
    monkeypatch.setattr(upgrades, "ADDED", {"src.newest.Task": {"z_loss": 0.0}})


@pytest.mark.usefixtures("tables")
def test_a_recorded_config_is_read_with_the_names_of_today(tmp_path: Path) -> None:
    before = yaml.safe_dump(OLD)
    (tmp_path / "config.yaml").write_text(before)
    assert read(tmp_path / "config.yaml") == upgraded(OLD) == NEW
    assert upgraded(NEW) == NEW
    assert yaml.safe_dump(OLD) == before, "a copy"


@pytest.mark.usefixtures("tables")
def test_a_new_key_changes_no_identity_until_it_does_something(monkeypatch: pytest.MonkeyPatch) -> None:
    without = {**NEW, "task": {key: value for key, value in NEW["task"].items() if key != "z_loss"}}
    busy = {**NEW, "task": NEW["task"] | {"z_loss": 1e-4}}
    assert identity(NEW) == identity(without) == identity(upgraded(OLD)) != identity(busy)
    assert difference(without, NEW) == difference(upgraded(OLD), NEW) == []
    assert difference(upgraded(OLD), busy) == ["task.z_loss: absent -> 0.0001"]
    monkeypatch.setattr(upgrades, "ADDED", {})
    assert identity(NEW) != identity(without), "a key that nobody declared is a difference"


@pytest.mark.usefixtures("tables")
def test_commands_may_have_keys_of_older_versions() -> None:
    assert renamed("model.mix.n_experts") == renamed("model.moe.n_experts") == "model.moe.num_experts"
    assert renamed("model.mixture") == "model.mixture"
    given = ["-m", "model.mix.n_experts=4,8", "task.steps=2", "model.mix={top_k: 1}"]
    assert arguments(given) == ["-m", "++model.moe.num_experts=4,8", "++task.steps=2", "++model.moe={top_k: 1}"]
    assert former(given) == [
        "model.mix.n_experts is now called model.moe.num_experts",
        "model.mix is now called model.moe",
    ]


@pytest.mark.parametrize("path", STEERING)
def test_keys_that_only_steer_are_no_part_of_the_identity(path: str) -> None:
    section, key = path.split(".")
    one, other = ({section: {key: value, "more": 1}, "seed": 0} for value in (1, 2))
    assert identity(one) == identity(other) == identity({section: {"more": 1}, "seed": 0})
    assert difference(one, other) == []
    assert difference(one, other, steering=True) == [f"{path}: 1 -> 2"]
    assert steers(path)
    assert not steers(f"{path}s")
