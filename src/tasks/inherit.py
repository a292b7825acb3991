"""What a command takes over from an earlier run: its folder, a checkpoint of it, and sections of its config."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from src.checkpoint.config import FOREIGN
from src.checkpoint.folder import complete, is_complete, step_folder, step_of
from src.config.stages import stage_at
from src.config.tree import Tree, read
from src.config.wording import nearest
from src.errors import CheckpointError, ConfigError, some

KEPT = "src.data.tokenizer.Kept"
IDLE = ("optim", "parametrization", "schedule", "recompute")


def sections(folder: Path, step: int) -> Tree:
    """The config of a run folder, as it was in the stage that took this step, with its tokenizer and precision for
    other tasks.

    The tokenizer is the stored one, since a trained one cannot be made again from other data; precision without float8,
    which is for training.
    """
    tree = stage_at(read(folder / "config.yaml"), step)
    if (kept := kept_tokenizer(folder, tree)) is not None:
        tree["tokenizer"] = kept
    tree["precision"] = tree["precision"] | {"float8": None}
    return tree


def kept_tokenizer(folder: Path, tree: Tree) -> Tree | None:
    """The section of a run's tokenizer as its cache has it; the folder may have moved with its root. None: bytes."""
    from src.data.corpus import RECIPE, read_recipe

    name = read_recipe(folder)["tokenizer"] if (folder / RECIPE).is_file() else None
    if name is None:
        return None
    places = [root / "cache" / "tokenizers" / name for root in (Path(tree["root"]).absolute(), folder.parent)]
    return next(({"_target_": KEPT, "path": str(place)} for place in places if place.is_dir()), None)


def check_typed(typed: Mapping[str, str]) -> None:
    """ConfigError for typed keys of sections that only training uses."""
    idle = [f"{key}={text}" for key, text in typed.items() if key.partition(".")[0] in IDLE]
    if idle:
        raise ConfigError([f"{each}: says how to train, and this task trains nothing; leave it out" for each in idle])


def meant(folder: Path, tree: Tree) -> str:
    """For an error: weights of another layout, or runs beside it or in the root with a name like this one's."""
    if (folder / "config.json").is_file():
        return f"; it is in Hugging Face layout: pass run={FOREIGN}{folder}"
    places = (place for place in (folder.parent, Path(tree["root"]).absolute()) if place.is_dir())
    runs = {run.name: run for place in places for run in place.iterdir() if complete(run / "checkpoints")}
    begun = [name for name in runs if name.startswith(folder.name)]  # such as a name without its hash
    near = begun or [name for name in (nearest(folder.name, runs),) if name]
    if near:
        return f"; did you mean {some(str(runs[name]) for name in near)}?"
    return f"; there are: {some(map(str, runs.values()))}" if runs else ""


def find(folder: Path, step: object, keys: tuple[str, str] = ("task.run", "task.step")) -> Path:
    """Folder of the checkpoint of a step, or of the newest one, in a run folder. CheckpointError when there is none.

    `keys`: of the command line, that name the run and the step.
    """
    there = complete(folder / "checkpoints")
    if not there:
        raise CheckpointError(f"{keys[0]}={folder}: has no complete checkpoint")
    if step is None:
        return there[-1]
    if not isinstance(step, int) or not is_complete(wanted := step_folder(folder / "checkpoints", step)):
        steps = ", ".join(str(step_of(path)) for path in there)
        raise CheckpointError(f"{keys[1]}={step}: {folder} has no complete checkpoint of that step; it has {steps}")
    return wanted


def overlaid(section: str, earlier: Any, tree: Tree, typed: Mapping[str, str]) -> Any:
    """The earlier run's section, with the single keys of it that were typed."""
    merged = {section: deepcopy(earlier)}
    for key in typed:
        if key.startswith(f"{section}."):
            take(key, tree, merged)
    return merged[section]


def take(key: str, source: Tree, target: Tree) -> None:
    """Set a dotted key of `target` to what `source` has there; what lies on the way and is no dict becomes one."""
    *path, last = key.split(".")
    for part in path:
        if not isinstance(target.get(part), dict):
            target[part] = {}
        source, target = source[part], target[part]
    target[last] = deepcopy(source[last])
