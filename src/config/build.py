"""The one place that turns a resolved tree into frozen objects, and tells every mistake in it at once."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from inspect import isabstract
from typing import Any, Literal, cast

from pydantic import ValidationError, field_validator

from src.config import synonyms, wording
from src.config.base import Config, PathField
from src.config.bounds import Seed
from src.config.groups import EXPERIMENT, RECIPE, SECTIONS, SHORT, SHORT_OF, tasks_with
from src.config.presets import section_of, with_target
from src.config.stages import stage_trees
from src.config.tree import Tree
from src.config.upgrades import ADDED_SECTIONS
from src.errors import ConfigError

LONGEST_NAME_BYTES = 160  # of the 255 that a file may have: hashes, steps and job numbers are added to it
_BROKEN = object()  # stands for an object whose problems are already listed


class Top(Config):
    """The keys that stand beside the sections."""

    name: str
    """Letters, digits and . _ - for the run's folder."""
    seed: Seed
    """Seed of the weights and of the order of samples."""
    root: PathField
    """Folder of all run folders and of prepared data."""
    folder: PathField | None
    """Run folder to begin or to go on with; null: <root>/<name>-<hash of the config>."""
    dry_run: bool | Literal["json", "script"]
    """Look and start nothing; true: tables of the plan; json: the plan as JSON; script: the scheduler's batch scripts;
    false: run.
    """

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if len(name.encode(errors="replace")) > LONGEST_NAME_BYTES:
            raise ValueError(f"{name[:40]!r}... is too long for a folder's name; at most {LONGEST_NAME_BYTES} bytes")
        if not name or not all(letter.isalnum() or letter in "._-" for letter in name) or name.startswith("."):
            raise ValueError(f"{name!r} must name a folder: letters, digits and . _ - only, and no dot in front")
        return name


def build(tree: Tree, *, within: str = "src.", sections: Sequence[str] = SECTIONS) -> dict[str, object]:
    """Top keys and sections, every `_target_` made into its object, and the same of each stage (`stages`, of a run in
    stages alone); one ConfigError with all problems otherwise.

    A target must be a Config class of a module whose name starts with `within`.
    """
    builder = _Builder(within)
    top = {key: value for key, value in tree.items() if key not in (*sections, RECIPE, EXPERIMENT)}
    strangers = {key: top.pop(key) for key in list(top) if key not in Top.model_fields}
    builder.problems += [_stranger(key, value, tree) for key, value in strangers.items()]
    for group in (RECIPE, EXPERIMENT):
        if tree.get(group) is not None:
            builder.problems.append(f"{group}: no such section; begin the file with '# @package _global_'")
    built = dict(builder.construct(Top, top, "") or {})
    for name in sections:
        built[name] = builder.section(name, tree.get(name, _neutral(name)))
    if builder.problems:
        raise ConfigError(builder.problems)
    if staged := stage_trees(tree):
        built["stages"] = _built_stages(staged, within, sections)
    return built


def _built_stages(trees: Sequence[Tree], within: str, sections: Sequence[str]) -> list[dict[str, object]]:
    """The objects of each stage; one ConfigError that says of which stage each problem is."""
    found, problems = [], []
    for number, tree in enumerate(trees, 1):
        try:
            found.append(build(tree, within=within, sections=sections))
        except ConfigError as error:
            problems += [f"stage {number}: {each}" for each in error.problems]
    if problems:
        raise ConfigError(problems)
    return found


def _neutral(name: str) -> Tree | None:
    """A section that a recorded config cannot have, since its version had none: it does what that version did."""
    return section_of(name, ADDED_SECTIONS[name]) if name in ADDED_SECTIONS else None


def target_class(tree: Tree, section: str, *, within: str = "src.") -> type[Config]:
    """The class that a section's `_target_` names, without its values; ConfigError where there is none."""
    builder, value = _Builder(within), tree.get(section)
    name = value.get("_target_") if isinstance(value, Mapping) else None
    cls = builder.target(name, section)
    if cls is None:
        raise ConfigError(builder.problems)
    return cls


def object_of(value: Tree, path: str, *, within: str = "src.") -> object:
    """The object of one `_target_` beside the sections; ConfigError with all that is wrong in it."""
    builder = _Builder(within)
    found = builder.descend(value, path)
    if builder.problems:
        raise ConfigError(builder.problems)
    return found


class _Builder:
    """Collects problems while it descends; what it returns counts only if there are none."""

    def __init__(self, within: str) -> None:
        self.within = within
        self.problems: list[str] = []

    def section(self, name: str, value: object) -> object:
        if isinstance(value, Mapping) and "_target_" in value:
            return self.descend(value, name)
        whole, broken = with_target(name)
        offer = f"choose one with {name}=... ({', '.join(whole) or 'none there'})"
        if value is None:
            self.problems.append(f"{name}: missing; {offer}")
        elif isinstance(value, Mapping):
            named = [each for each in broken if broken[each].items() <= value.items()]
            if len(named) == 1:
                offer = f"begin conf/{name}/{named[0]}.yaml with 'defaults: [{_base(value, whole)}, _self_]'"
            self.problems.append(f"{name}: no _target_ in this group; {offer}")
        else:
            self.problems.append(f"{name}: {wording.shown(value)} stands where a group is expected; {offer}")
        return _BROKEN

    def descend(self, value: Any, path: str) -> Any:
        """Depth first: the parts are built before the whole."""
        if isinstance(value, Mapping):
            parts = {key: self.descend(each, f"{path}.{key}") for key, each in value.items() if key != "_target_"}
            if "_target_" not in value:
                return parts
            cls = self.target(value["_target_"], path)
            made = self.construct(cls, parts, path) if cls is not None else None
            return _BROKEN if made is None else made
        if isinstance(value, list):
            return [self.descend(each, f"{path}.{index}") for index, each in enumerate(value)]
        return value

    def construct(self, cls: type[Config], values: Mapping[str, Any], path: str) -> Config | None:
        try:
            return cls(**values)
        except ValidationError as error:
            found = wording.problems(error, cls, values, path)
        except ConfigError as error:  # a class's own check, already in our words
            found = dict(zip(error.problems, error.problems, strict=True))
        broken = tuple(_broken(values, path))
        self.problems += [text for key, text in found.items() if key not in broken and not _inside(key, broken)]
        return None

    def target(self, name: object, path: str) -> type[Config] | None:
        cls = self._import(name) if isinstance(name, str) else f"{wording.shown(name)} is not text"
        if isinstance(cls, str):
            self.problems.append(f"{path}._target_: {cls}")
            return None
        return cls

    def _import(self, name: str) -> type[Config] | str:
        """The class, or what is wrong with its name."""
        if not name.startswith(self.within):
            return f"{name} is refused; only classes under {self.within} may be named"
        module_name, _, class_name = name.rpartition(".")
        if not all(part.isidentifier() for part in name.split(".")):
            return f"{wording.shown(name)} is no name of a class"
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module is there and needs something that is not installed
            return f"there is no module {error.name}"
        found = getattr(module, class_name, None)
        if _is_option(found):
            return cast("type[Config]", found)
        if _is_config(found):
            return f"{name} is what others are made of; choose one of those"
        configs = [key for key, each in vars(module).items() if _is_option(each)]
        return f"{name} is no Config class; {wording.unknown(class_name, configs, 'class')}"


def whole_numbers(tree: Tree) -> Tree:
    """The tree with 1000 where a class wants a whole number and 1e3 was written, which YAML reads as 1000.0."""
    found = {key: _whole(value, None) for key, value in tree.items()}
    return found | {key: _integer(value) for key, value in tree.items() if key == "seed"}


def _whole(value: Any, cls: type[Config] | None) -> Any:
    if isinstance(value, list):
        return [_whole(each, None) for each in value]
    if not isinstance(value, Mapping):
        return value
    if isinstance(name := value.get("_target_"), str):
        target = _Builder("src.").target(name, "")
        cls = target
    kinds = {} if cls is None else _kinds(cls)
    found = {}
    for key, each in value.items():
        whole, inner = kinds.get(key, (False, None))
        found[key] = _integer(each) if whole else _whole(each, inner)
    return found


@cache
def _kinds(cls: type[Config]) -> dict[str, tuple[bool, type[Config] | None]]:
    """By key: whether a number there is a whole one, and the config class that stands there; once for all points."""
    found: dict[str, tuple[bool, type[Config] | None]] = {}
    for key, field in cls.model_fields.items():
        kinds = set(wording.leaves(field.annotation))
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config)), None)
        found[field.alias or key] = (int in kinds and float not in kinds, inner)
    return found


def _integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _is_config(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Config)


def _is_option(found: object) -> bool:
    """A config class that can be made: neither their base nor one with abstract methods."""
    return _is_config(found) and found is not Config and not isabstract(found)


def _base(section: Mapping[str, Any], whole: Mapping[str, Tree]) -> str:
    """The option that a file without a class was meant to build on: it has the most of its keys, and no other file
    below it where several have as many.
    """
    return max(whole, key=lambda option: (len(whole[option].keys() & section.keys()), -len(option)))


def _stranger(key: str, value: object, tree: Tree) -> str:
    """A top-level key that nobody knows: a misspelt section, or a key without its section."""
    names = [*Top.model_fields, *SECTIONS]
    for leaf in [*value, key] if isinstance(value, Mapping) else [key]:
        if (rule := synonyms.follows(leaf)) is not None:
            return f"{key}: no such section; it {rule}"
        if (meant := synonyms.ours(leaf)) is not None:
            return f"{key}: no such section; did you mean {meant}?"
    if key in SHORT and key not in SHORT_OF and (homes := tasks_with(key)):
        offer = " or ".join(f"task={each}" for each in homes)
        return f"{key}: this task has no such key; pass {offer}"
    if not isinstance(value, Mapping) or wording.nearest(key, names) is None:
        inner = list(value) if isinstance(value, Mapping) else [key]
        groups = {section: tree[section] for section in SECTIONS if isinstance(tree.get(section), Mapping)}
        homes = [f"{section}.{leaf}" for leaf in inner for section, keys in groups.items() if leaf in keys]
        if homes:
            return f"{key}: no such section; did you mean {homes[0]}?"
    return f"{key}: {wording.unknown(key, names, 'section')}"


def _broken(value: Any, path: str) -> list[str]:
    """Paths of the objects inside that could not be built."""
    if value is _BROKEN:
        return [path]
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return [each for key, inner in pairs for each in _broken(inner, f"{path}.{key}" if path else str(key))]


def _inside(key: str, broken: Sequence[str]) -> bool:
    return any(key.startswith(f"{each}.") for each in broken)
