"""conf/ and a list of arguments made one config by Hydra: each file is read once, and values are set on a copy.

Hydra composes a config anew for every point of a sweep: 0.1 s, most of it for files and groups that all points share.
Here it composes each choice of groups once; what only sets values is applied to a copy of that, by Hydra's own rules.
"""

import copy
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import yaml
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override, open_dict
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from src.config.composition.origins import ValueOrigin, ValueOrigins, file_origins
from src.config.groups import CONF, GROUPS, SHORT

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, MarkedYAMLError)
# What Hydra raises besides at what it does not expect; none of these says more than its words.
UNEXPECTED = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError, OSError)
_INT = "tag:yaml.org,2002:int"


class Composer:
    """Configs of one command, or of several; made by `composer`."""

    def __init__(self, loader: ConfigLoaderImpl) -> None:
        self._loader = loader
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._origins: dict[tuple[str, ...], Mapping[str, ValueOrigin]] = {}

    def compose(self, given: Sequence[str], number: int | None = None) -> DictConfig:
        """With its node `hydra`. `number`: of the point in a sweep. One of COMPOSITION_ERRORS for what is wrong.

        It is good until the next one is composed: the sections that no value is set in, and the node `hydra` with its
        job and overrides, belong to the newest, which is what ${...} in them refers to.
        """
        overrides = [parsed(each) for each in given]
        values, others = _parted(overrides)
        shared = self._shared(tuple(str(each.input_line) for each in others))
        cfg, hydra = _own(shared, {_section(each) for each in values}), shared.hydra
        ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
        job = hydra.job
        tasks = [each for each in overrides if not each.is_hydra_override()]
        hydra.overrides.task = [each.input_line for each in tasks]
        dirname = job.config.override_dirname
        job.override_dirname = get_overrides_dirname(tasks, dirname.exclude_keys, dirname.item_sep, dirname.kv_sep)
        if number is not None:
            job.num, job.id = number, str(number)
        HydraConfig.instance().cfg = SimpleNamespace(hydra=hydra)  # type: ignore[assignment]  # its setter copies
        return cfg

    def origins(self, given: Sequence[str]) -> ValueOrigins:
        """Of the values of `compose(given)`."""
        overrides = [parsed(each) for each in given]
        choices = tuple(str(each.input_line) for each in _parted(overrides)[1])
        typed = [each.key_or_group for each in overrides if each.key_or_group not in GROUPS]
        return ValueOrigins(partial(self._files, choices), typed)

    def parsed(self, argument: str) -> Override:
        """One that knows the options of groups, for glob(...)."""
        return OverridesParser.create(config_loader=self._loader).parse_overrides([argument])[0]

    def _files(self, choices: tuple[str, ...]) -> Mapping[str, ValueOrigin]:
        if choices not in self._origins:
            self._origins[choices] = file_origins(self._loader, choices)
        return self._origins[choices]

    def _shared(self, given: tuple[str, ...]) -> DictConfig:
        """What is composed of groups alone."""
        if given not in self._composed:
            self._composed[given] = self._loader.load_configuration("config", list(given), run_mode=RunMode.RUN)
        return self._composed[given]


@contextmanager
def composer() -> Iterator[Composer]:
    """Over conf/ of this repository; inside Hydra is initialised."""
    with initialize_config_dir(str(CONF), job_name="launch", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        loader.repository = _Repository(loader.config_search_path)
        yield Composer(loader)


@cache
def parsed(argument: str) -> Override:
    """OverrideParseException for what is no argument of Hydra's grammar."""
    return OverridesParser.create().parse_overrides([argument])[0]


def _own(shared: DictConfig, sections: Collection[str]) -> DictConfig:
    """The same config with `sections` of its own, the others' nodes: copied they would be most of a point."""
    cfg = OmegaConf.create({}, flags={"struct": True})
    with open_dict(cfg), flag_override(cfg, "no_deepcopy_set_nodes", values=True):
        for key in shared:
            node = shared._get_node(key)
            cfg[key] = copy.deepcopy(node) if key in sections else node
    return cfg


def _section(override: Override) -> str:
    """The key at the top that a value is set below, or moved to."""
    key = override.key_or_group.partition(".")[0]
    return "task" if key in SHORT else key


def _parted(overrides: list[Override]) -> tuple[list[Override], list[Override]]:
    """Those that set a value, and those that choose options, which decide the files; all are of the second kind where
    one needs its place in the order, such as +a.b=1 or ~a.b.
    """
    values = [each for each in overrides if _sets_a_value(each)]
    others = [each for each in overrides if not _sets_a_value(each)]
    return (values, others) if all(_chooses(each) for each in others) else ([], overrides)


def _sets_a_value(override: Override) -> bool:
    """++key=value where the key is no group's."""
    key = override.key_or_group
    plain = override.is_force_add() and override.package is None and not override.is_sweep_override()
    return plain and key not in GROUPS and "/" not in key and not override.is_hydra_override()


def _chooses(override: Override) -> bool:
    """group=option, or a key of Hydra itself."""
    plain = not (override.is_add() or override.is_force_add() or override.is_delete())
    return plain and (override.key_or_group in GROUPS or override.is_hydra_override())


class _Repository(ConfigRepository):
    """Hydra's, but for how a file is read."""

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        # By scheme: Hydra loads its plugins a second time, so that its class is not the one imported here.
        self.sources = [
            _Files(each.provider, each.path) if each.scheme() == _Files.scheme() else each for each in self.sources
        ]


class _Files(FileConfigSource):
    """Files parsed by libyaml, once each for as long as they stay the same."""

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path, self._normalize_file_name(config_path)).resolve()
        if not path.is_file():
            raise ConfigLoadError(f"Config not found : {path}")
        facts = path.stat()
        header, content = _read(path, facts.st_mtime_ns, facts.st_size)
        return ConfigResult(
            config=OmegaConf.create(copy.deepcopy(content)),
            path=f"{self.scheme()}://{self.path}",
            provider=self.provider,
            header=dict(header),
        )


@cache
def _read(path: Path, _changed: int, _size: int) -> tuple[dict[str, str | None], Any]:
    """Hydra's header and the content of a file."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # editors of one system put a mark in front
    except UnicodeDecodeError as error:
        raise ConfigLoadError(f"{path}: not UTF-8 text (byte {error.start}): {error.reason}") from error
    except OSError as error:
        raise ConfigLoadError(f"{path}: cannot be read: {error.strerror or error}") from error
    stream = io.StringIO(text)
    stream.name = str(path)  # for the marks of errors
    content = yaml.load(stream, _loader())
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigLoadError(f"{path}: holds {type(content).__name__}, not keys with values")
    if not isinstance(content.get("defaults", []), list):
        raise ConfigLoadError(f"{path}: defaults is a list, such as 'defaults: [{{override /model: llama3_8b}}]'")
    return ConfigSource._get_header_dict(text[:512]), content


@cache
def _loader() -> Any:
    """OmegaConf's rules on libyaml's parser; and 1:30 is text, not 90, as in YAML 1.2."""
    theirs: Any = get_yaml_loader()
    fast: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(fast):  # type: ignore[misc]
        yaml_constructors: ClassVar[Any] = theirs.yaml_constructors
        yaml_implicit_resolvers: ClassVar[Any] = {
            first: [(tag, _Decimal(rule) if tag == _INT or tag.endswith(":float") else rule) for tag, rule in rules]
            for first, rules in theirs.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: yaml.Node, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        problem = f"found duplicate key {key.value}"
                        raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                    seen.add(key.value)
            return super().construct_mapping(node, deep=deep)

    return Loader


class _Decimal:
    """A resolver's expression, without numbers of base 60."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule

    def match(self, text: str) -> Any:
        return None if ":" in text else self.rule.match(text)
