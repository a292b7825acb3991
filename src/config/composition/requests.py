"""What a command line asks for: one run, the points of a sweep, or a space to search. Hydra begins and ends here."""

import io
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from math import prod
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from src.config.build import whole_numbers
from src.config.composition.command_line import SWEEP_FLAGS, arguments, assignments, former, problem
from src.config.composition.composer import COMPOSITION_ERRORS, UNEXPECTED, Composer, composer, parsed
from src.config.composition.origins import ValueOrigin, ValueOrigins, annotated
from src.config.composition.resolution import resolve
from src.config.groups import CONF, FROM, SHORT, SHORT_OF
from src.config.stages import CHANGES, entries
from src.config.tree import Tree, leaves_of
from src.errors import ConfigError, UserError
from src.storage.streams import ReaderMayLeave, to_stderr

# From a resolved tree and what was typed to the tree that is meant, where a key stands for a file elsewhere.
Complete = Callable[[Tree, Mapping[str, str]], Tree]
MOST_POINTS = 10_000  # of a sweep; each is composed, checked and planned before the first starts


@dataclass(frozen=True)
class ConfigPoint:
    """One resolved config and the assignments that led to it, as typed: {"optim.lr": "1e-4"}."""

    tree: Tree
    overrides: dict[str, str]
    origins: ValueOrigins = field(default_factory=ValueOrigins, compare=False, repr=False)


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
    to_stderr(f"note: {line}" for line in former(argv))
    if any(each.startswith("-") and each not in SWEEP_FLAGS for each in given):
        points = _Points(complete)
        _by_hydra(given, points)
        return Request(points.resolved(), swept=len(points.found) > 1)
    flagged = any(each in SWEEP_FLAGS for each in given)
    plain = [each for each in given if each not in SWEEP_FLAGS]
    ranges = _ranges(plain)
    fixed = [each for each in plain if not (_pair(each)[0] in ranges or _is_range(each))]
    with composer() as hydras:
        base = _composed(hydras, fixed)
        flagged = flagged or _mode(base, plain) == RunMode.MULTIRUN
        space = _params(base) | ranges
        if OmegaConf.select(base, "sweep.trials") and (flagged or space):
            if not space:
                raise ConfigError("sweep=optuna draws from ranges; pass one, such as optim.lr=interval(1e-5,1e-2)")
            return Request([], swept=True, space=space, fixed=tuple(fixed))
        points = _Points(complete)
        if not flagged:
            if ranges:
                _composed(hydras, plain)  # Hydra says that these are several values
            if space:
                raise ConfigError("hydra.sweeper.params without hydra.mode: MULTIRUN; write both, or pass -m")
            points.add(base, hydras.origins(fixed))
        else:
            ours = [each for each in plain if each.lstrip("+~").startswith("hydra")]
            params = arguments([f"{key}={text}" for key, text in space.items() if key not in ranges])
            chosen = {_pair(each)[0]: each for each in [*params, *plain] if each not in ours}  # the last of a key
            for number, each in enumerate(_product(hydras, list(chosen.values()))):
                points.add(_composed(hydras, [*ours, *each], number), hydras.origins([*ours, *each]))
        return Request(points.resolved(), swept=flagged)


def point(fixed: Sequence[str], chosen: dict[str, str], complete: Complete = as_typed) -> ConfigPoint:
    """One point of a searched space."""
    points = _Points(complete)
    with composer() as hydras:
        given = [*fixed, *arguments([f"{key}={text}" for key, text in chosen.items()])]
        points.add(_composed(hydras, given), hydras.origins(given))
    return points.resolved()[0]


def _composed(hydras: Composer, given: Sequence[str], number: int | None = None) -> DictConfig:
    try:
        return hydras.compose(given, number)
    except (*COMPOSITION_ERRORS, *UNEXPECTED) as error:
        raise UserError(problem(error, given)) from error


def _by_hydra(given: Sequence[str], points: "_Points") -> None:
    """Flags of Hydra, such as --cfg and --help: it prints what they ask for."""

    @hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
    def take(cfg: DictConfig) -> None:
        with open_dict(cfg):
            cfg.hydra = HydraConfig.get()
        points.add(cfg, ValueOrigins())

    shows = any(each in ("--cfg", "-c") or each.startswith("--cfg=") for each in given)
    with TemporaryDirectory() as scratch:  # for the multirun.yaml that Hydra's sweeper insists on
        before, sys.argv = sys.argv, [sys.argv[0], *given, f"hydra.sweep.dir={scratch}"]
        printed = io.StringIO()
        try:
            with redirect_stdout(printed) if shows else nullcontext():
                take()
        except COMPOSITION_ERRORS as error:
            raise UserError(problem(error, given)) from error
        finally:
            sys.argv = before
    if shows:
        with composer() as hydras, ReaderMayLeave():
            print(annotated(printed.getvalue(), hydras.origins(assignments(given))), end="")


class _Points:
    """The points of one command; what is wrong with each is kept, to be told together."""

    def __init__(self, complete: Complete) -> None:
        self.complete = complete
        self.found: list[ConfigPoint] = []
        self.errors: list[UserError] = []

    def add(self, cfg: DictConfig, origins: ValueOrigins) -> None:
        overrides = dict(_pair(str(each)) for each in _plain(cfg.hydra.overrides.task))
        with open_dict(cfg):
            del cfg["hydra"]
        try:
            spell_out(cfg, overrides)
            tree = whole_numbers(resolve(cfg))
            if FROM in tree:  # the run's values stand behind those of an experiment, too
                found = self.complete(tree, overrides | origins.of_experiment(tree))
                origins = origins.beside(tree, found, ValueOrigin(f"{FROM} {tree[FROM]}"))
            else:
                found = self.complete(tree, overrides)
                origins = _of_stages(origins, tree, found)
            self.found.append(ConfigPoint(found, overrides, origins.marked(_of_open_options(tree, found))))
        except UserError as error:
            self.errors.append(error)

    def resolved(self) -> list[ConfigPoint]:
        if len({error.problems for error in self.errors}) == 1:
            raise self.errors[0]
        if self.errors:
            raise UserError(dict.fromkeys(line for error in self.errors for line in error.problems))
        return self.found


def _of_stages(origins: ValueOrigins, tree: Tree, found: Tree) -> ValueOrigins:
    """With what the first stage says, and the steps of all of them, where there are stages."""
    if not entries(found):
        return origins
    listed = {"task": tree["task"] | {"stages": found["task"]["stages"]}}
    theirs = {key.partition(".")[0] for key in CHANGES}
    theirs -= {group for group in theirs if _was_open(group, tree, found)}
    others = {key: value for key, value in found.items() if key not in theirs}  # such as checkpoint.every=auto
    return origins.beside(tree | others | listed, found, ValueOrigin("stages"))


def _was_open(group: str, tree: Tree, found: Tree) -> bool:
    """Whether an option of this group stood for one that was still to be chosen."""
    before, after = ((each.get(group) or {}).get("_target_") for each in (tree, found))
    return before != after and str(before).rpartition(".")[2].startswith("Auto")


def _of_open_options(tree: Tree, found: Tree) -> dict[str, ValueOrigin]:
    """What stands in the place of parallel=auto and of precision=auto, and what the layout brought along."""
    marked: dict[str, ValueOrigin] = {}
    for group, others in (("precision", ()), ("parallel", ("recompute.", "task.micro_batch"))):
        if not _was_open(group, tree, found):
            continue
        composed, source = leaves_of(tree), ValueOrigin(f"{group}=auto")
        for key, value in leaves_of(found).items():
            theirs = key.startswith((f"{group}.", *others)) and not key.endswith("_target_")
            if theirs and (key not in composed or composed[key] != value):
                marked[key] = source
    return marked


def spell_out(cfg: DictConfig, typed: Mapping[str, str]) -> None:
    """`run=...` becomes task.run where the task has such a key; elsewhere it stays, to be refused as a stranger."""
    theirs = set(cfg.task) if isinstance(cfg.get("task"), DictConfig) else set()  # with those that must be given yet
    target = cfg.task.get("_target_") if theirs else None
    for key in SHORT:
        if key not in cfg or key not in theirs or SHORT_OF.get(key, target) != target:
            continue
        if f"task.{key}" in typed:
            raise ConfigError(f"{key}={typed.get(key)}: task.{key} is given too; they are one key")
        with open_dict(cfg):
            cfg.task[key] = cfg.pop(key)


def _ranges(given: Sequence[str]) -> dict[str, str]:
    """Keys that have several values, with Hydra's text of them; the last argument of a key counts."""
    found: dict[str, str] = {}
    for each in given:
        key, text = _pair(each)
        found.pop(key, None)
        if not key.startswith("hydra.") and _is_range(each):
            found[key] = text
    return found


def _is_range(argument: str) -> bool:
    try:
        return parsed(argument).is_sweep_override()
    except (*COMPOSITION_ERRORS, *UNEXPECTED):
        return False  # composing says it better


def _mode(base: DictConfig, given: Sequence[str]) -> object:
    try:
        return OmegaConf.select(base, "hydra.mode")
    except COMPOSITION_ERRORS as error:
        raise UserError(problem(error, given)) from error


def _params(base: DictConfig) -> dict[str, str]:
    """hydra.sweeper.params of a file or of the command line."""
    node = OmegaConf.select(base, "hydra.sweeper")
    if not isinstance(node, DictConfig):
        raise ConfigError(f"hydra.sweeper={node}: is a group of keys; set hydra.sweeper.params")
    params = _plain(node.params) if isinstance(node.get("params"), DictConfig) else {}
    return {str(key): str(text) for key, text in params.items()}


def _product(hydras: Composer, given: Sequence[str]) -> list[tuple[str, ...]]:
    """The arguments of each point of a grid, the last one fastest. ConfigError for what is no list of values."""
    columns: list[list[str]] = []
    problems: list[str] = []
    for argument in given:
        typed = "{}={}".format(*_pair(argument))
        try:
            override = hydras.parsed(argument)
            if not override.is_sweep_override():
                columns.append([_normal(argument, override)])
            elif override.is_discrete_sweep():
                values = list(itertools.islice(override.sweep_string_iterator(), MOST_POINTS + 1))
                columns.append([f"{override.get_key_element()}={value}" for value in values])
                if not values:
                    problems.append(f"{typed}: holds no value; write a,b,c or range(1,9)")
            else:
                problems.append(f"{typed}: a grid needs values: write a,b,c or range(1,9), or pass sweep=optuna")
        except (*COMPOSITION_ERRORS, *UNEXPECTED) as error:
            problems.append(problem(error, [argument]))
    if prod(map(len, columns)) > MOST_POINTS:
        problems.append(f"-m asks for more than {MOST_POINTS} points; write fewer values, or draw some: sweep=optuna")
    if problems:
        raise ConfigError(problems)
    return list(itertools.product(*columns))


def _normal(argument: str, override: Override) -> str:
    """One spelling of a value, so that 1e-3 and 0.001 are one point for a ledger."""
    if override.is_delete():
        return argument
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def _plain(node: Any) -> Any:
    """As written: a ${...} in it belongs to the run's config."""
    return OmegaConf.to_container(node, resolve=False)


def _pair(argument: str) -> tuple[str, str]:
    key, _, text = argument.partition("=")
    return key.lstrip("+"), text
