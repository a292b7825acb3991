"""What Hydra has composed as a plain dict, in which nothing is missing and no ${...} is left."""

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config.tree import Tree, every_leaf
from src.errors import ConfigError


def resolve(cfg: DictConfig) -> Tree:
    """The composed config as a plain dict; every missing value and dangling reference in one ConfigError."""
    raw = OmegaConf.to_container(cfg, resolve=False, throw_on_missing=False)
    problems = [problem for path, value in every_leaf(raw) if (problem := _unresolved(cfg, path, value))]
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
