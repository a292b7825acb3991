"""Between the terminal and Hydra: arguments made checkable, and Hydra's errors in our words.

Hydra stops at the first unknown key and names no near one. So plain assignments are passed on as `++key=value` (set or
add), and `build`, which knows every legal name, tells all mistakes of files and command line together.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any, get_type_hints

from hydra.conf import HydraConf
from hydra.errors import MissingConfigException, OverrideParseException
from yaml import MarkedYAMLError

from src.config.composition.composer import COMPOSITION_ERRORS, parsed
from src.config.groups import EXPERIMENT, FROM, GROUPS, options
from src.config.reference.options import listed
from src.config.upgrades import renamed
from src.config.wording import nearest, unknown
from src.errors import ConfigError

_ASSIGNMENT = re.compile(r"(?P<key>[A-Za-z_][\w.]*)=")
_FUNCTION = re.compile(r"(choice|range|sort|shuffle|glob|tag)\(.*\)")
_NO_NAME = re.compile(r"(?i)true|false|yes|no|on|-?\d[\d_.e+-]*|nan|-?inf")
_PATH = re.compile(r"^[^$(]*([/*~]|\.(txt|md|jsonl?|parquet|bin|npy|model)$)")
# What a path, typed where an option belongs, was meant to be.
OF_A_PATH = {
    "data": "data=text data.files={}",
    "tokenizer": "tokenizer=file tokenizer.path={}",
    "model": "model=auto checkpoint.initial=hf:{}",
}
_BARE = re.compile(r"[A-Za-z_./][\w./:@+-]*")  # means itself in Hydra's grammar, unless it is a word of YAML
_WORD = re.compile(r"(?i)null|true|false|yes|no|on|off|nan|inf")
OFF = ("off", "none")  # options that choose nothing
SWEEP_FLAGS = ("-m", "--multirun")
_SEVERAL = re.compile(r"parallel=auto:(?P<count>[1-9]\d?)")  # the fastest so many layouts, each a point of a sweep
MOST_BRACKETS = 50  # of one argument; Python's own stack ends Hydra's grammar soon after
# Any text but null, with the commas, quotes and brackets that mean something elsewhere.
TEXTS = (
    *("prompt", "task.prompt", "task.sample_prompt", "text", "task.text", "tracker.wandb.notes"),
    *("cluster.partition", "cluster.exclude", "cluster.constraint"),
)
# Paths and words: =, spaces, ~ and brackets are part of the value; a comma parts the values of a sweep, as everywhere.
PLACES = (
    *(
        "root",
        "folder",
        FROM,
        "run",
        "task.run",
        "runs",
        "task.runs",
        "to",
        "task.to",
        "prompts",
        "task.prompts",
        "checkpoint.initial",
        "checkpoint.mirror",
    ),
    *("data.files", "data.path", "data.separator", "tokenizer.path", "tokenizer.bos", "tokenizer.eos"),
    *("cluster.account", "cluster.qos", "cluster.python", "tracker.wandb.project", "tracker.wandb.entity"),
    *("tracker.trackio.project", "tracker.mlflow.uri", "tracker.mlflow.experiment"),
)
LISTS = ("data.files", "runs", "task.runs")  # of these, that may be several in brackets


def arguments(argv: Sequence[str]) -> list[str]:
    """What Hydra gets to see. ConfigError if a key of Hydra itself is misspelt, which Hydra would accept in silence."""
    problems = [said for each in argv if (said := _refused(*each.lstrip("+~").split("=", 1)))]
    if problems:
        raise ConfigError(problems)
    flags: list[str] = []
    others: list[str] = []
    for before, each in pairwise(["", *_spelt_out(argv)]):
        (flags if _of_a_flag(before, each) else others).append(each)
    return flags + [_settable(_current(each)) for each in others]  # Hydra wants all assignments in one place


def _spelt_out(argv: Sequence[str]) -> Iterator[str]:
    """`parallel=auto:3` stands for `-m parallel=auto parallel.place=1,2,3`."""
    for each in argv:
        if (match := _SEVERAL.fullmatch(each)) is None:
            yield each
        else:
            yield from (
                "-m",
                "parallel=auto",
                f"parallel.place={','.join(map(str, range(1, int(match['count']) + 1)))}",
            )


def assignments(given: Sequence[str]) -> list[str]:
    """Of what `arguments` returns, all but the flags and their words."""
    return [each for before, each in pairwise(["", *given]) if not _of_a_flag(before, each)]


def former(argv: Sequence[str]) -> list[str]:
    """A line for each argument that has a key of an older version."""
    now = {each: _current(each) for each in argv}
    return [f"{old.partition('=')[0]} is now called {new.partition('=')[0]}" for old, new in now.items() if old != new]


def _current(argument: str) -> str:
    match = _ASSIGNMENT.match(argument)
    return argument if match is None else renamed(match["key"]) + argument[match.end("key") :]


def _of_a_flag(before: str, argument: str) -> bool:
    """Whether it is a flag, such as --cfg, or the word behind one: whatever is set has a = or begins with ~."""
    takes_a_word = before.startswith("-") and before not in SWEEP_FLAGS
    return argument.startswith("-") or (takes_a_word and "=" not in argument and not argument.startswith("~"))


def _settable(argument: str) -> str:
    match = _ASSIGNMENT.match(argument)
    if match is None or match["key"] in GROUPS or match["key"].startswith("hydra."):
        return argument
    if match["key"] in TEXTS and (text := argument[match.end() :]) != "null":
        return f"++{match[0]}{_literal(text)}"
    if match["key"] in PLACES and not _in_hydras_words(argument):
        return f"++{match[0]}{','.join(map(_literal, argument[match.end() :].split(',')))}"
    return f"++{argument}"


def _in_hydras_words(argument: str) -> bool:
    """Whether what stands behind = is null, a list, in quotes, a function such as choice(a,b), or escaped."""
    key, _, text = argument.partition("=")
    listed = text.startswith("[") and key in LISTS
    if text != "null" and not (listed or text[:1] in ("'", '"') or "\\" in text or _FUNCTION.fullmatch(text)):
        return False
    try:
        parsed(argument)
    except COMPOSITION_ERRORS:
        return False
    return True


def typed(key: str, value: Any) -> str:
    """A resolved value as it is typed behind `key=`, before a shell's own quotes; `arguments` understands it."""
    if isinstance(value, str):
        return value if key in TEXTS or (_BARE.fullmatch(value) and not _WORD.fullmatch(value)) else _literal(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{typed('', each)}" for name, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(typed("", each) for each in value) + "]"
    return json.dumps(value)


def _literal(text: str) -> str:
    """In Hydra's quotes, where backslashes before a quote and at the end count twice."""
    doubled = re.sub(r"(\\+)(?='|\Z)", r"\1\1", text)
    return "'" + doubled.replace("'", "\\'") + "'"


def _refused(key: str, value: str | None = None) -> str | None:
    if value is not None and not key:
        return f"={value}: a value without a key; write key=value"
    if key in GROUPS and (value or "").lstrip().startswith("{"):
        return f"{key}={value}: a group takes the name of an option; set single keys as {key}.<key>=..."
    needs_option = key in GROUPS and key != EXPERIMENT
    if needs_option and value in ("", "null"):
        return _with_options(f"{key}={value}: a group needs an option; there are:", key, options(key))
    if needs_option and value is not None and (found := _no_option(key, value)):
        return found
    return _hydra_key(key)


def _no_option(group: str, value: str) -> str | None:
    """For a path, a number or a truth value where an option belongs: Hydra would only say that it is none."""
    known = options(group)
    if group in OF_A_PATH and _PATH.search(value) and value not in known:
        return f"{group}={value}: a path is no option; pass {OF_A_PATH[group].format(value)}"
    for each in value.split(","):
        if each in known or not _NO_NAME.fullmatch(each):
            continue
        if each.lower() in ("true", "yes", "on"):
            few = len(known) <= 3 and any(name in OFF for name in known)
            near = [name for name in known if name not in OFF] if few else []
        elif each.isdigit():
            near = [name for name in known if re.sub(r"\D+", " ", name).split() == [each]]
        else:
            near = [name for name in known if name in OFF]
        meant = f"did you mean {' or '.join(near)}? there are" if near else "there are"
        return _with_options(f"{group}={value}: no such option; {meant}:", group, known)
    return None


def _with_options(said: str, group: str, names: Sequence[str]) -> str:
    """With a line for each option: its name and what it is, where it is one of conf/."""
    return "\n".join([said, *listed(group, names)])


def _hydra_key(key: str) -> str | None:
    section, *parts = key.split(".")
    if section != "hydra":
        return None
    node: Any = HydraConf
    for part in parts:
        if not is_dataclass(node):
            return None  # a plugin's own keys
        names = [field.name for field in fields(node)]
        if part not in names:
            return f"{key}: {unknown(part, names, 'key')}"
        node = get_type_hints(node)[part]
    return None


def problem(error: Exception, given: Sequence[str]) -> str:
    """One line for an error of Hydra, OmegaConf or the YAML reader, about these arguments."""
    if isinstance(error, RecursionError):
        deep = next((each for each in given if max(map(each.count, "[{(")) > MOST_BRACKETS), None)
        if deep is not None:
            return f"{_typed(deep)[:60]}...: nested too deeply"
        return f"{' '.join(map(_typed, given))}: a defaults list of conf/ names itself"
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        near = nearest(name, error.options)
        meant = f"did you mean {near}? there are" if near else "there are"
        return _with_options(f"{group}={name}: no such option; {meant}:", group, error.options)
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        opened = "flow" in (error.context or "")  # a [ or { that is never closed: its own line says more than the end's
        mark = error.context_mark if opened and error.context_mark is not None else error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: {error.problem}"
    if isinstance(error, OverrideParseException):
        return f"{_typed(error.override)}: no legal argument; write key=value, with quotes around unusual text"
    lines = [line for each in _causes(error) for line in str(each).splitlines() if line.strip()]
    if not lines or not isinstance(error, COMPOSITION_ERRORS):
        what = " ".join(map(_typed, given)) or "conf/config.yaml"
        return f"{what}: makes no config ({type(error).__name__}{': ' * bool(lines)}{''.join(lines[:1])})"
    if several := re.match(r"Ambiguous value for argument '(.*)'", lines[0]):
        return f"{_typed(several[1])}: several values; write -m to sweep over them, or [ ] around them for one list"
    if key := re.search(r"full_key: (\S+)", "\n".join(lines)):
        return f"{key[1]}: {lines[0]}"
    return lines[0]


def _typed(argument: str) -> str:
    """An argument without the ++ that we put in front."""
    return argument.removeprefix("++")


def _causes(error: BaseException) -> Iterator[BaseException]:
    yield error
    if error.__cause__ is not None:
        yield from _causes(error.__cause__)
