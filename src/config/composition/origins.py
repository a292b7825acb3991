"""Where each value of a config comes from: the defaults, a recipe, an experiment or the command line."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import Overrides
from hydra.types import RunMode
from omegaconf import OmegaConf

from src.config.groups import EXPERIMENT, RECIPE, SHORT
from src.config.tree import leaves_of

TYPED = "command line"
PLAIN_RECIPES = ("debug", "none")  # sizes of a debug model are the defaults


class ValueOrigin(NamedTuple):
    """Who decided a value, and the option of a group that has it, such as "precision=bf16"; none: the value itself."""

    source: str
    choice: str = ""

    def __str__(self) -> str:
        return f"{self.source}, {self.choice}" if self.choice else self.source


DEFAULT = ValueOrigin("default")


class ValueOrigins:
    """Of one config. `files`: origin of each dotted key that a file sets; asked for when it is first needed.

    `typed`: keys of the command line.
    """

    def __init__(self, files: Callable[[], Mapping[str, ValueOrigin]] = dict, typed: Iterable[str] = ()) -> None:
        self._ask = files
        self._taken: Mapping[str, ValueOrigin] = {}
        self._typed = {key for each in typed for key in ((each, f"task.{each}") if each in SHORT else (each,))}

    @cached_property
    def _files(self) -> Mapping[str, ValueOrigin]:
        return self._ask()

    def of(self, key: str) -> ValueOrigin:
        """Of a dotted key: the last that set it, or what it lies in."""
        if key in self._taken:
            return self._taken[key]
        parts = key.split(".")
        above = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        if any(each in self._typed for each in above):
            return ValueOrigin(TYPED)
        return next((self._files[each] for each in above if each in self._files), DEFAULT)

    def listed(self, tree: Mapping[str, Any]) -> list[tuple[str, Any, ValueOrigin]]:
        """Key, value and origin of what is no default; an option of a group is one line: ("precision", "bf16", ...)."""
        found: dict[str, tuple[str, Any, ValueOrigin]] = {}
        for key, value in leaves_of(tree).items():
            origin = self.of(key)
            if origin.choice:
                group, _, option = origin.choice.partition("=")
                found.setdefault(origin.choice, (group, option, ValueOrigin(origin.source)))
            elif origin != DEFAULT:
                found[key] = key, value, origin
        return list(found.values())

    def of_experiment(self, tree: Mapping[str, Any]) -> dict[str, str]:
        """The assignments that an experiment stands for: keys, and options of groups."""
        listed = self.listed(tree)
        return {key: str(value) for key, value, origin in listed if origin.source.startswith(f"{EXPERIMENT} ")}

    def beside(self, before: Mapping[str, Any], after: Mapping[str, Any], source: ValueOrigin) -> "ValueOrigins":
        """With the values that a config has from elsewhere: those in which it differs from what was composed."""
        composed = leaves_of(before)
        found = ValueOrigins(self._ask)
        found._typed = self._typed
        found._taken = {key: source for key, value in leaves_of(after).items() if composed.get(key, self) != value}
        return found

    def marked(self, found: Mapping[str, ValueOrigin]) -> "ValueOrigins":
        """With these, by dotted key."""
        other = ValueOrigins(self._ask)
        other._typed, other._taken = self._typed, {**self._taken, **found}
        return other


def file_origins(loader: ConfigLoaderImpl, choices: Sequence[str]) -> dict[str, ValueOrigin]:
    """By dotted key, of what Hydra composes of these choices of options: who decided on the file that sets it last."""
    composed = loader.compute_defaults_list("config", list(choices), RunMode.RUN)
    found: dict[str, ValueOrigin] = {}
    for each in composed.defaults:
        path, package = each.config_path or "", (each.package or "").removeprefix("_global_")
        loaded = None if not path or path.startswith("hydra/") else loader.repository.load_config(path)
        if loaded is None or package.startswith("hydra"):
            continue
        content: Any = OmegaConf.to_container(loaded.config, resolve=False)
        assert isinstance(content, dict)
        keys = leaves_of({package: content} if package and content else content)
        found |= dict.fromkeys(keys, _origin(path, composed.overrides))
    return found


def _origin(path: str, chosen: Overrides) -> ValueOrigin:
    """Of what a file of conf/ says: "recipe/llama3_8b" is that recipe's, "precision/bf16" of who chose this option."""
    group, _, name = path.partition("/")
    option = chosen.known_choices.get(group) or name
    if group == EXPERIMENT:
        return ValueOrigin(f"{EXPERIMENT} {option}")
    if group == RECIPE:
        return DEFAULT if option in PLAIN_RECIPES else ValueOrigin(f"{RECIPE} {option}")
    facts = chosen.override_metadata.get(group)
    if not name or facts is None:
        return DEFAULT
    by = TYPED if facts.external_override else _origin(facts.containing_config_path or "", chosen).source
    return ValueOrigin(by, f"{group}={option}")


def annotated(text: str, origins: ValueOrigins) -> str:
    """What `--cfg job` prints, with a comment behind each value that is no default: who decided it."""
    lines, root = text.splitlines(), yaml.compose(text, yaml.SafeLoader)
    above = lines[0].partition("# @package ")[2] if lines else ""
    for key, line in _places(root, above) if isinstance(root, yaml.MappingNode) else ():
        if (origin := origins.of(key)) != DEFAULT:
            lines[line] += f" # {origin}"
    return "".join(f"{line}\n" for line in lines)


def _places(node: yaml.MappingNode, above: str) -> Iterator[tuple[str, int]]:
    """Dotted keys with the line behind whose end a comment may stand."""
    for name, value in node.value:
        key = f"{above}.{name.value}" if above else name.value
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _places(value, key)
        elif not isinstance(value, yaml.ScalarNode) or value.start_mark.line == value.end_mark.line:
            yield key, name.end_mark.line
