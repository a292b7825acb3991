"""What a command line asks for: one run, the points of a sweep, or a space to search. Hydra begins and ends here."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from src.config.command_line import COMPOSITION_ERRORS, SWEEP_FLAGS, arguments, former, problem
from src.config.groups import CONF, SHORT
from src.config.tree import Tree, resolve
from src.errors import ConfigError, UserError

# From a resolved tree and what was typed to the tree that is meant, where a key stands for a file elsewhere.
Complete = Callable[[Tree, Mapping[str, str]], Tree]


@dataclass(frozen=True)
class ConfigPoint:
    """One resolved config and the assignments that led to it, as typed: {"optim.lr": "1e-4"}."""

    tree: Tree
    overrides: dict[str, str]


@dataclass(frozen=True)
class Request:
    """`space`, if not empty, is searched instead: its keys with Hydra's text of their range; `fixed` are the other
    arguments. No point and no space: the command line only asked for help.
    """

    points: list[ConfigPoint]
    swept: bool
    space: dict[str, str] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()

    @property
    def trees(self) -> list[Tree]:
        """Of every point."""
        return [point.tree for point in self.points]


def as_typed(tree: Tree, _typed: Mapping[str, str]) -> Tree:
    """For commands whose keys stand for nothing else."""
    return tree


def asked(argv: Sequence[str], complete: Complete = as_typed) -> Request:
    """ConfigError for a mistake. The environment must hold HYDRA_FULL_ERROR=1, or Hydra prints and exits by itself."""
    given = arguments(argv)
    print(*(f"note: {line}\n" for line in former(argv)), sep="", end="", file=sys.stderr)
    ranges = [each for each in given if _range(each) is not None]
    fixed = [each for each in given if each not in (*ranges, *SWEEP_FLAGS)]
    seen = _Seen(complete)
    try:
        seen.compose([*fixed, "hydra.mode=RUN"])
        space = seen.params | dict(_pair(each) for each in ranges)
        flagged = any(each in SWEEP_FLAGS for each in given)
        if not (seen.configs and (flagged or space)):
            return Request(seen.resolved(), swept=False)
        if seen.searches:
            return Request([], swept=True, space=space, fixed=tuple(fixed))
        sweep = _Seen(complete)
        sweep.compose(given)
        if sweep.mode == RunMode.RUN:
            raise ConfigError("hydra.sweeper.params without hydra.mode: MULTIRUN; write both, or pass -m")
        return Request(sweep.resolved(), swept=True)
    except COMPOSITION_ERRORS as error:
        raise UserError(problem(error)) from error


def point(fixed: Sequence[str], chosen: dict[str, str], complete: Complete = as_typed) -> ConfigPoint:
    """One point of a searched space."""
    seen = _Seen(complete)
    try:
        seen.compose([*fixed, *arguments([f"{key}={text}" for key, text in chosen.items()]), "hydra.mode=RUN"])
    except COMPOSITION_ERRORS as error:
        raise UserError(problem(error)) from error
    return seen.resolved()[0]


class _Seen:
    """The configs that Hydra hands to its main function; resolved later, since a base config may lack a swept key."""

    def __init__(self, complete: Complete) -> None:
        self.complete = complete
        self.configs: list[tuple[DictConfig, dict[str, str]]] = []
        self.points: list[ConfigPoint] = []
        self.params: dict[str, str] = {}
        self.mode: RunMode | None = None
        self.errors: list[UserError] = []

    def compose(self, given: list[str]) -> None:
        @hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
        def take(cfg: DictConfig) -> None:
            self._take(cfg)

        with TemporaryDirectory() as scratch:  # for the multirun.yaml that Hydra's sweeper insists on
            before, sys.argv = sys.argv, [sys.argv[0], *given, f"hydra.sweep.dir={scratch}"]
            try:
                take()
            finally:
                sys.argv = before

    def _take(self, cfg: DictConfig) -> None:
        ours = HydraConfig.get()
        overrides = dict(_pair(str(each)) for each in _plain(ours.overrides.task))
        self.configs.append((cfg, overrides))
        self.mode = ours.mode
        self.params = {str(key): str(text) for key, text in (_plain(ours.sweeper).get("params") or {}).items()}
        try:  # here, because ${hydra:...} can be told only while Hydra runs this config
            spell_out(cfg, overrides)
            self.points.append(ConfigPoint(self.complete(resolve(cfg), overrides), overrides))
        except UserError as error:  # kept, since Hydra would print a line of its own about it
            self.errors.append(error)

    @property
    def searches(self) -> bool:
        """Whether the config chose a sweep that proposes its own points."""
        return bool(OmegaConf.select(self.configs[0][0], "sweep.trials"))

    def resolved(self) -> list[ConfigPoint]:
        if len({error.problems for error in self.errors}) == 1:
            raise self.errors[0]
        if self.errors:
            raise UserError(dict.fromkeys(line for error in self.errors for line in error.problems))
        return self.points


def spell_out(cfg: DictConfig, typed: Mapping[str, str]) -> None:
    """`run=...` becomes task.run where the task has such a key; elsewhere it stays, to be refused as a stranger."""
    theirs = set(cfg.task) if isinstance(cfg.get("task"), DictConfig) else set()  # with those that must be given yet
    for key in SHORT:
        if key not in cfg or key not in theirs:
            continue
        if f"task.{key}" in typed:
            raise ConfigError(f"{key}={typed.get(key)}: task.{key} is given too; they are one key")
        with open_dict(cfg):
            cfg.task[key] = cfg.pop(key)


def _range(argument: str) -> Override | None:
    """The override, if it has several values."""
    if argument.startswith(("-", "hydra.")) or "=" not in argument:
        return None
    try:
        parsed = OverridesParser.create().parse_override(argument)
    except COMPOSITION_ERRORS:
        return None  # Hydra will say it better
    return parsed if parsed.is_sweep_override() else None


def _plain(node: Any) -> Any:
    """As written: a ${...} in it belongs to the run's config."""
    return OmegaConf.to_container(node, resolve=False)


def _pair(argument: str) -> tuple[str, str]:
    key, _, text = argument.partition("=")
    return key.lstrip("+"), text
