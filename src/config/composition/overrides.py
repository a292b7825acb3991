"""A run's config as a short command line: options of groups, and the keys that differ from them."""

import shlex
from collections.abc import Mapping

from src.config.composition.command_line import typed
from src.config.groups import RECIPE, SECTIONS
from src.config.presets import defaults, nearest_option, recipe_of
from src.config.tree import SITE, Tree


def overrides(tree: Tree, *, site: bool = False) -> dict[str, str]:
    """Key -> value as they are typed, {"model": "llama3_8b", "optim.lr": "0.001"}. Read from the files of conf/: what
    Hydra makes of other groups beside is not seen. `site`: also where the run is and how it is watched.
    """
    found: dict[str, str] = {}
    for group in (each for each in SECTIONS if isinstance(tree.get(each), Mapping) and (site or each not in SITE)):
        option, away = nearest_option(group, tree[group])
        if option != defaults().get(group):
            found[group] = option
        found |= {f"{group}.{key}": typed(f"{group}.{key}", value) for key, value in away.items()}
    model, task = (found.get(group, defaults()[group]) for group in ("model", "task"))
    if recipe_of("model", model) is not None and recipe_of("task", task) is None:
        found[RECIPE] = defaults()[RECIPE]  # the keys above are all that differs from it
    return found | ({"seed": str(tree["seed"])} if tree.get("seed") else {})


def command(program: str, arguments: Mapping[str, str]) -> str:
    """A line for a shell."""
    return shlex.join([*program.split(), *(f"{key}={text}" for key, text in arguments.items())])
