"""The section as conf/ gives it, with some keys changed."""

from pathlib import Path
from typing import Any

import yaml

from src.checkpoint.config import Checkpoint
from src.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "checkpoint"


def values(name: str = "every_500") -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    parents = read.pop("defaults", ["_self_"])[:-1]
    merged: dict[str, Any] = {}
    for parent in parents:
        merged.update(values(parent))
    return merged | read


def options(name: str = "every_500", **changes: Any) -> Checkpoint:
    found = values(name) | changes
    assert found.pop("_target_") == "src.checkpoint.config.Checkpoint"
    return Checkpoint(**found)


def problems(action: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    """The problems of the UserError that a call must raise."""
    try:
        action(*args, **kwargs)
    except UserError as error:
        return error.problems
    raise AssertionError("no error was raised")
