"""A run's config as plain data: resolved once, hashed, compared, written to and read from its folder."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.errors import ConfigError

Tree = dict[str, Any]

# Where and how a run is watched, not what it computes: these may differ between two starts of one run.
SITE = frozenset({"root", "folder", "dry_run", "cluster", "tracker", "sweep"})
_ABSENT = object()


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
    """8 hex digits over the canonical JSON of everything but the SITE keys."""
    science = {key: value for key, value in tree.items() if key not in SITE}
    text = json.dumps(science, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines like "optim.lr: 0.0003 -> 0.001"; empty exactly when both have one identity."""
    before, after = (dict(_leaves({k: v for k, v in tree.items() if k not in SITE})) for tree in (old, new))
    lines = []
    for path in [*before, *(path for path in after if path not in before)]:
        left, right = before.get(path, _ABSENT), after.get(path, _ABSENT)
        if json.dumps(left, default=str) != json.dumps(right, default=str):
            lines.append(f"{path}: {_shown(left)} -> {_shown(right)}")
    return lines


def _shown(value: object) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)


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
    """The tree that `write` wrote."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a config ({error})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no config")
    return tree


def write(path: Path, tree: Tree) -> None:
    """Plain YAML, keys in their order."""
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
