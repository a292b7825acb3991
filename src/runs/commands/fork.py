"""`fork`: the command of a new run that starts from a checkpoint of another, with other values of any keys."""

import os
import shlex
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from src.config.composition.command_line import typed
from src.config.composition.overrides import overrides
from src.config.composition.requests import ConfigPoint, asked
from src.config.tree import Tree, leaves_of, read
from src.errors import ConfigError, FolderError
from src.runs.commands.listing import print_json
from src.runs.frozen_code import REPOSITORY
from src.tasks.inherit import find
from src.tasks.source import completed

OWN = ("root", "folder", "dry_run", "sweep", "experiment")  # keys that a fork does not take over
ROUNDS = 3  # of composing: a key that is added may bring others


def fork(folder: Path, step: int | None, words: Sequence[str], *, run: bool, as_json: bool) -> int:
    """Print the command, or become it. ConfigError, CheckpointError."""
    if strangers := [each for each in words if "=" not in each]:
        raise ConfigError([f"{each}: write key=value" for each in strangers])
    path = find(folder, step)
    command = ["launch.py", *arguments(read(folder / "config.yaml"), path, words)]
    if run:
        os.chdir(REPOSITORY)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *command])
    print_json({"command": ["python", *command]}) if as_json else print(shlex.join(["python", *command]))
    return 0


def starting_from(path: Path) -> dict[str, str]:
    """What makes a run start from a step folder: weights, moments and the place in the data."""
    return {"checkpoint.initial": str(path.absolute())}


def arguments(tree: Tree, path: Path, words: Sequence[str]) -> list[str]:
    """The command line of the fork: composed and compared with the run's config, so that it asks for what it says.

    FolderError where no command line does.
    """
    given = overrides(tree, site=True) | {"name": str(tree["name"])} | starting_from(path)
    own = {word.partition("=")[0] for word in words}
    for _ in range(ROUNDS):
        missed = _missed(tree, _composed([*_pairs(given, own), *words]), own)
        if not missed:
            return [*_pairs(given, own), *words]
        given |= missed
    raise FolderError(f"{path}: no command line of today's conf/ asks for its config: {', '.join(missed)}")


def _pairs(given: dict[str, str], own: set[str]) -> list[str]:
    """Without what is typed anew: a group with its keys."""
    kept = {key: text for key, text in given.items() if key not in own and key.partition(".")[0] not in own}
    return [f"{key}={text}" for key, text in kept.items()]


def _composed(argv: Sequence[str]) -> ConfigPoint:
    os.environ["HYDRA_FULL_ERROR"] = "1"
    points = asked(argv, completed).points
    if len(points) != 1:
        raise ConfigError("several values are several runs: fork with one, then pass -m to the command")
    return points[0]


def _missed(tree: Tree, point: ConfigPoint, own: set[str]) -> dict[str, str]:
    """Keys in which the composed config is not the run's, beside those that a person has typed."""
    wanted, found = (leaves_of(_compared(each, own)) for each in (tree, point.tree))
    away = {key: value for key, value in wanted.items() if key not in found or found[key] != value}
    return {key: typed(key, value) for key, value in away.items()}


def _compared(tree: Tree, own: set[str]) -> Tree:
    found = {key: deepcopy(value) for key, value in tree.items() if key not in (*OWN, *own)}
    for key in [*own, *starting_from(Path("x"))]:
        section, *path = key.split(".")
        here = found.get(section)
        for part in path[:-1]:
            here = here.get(part) if isinstance(here, dict) else None
        if path and isinstance(here, dict):
            here.pop(path[-1], None)
    return found
