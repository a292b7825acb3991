"""A run's config as plain data: hashed, compared, written to and read from its folder."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from src.config.upgrades import Tree, upgraded, without_neutral
from src.errors import ConfigError
from src.storage.atomic_write import atomic_write

__all__ = [
    "SITE",
    "STEERING",
    "Tree",
    "difference",
    "every_leaf",
    "identity",
    "leaves",
    "leaves_of",
    "read",
    "read_section",
    "steers",
    "swept",
    "write",
]

# Where and how a run is watched, not what it computes: these may differ between two starts of one run.
SITE = frozenset({"root", "folder", "dry_run", "cluster", "tracker", "alert", "evaluate", "sweep"})
# Keys that decide no number of a run, by section: no part of its identity, so the same command with another value of
# one of them goes on with the same run. What is in neither of the two tables decides numbers, if only their last bits.
STEERING: Mapping[str, str] = {
    "task.log_every": "what is told, not what is computed",
    "task.layer_norms": "what is told, not what is computed",
    "task.validate_every": "validation draws from no generator and changes no weight",
    "task.validate_samples": "validation draws from no generator and changes no weight",
    "task.sample_prompt": "a sample is text for a person, made after the last step",
    "task.sample_tokens": "a sample is text for a person, made after the last step",
    "task.sample_temperature": "a sample is text for a person, made after the last step",
    "task.nonfinite": "what follows where there is no number",
    "task.nonfinite_cap": "what follows where there is no number",
    "task.gc_every": "when Python tidies up",
    "task.log_seconds": "what is told, not what is computed",
    "task.rehearse": "for a dry run",
    "task.rehearse_ranks": "for a dry run",
    "checkpoint.every": "when state is kept, not what it is",
    "checkpoint.keep": "when state is removed",
    "checkpoint.keep_every": "when state is removed",
    "checkpoint.keep_best": "when state is removed",
    "checkpoint.asynchronous": "who writes, not what",
    "checkpoint.verify": "what is read again before it is believed",
    "checkpoint.export_every": "a copy for others",
    "checkpoint.mirror": "a second copy of what is kept",
    "checkpoint.trusted": "whose files may be read",
    "fault_tolerance.lighthouse": "where groups meet",
    "fault_tolerance.heartbeat_seconds": "when a group counts as gone",
    "fault_tolerance.join_seconds": "how long groups wait for each other",
    "fault_tolerance.sum_seconds": "when a sum over groups is given up",
    "fault_tolerance.heal_seconds": "how long healing may take",
    "fault_tolerance.copy_on": "where the outer weights are kept, not what they are",
    "fault_tolerance.restarts": "how often a group is started again",
    "fault_tolerance.backoff_seconds": "when a group is started again",
    "data.processes": "how many processes tokenise, not what they write",
}
# 10 times as fast, where libyaml is there.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def identity(tree: Mapping[str, Any]) -> str:
    """8 hex digits over the canonical JSON of all that decides numbers: neither SITE nor STEERING, and no key that a
    later version added and that has its neutral value.
    """
    science = without_neutral({key: value for key, value in tree.items() if key not in SITE})
    for path in STEERING:
        section, _, key = path.partition(".")
        if isinstance(science.get(section), dict):
            science[section].pop(key, None)
    text = json.dumps(science, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def steers(path: str) -> bool:
    """Whether a dotted key is of STEERING."""
    section, _, rest = path.partition(".")
    return f"{section}.{rest.partition('.')[0]}" in STEERING


def difference(old: Mapping[str, Any], new: Mapping[str, Any], *, steering: bool = False) -> list[str]:
    """Lines like "optim.lr: 0.0003 -> 0.001"; empty exactly when both have one identity. `steering`: keys of STEERING,
    too.
    """
    before, after = leaves(old), leaves(new)
    lines = []
    for path in [*before, *(path for path in after if path not in before)]:
        left, right = before.get(path, "absent"), after.get(path, "absent")
        if left != right and (steering or not steers(path)):
            lines.append(f"{path}: {left} -> {right}")
    return lines


def leaves(tree: Mapping[str, Any]) -> dict[str, str]:
    """Every value beside those of SITE as JSON, by its dotted path, without neutral ones that a later version added."""
    kept = without_neutral({key: value for key, value in tree.items() if key not in SITE})
    return {path: json.dumps(value, default=str) for path, value in every_leaf(kept)}


def swept(overrides: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys in which the points of a sweep differ, in the order of the command line."""
    keys = list(dict.fromkeys(key for each in overrides for key in each))
    return [key for key in keys if len({each.get(key) for each in overrides}) > 1]


def leaves_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """Every value of a section that is no filled dict, by its dotted path: a list is one value, as it is when typed."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        inner = leaves_of(value) if isinstance(value, Mapping) and value else None
        found |= {key: value} if inner is None else {f"{key}.{path}": each for path, each in inner.items()}
    return found


def every_leaf(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no filled dict or list, by its dotted path."""
    if isinstance(value, Mapping) and value:
        inner = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple) and value:
        inner = [(str(index), each) for index, each in enumerate(value)]
    else:
        yield path, value
        return
    for key, each in inner:
        yield from every_leaf(each, f"{path}.{key}" if path else key)


def read(path: Path) -> Tree:
    """The tree that `write` wrote, in this version or an older one, with the names of this one."""
    return upgraded(_loaded(path, _text(path)))


def read_section(path: Path, section: str) -> Any:
    """One section, or one value at the top, of such a tree, in a tenth of the time: only its lines are parsed, once
    for all runs that have the same. Not to be changed. None where the tree has no such section.
    """
    text = _text(path)
    lines = re.search(rf"^{re.escape(section)}:.*\n?(?: .*\n?|- .*\n?|\n)*", text, re.MULTILINE)
    return _section(text if lines is None else lines[0], section, path if lines is None else None)


@lru_cache(maxsize=1024)
def _section(text: str, section: str, path: Path | None) -> Any:
    return upgraded(_loaded(path or Path(section), text)).get(section)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a config ({error})") from error


def _loaded(path: Path, text: str) -> Tree:
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: cannot be read as a config ({error})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no config")
    return tree


def write(path: Path, tree: Tree) -> None:
    """Plain YAML, keys in their order."""
    atomic_write(path, yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
