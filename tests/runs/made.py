"""Run folders made of a few small files, with every number known, and no run behind them."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from src.checkpoint.folder import VALUES, Marker, measure, step_folder, write_marker
from src.config.composition.requests import asked
from src.config.tree import Tree
from src.storage.json_lines import Lines
from tests.sweeps.points import START, attempt, train

PLAN = {"axes": {"shard": 4, "tensor": 2}, "expert_axes": {}, "groups": 1, "world": 8, "steps": 200, "tokens": 1638400}
PLAN |= {"parameters": 8_030_261_248, "tokens_per_step": 8192}


@cache
def composed(*argv: str) -> Tree:
    """What launch.py makes of a command line; tests that ask for the same share one."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    return asked(argv).trees[0]


@cache
def config_text(*argv: str) -> str:
    return str(yaml.safe_dump(composed(*argv), sort_keys=False))


def made(root: Path, name: str, *argv: str, ended: str | None = "finished", loss: float = 3.0, said: str = "") -> Path:
    """A run of 200 steps that has ended, after 60 of them where it has not finished; "" never began."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_text(*argv))
    (folder / "plan.json").write_text(json.dumps(PLAN))
    if ended != "":
        last = train(folder, steps=200 if ended == "finished" else 60, loss=loss)
        attempt(folder, 1, START, ended, last + 2, said)
    return folder


def checkpoint(folder: Path, step: int, **facts: Any) -> Path:
    """A complete checkpoint without a tensor."""
    path = step_folder(folder / "checkpoints", step)
    path.mkdir(parents=True)
    (path / VALUES).write_text(json.dumps({"step": step, "tokens": step * 8192}))
    write_marker(path, Marker(step, "2.13.0", {"layout": {}} | facts, {VALUES: measure(path / VALUES)}))
    return path


def unfinished(folder: Path, **line: Any) -> None:
    """A line of metrics.jsonl more."""
    Lines(folder / "metrics.jsonl").append(line)
