"""A run's config as plain data: resolved once, hashed, compared, written to and read from its folder."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config.upgrades import Tree, upgraded, without_neutral
from src.errors import ConfigError
from src.storage.atomic_write import atomic_write

__all__ = ["SITE", "STEERING", "Tree", "difference", "identity", "leaves", "read", "resolve", "steers", "write"]

# Where and how a run is watched, not what it computes: these may differ between two starts of one run.
SITE = frozenset({"root", "folder", "dry_run", "cluster", "tracker", "sweep"})
# Keys that decide no number of a run, by section: no part of its identity, so the same command with another value of
# one of them goes on with the same run. What is in neither of the two tables decides numbers, if only their last bits.
STEERING: Mapping[str, str] = {
    "task.log_every": "what is told, not what is computed",
    "task.validate_every": "validation draws from no generator and changes no weight",
    "task.validate_samples": "validation draws from no generator and changes no weight",
    "task.sample_prompt": "a sample is text for a person, made after the last step",
    "task.sample_tokens": "a sample is text for a person, made after the last step",
    "task.sample_temperature": "a sample is text for a person, made after the last step",
    "task.nonfinite": "what follows where there is no number",
    "task.nonfinite_cap": "what follows where there is no number",
    "task.gc_every": "when Python tidies up",
    "task.rehearse": "for a dry run",
    "task.rehearse_ranks": "for a dry run",
    "checkpoint.every": "when state is kept, not what it is",
    "checkpoint.keep": "when state is removed",
    "checkpoint.keep_every": "when state is removed",
    "checkpoint.asynchronous": "who writes, not what",
    "checkpoint.verify": "what is read again before it is believed",
    "checkpoint.export_every": "a copy for others",
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


def resolve(cfg: DictConfig) -> Tree:
    """The composed config as a plain dict; every missing value and dangling reference in one ConfigError."""
    raw = OmegaConf.to_container(cfg, resolve=False, throw_on_missing=False)
    problems = [problem for path, value in _leaves(raw) if (problem := _unresolved(cfg, path, value))]
    if problems:
        raise ConfigError(problems)
    tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _unresolved(cfg: DictConfig, path: str, value: object) -> str | None:
    if value == "???":
        return f"{path}: missing; pass {path}=..."
    if not (isinstance(value, str) and "${" in value):
        return None
    try:
        OmegaConf.to_container(OmegaConf.create([_selected(cfg, path)]), resolve=True)
    except OmegaConfBaseException as error:
        return f"{path}: {value} cannot be resolved ({str(error).splitlines()[0]})"
    return None


def _selected(cfg: DictConfig, path: str) -> object:
    chosen = OmegaConf.select(cfg, path, throw_on_resolution_failure=True, throw_on_missing=True)
    return OmegaConf.to_container(chosen, resolve=True) if isinstance(chosen, DictConfig | ListConfig) else chosen


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
    return {path: json.dumps(value, default=str) for path, value in _leaves(kept)}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no filled dict or list, by its dotted path."""
    if isinstance(value, Mapping) and value:
        inner = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple) and value:
        inner = [(str(index), each) for index, each in enumerate(value)]
    else:
        yield path, value
        return
    for key, each in inner:
        yield from _leaves(each, f"{path}.{key}" if path else key)


def read(path: Path) -> Tree:
    """The tree that `write` wrote, in this version or an older one, with the names of this one."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a config ({error})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no config")
    return upgraded(tree)


def write(path: Path, tree: Tree) -> None:
    """Plain YAML, keys in their order."""
    atomic_write(path, yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
