"""The options of conf/ as plain data, without Hydra: which one a section of a config is, and in what it differs."""

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from typing import Any

import yaml

from src.config.groups import CONF, RECIPE, options
from src.config.tree import Tree, leaves_of
from src.errors import ConfigError

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def defaults() -> Mapping[str, str]:
    """The option of each group that a command gets which names none."""
    chosen = _file("config")["defaults"]
    return {group: str(option) for each in chosen if isinstance(each, dict) for group, option in each.items()}


def nearest_option(group: str, section: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The option of conf/<group> that differs from a section in the fewest keys, and those keys with the section's
    values; another class is farther away than any key. Of several the default, then the first by name.
    """
    ours = leaves_of(section)
    kin = [option for option in _options(group) if _leaves(group, option).get("_target_") == ours.get("_target_")]
    found = []
    for option in kin or _options(group):
        theirs = _leaves(group, option)
        away = {key: value for key, value in ours.items() if key not in theirs or theirs[key] != value}
        absent = len(theirs.keys() - ours.keys())
        found.append((len(away) + absent, option != defaults().get(group), option, away))
    _, _, option, away = min(found, key=lambda each: each[:3])
    return option, away


@cache
def _options(group: str) -> list[str]:
    return options(group)


@cache
def _leaves(group: str, option: str) -> dict[str, Any]:
    return leaves_of(section_of(group, option))


def options_with(key: str) -> list[str]:
    """Options that have a key `group.name`, one of each class, as `data=text`; none where the key is not of a group."""
    group, _, name = key.partition(".")
    found: dict[str, str] = {}
    for option in sorted(_options(group), key=len) if group in defaults() else ():
        section = section_of(group, option)
        if name in section:
            found.setdefault(str(section.get("_target_")), f"{group}={option}")
    return list(found.values())


def section_of(group: str, option: str) -> Tree:
    """An option of a group: what its file and those of its group that it builds on say. ConfigError."""
    if option not in options(group) and "/" not in option:
        raise ConfigError(f"{group}={option}: no such option; there are: {', '.join(options(group))}")
    file = _file(f"{group}/{option}")
    recipe = recipe_of(group, option) or defaults()[RECIPE]
    merged: Tree = _file(f"{RECIPE}/{recipe}").get(group, {}) if group == "task" else {}
    for each in file.pop("defaults", ["_self_"]):
        if isinstance(each, dict):  # chooses an option of another group
            continue
        name, _, package = str(each).partition("@")
        part = file if name == "_self_" else section_of(group, name)
        for key in reversed(package.split(".") if package not in ("", "_here_") else []):
            part = {key: part}
        merged = _merged(merged, part)
    return merged


def with_target(group: str) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """The options of a group that name a class, and those that do not, which nothing can be made of."""
    every = {option: section_of(group, option) for option in options(group)}
    whole = {option: section for option, section in every.items() if "_target_" in section}
    return whole, {option: section for option, section in every.items() if option not in whole}


def recipe_of(group: str, option: str) -> str | None:
    """The recipe that an option chooses, or one that it builds on; None: whatever stands in config.yaml."""
    listed = _file(f"{group}/{option}").get("defaults", [])
    for each in (each for each in listed if isinstance(each, dict)):
        for key, chosen in each.items():
            if key.partition("@")[0] == f"override /{RECIPE}":
                return str(chosen)
    built_on = (str(each).partition("@")[0] for each in listed if isinstance(each, str) and each != "_self_")
    return next((found for each in built_on if (found := recipe_of(group, each)) is not None), None)


def _merged(below: Tree, above: Mapping[str, Any]) -> Tree:
    found = deepcopy(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else deepcopy(value)
    return found


def _file(name: str) -> Tree:
    found: Tree = yaml.load((CONF / f"{name}.yaml").read_text(encoding="utf-8"), _Loader) or {}
    return found
