"""What Hydra has composed as a plain dict, in which nothing is missing and no ${...} is left."""

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config.tree import Tree
from src.errors import ConfigError


def resolve(cfg: DictConfig) -> Tree:
    """The composed config as a plain dict; every missing value and dangling reference in one ConfigError."""
    raw = OmegaConf.to_container(cfg, resolve=False, throw_on_missing=False)
    problems: list[str] = []
    tree = _resolved(raw, cfg, "", problems)
    if problems:
        raise ConfigError(problems)
    return {str(key): value for key, value in tree.items()}


def _resolved(raw: Any, node: Any, path: str, problems: list[str]) -> Any:
    """`raw` with a value for each ${...}, which only few leaves have. `node`: what of the config it was made from."""
    if not isinstance(raw, dict | list) or not raw:
        return raw
    found = []
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
        inner = f"{path}.{key}" if path else str(key)
        if value == "???":
            problems.append(f"{inner}: missing; pass {inner}=...")
        elif isinstance(value, str) and "${" in value:
            value = _value(value, node, key, inner, problems)
        elif isinstance(value, dict | list):
            value = _resolved(value, node._get_node(key), inner, problems)
        found.append((key, value))
    return dict(found) if isinstance(raw, dict) else [value for _, value in found]


def _value(text: str, node: Any, key: Any, path: str, problems: list[str]) -> Any:
    """What stands at `key` of `node`, where `text` is written."""
    try:
        chosen = node[key]
        return OmegaConf.to_container(chosen, resolve=True) if isinstance(chosen, DictConfig | ListConfig) else chosen
    except OmegaConfBaseException as error:
        problems.append(f"{path}: {text} cannot be resolved ({str(error).splitlines()[0]})")
    return None
