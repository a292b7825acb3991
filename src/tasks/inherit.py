"""Sections that a task takes over from the run whose weights it reads."""

from collections.abc import Mapping
from pathlib import Path

from src.config.tree import Tree, read
from src.errors import ConfigError

KEPT = "src.data.tokenizer.Kept"
IDLE = ("optim", "schedule", "recompute")


def sections(folder: Path) -> Tree:
    """Tokenizer and precision of a run folder.

    The tokenizer is the stored one, since a trained one cannot be made again from other data; precision without float8,
    which is for training.
    """
    tree = read(folder / "config.yaml")
    if (kept := _tokenizer(folder, tree)) is not None:
        tree["tokenizer"] = {"_target_": KEPT, "path": str(kept)}
    tree["precision"] = tree["precision"] | {"float8": None}
    return tree


def _tokenizer(folder: Path, tree: Tree) -> Path | None:
    """Where the run's cache has the tokenizer; the folder may have moved together with its root. None: bytes."""
    from src.data.corpus import RECIPE, read_recipe

    name = read_recipe(folder)["tokenizer"] if (folder / RECIPE).is_file() else None
    if name is None:
        return None
    places = [root / "cache" / "tokenizers" / name for root in (Path(tree["root"]).absolute(), folder.parent)]
    return next((place for place in places if place.is_dir()), None)


def check_typed(typed: Mapping[str, str]) -> None:
    """ConfigError for typed keys of sections that only training uses."""
    idle = [f"{key}={text}" for key, text in typed.items() if key.partition(".")[0] in IDLE]
    if idle:
        raise ConfigError([f"{each}: says how to train, and this task trains nothing; leave it out" for each in idle])
