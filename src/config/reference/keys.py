"""Every key of the config with its type, unit, range, default and meaning, read from the config classes and conf/."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from src.config.build import Top
from src.config.comments import SUBSETS, choices, clauses, field_docs, field_names, legal_range, named_class, parts
from src.config.groups import CONF, options
from src.config.presets import defaults, section_of
from src.config.wording import bare

# Kind of number (src/config/bounds.py) -> its unit.
UNITS = {
    "Tokens": "tokens",
    "Sequences": "sequences",
    "Steps": "steps",
    "StepsOrNever": "steps",
    "Layers": "layers",
    "Ranks": "ranks",
    "Groups": "groups",
    "Gibibytes": "GiB",
    "Minutes": "min",
    "Seconds": "s",
    "SecondsOrNone": "s",
}
MUST = "must be given"
WIDTH = 100  # columns of a terminal
INDENT = " " * 4


@dataclass(frozen=True)
class Key:
    """One key. `default`: as it is typed, "" below a null. `legal`: choices or range, "" where anything goes."""

    name: str
    kind: str
    unit: str
    legal: str
    default: str
    meaning: str
    owner: str

    def lines(self) -> list[str]:
        """The key with its default, its meaning, and what may stand there; long lines are not broken."""
        facts = ", ".join(filter(None, [self.kind, self.legal, self.unit and f"in {self.unit}"]))
        return [f"{self.name}={self.default}", *(INDENT + each for each in (self.meaning, facts) if each)]


def top_keys() -> list[Key]:
    """The keys that stand beside the groups."""
    values = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    return [*_keys(Top, {key: values.get(key) for key in Top.model_fields}, "")]


@cache
def keys(group: str, option: str) -> tuple[Key, ...]:
    """Of an option of a group, in the order of its class; those inside of others behind them."""
    section = section_of(group, option)
    if (target := section.get("_target_")) is None:
        return ()
    return tuple(_keys(named_class(target), section, group.replace("/", ".")))


@cache
def kinds(group: str) -> dict[str, list[str]]:
    """Class -> the options of a group that it builds; the default option's first, and of each class the plainest."""
    found: dict[str, list[str]] = {}
    names = options(group)
    for name in sorted(names, key=lambda each: (each != defaults().get(group), _built_on(group, each), each)):
        if (target := section_of(group, name).get("_target_")) is not None:
            found.setdefault(str(target), []).append(name)
    return found


def _built_on(group: str, option: str) -> bool:
    """Whether it only changes another option of its group."""
    loaded = yaml.safe_load((CONF / group / f"{option}.yaml").read_text(encoding="utf-8")) or {}
    return "_target_" not in loaded


def _keys(cls: type[BaseModel], values: Mapping[str, Any], above: str) -> Iterator[Key]:
    docs, annotations, order = field_docs(cls), field_names(cls), [*values]
    named = {field.alias or name: (name, field) for name, field in cls.model_fields.items()}
    for key, (name, field) in sorted(named.items(), key=lambda each: each[0] in order and order.index(each[0])):
        full = f"{above}.{key}" if above else key
        value = values.get(key)
        inner = _class_below(value, cls, field, key)
        shown = "" if isinstance(value, Mapping) and inner is not None else _typed(key in values, value)
        unit = next((UNITS[each] for each in annotations.get(name, ()) if each in UNITS), "")
        legal = " or ".join([*choices(field), *filter(None, [legal_range(field)])])
        owner = f"{cls.__module__}.{cls.__name__}"
        yield Key(full, _kind(field, inner), unit, legal, shown, "; ".join(clauses(docs[name])), owner)
        if inner is not None and get_origin(field.annotation) is not dict:
            yield from _keys(inner, value if isinstance(value, Mapping) else {}, full)


def _class_below(value: Any, cls: type[BaseModel], field: FieldInfo, key: str) -> type[BaseModel] | None:
    """Whose keys stand below a key: of its value's `_target_`, or of the class that the field's type names."""
    if isinstance(value, Mapping) and "_target_" in value:
        return named_class(value["_target_"])
    if (name := SUBSETS.get((f"{cls.__module__}.{cls.__name__}", key))) is not None:
        return named_class(name)
    inside = (each for each in parts(field) if isinstance(each, type) and issubclass(each, BaseModel))
    return next(inside, None)


def _typed(there: bool, value: Any) -> str:
    if not there:
        return ""
    if value == "???":
        return MUST
    return json.dumps(value) if isinstance(value, list | dict) else bare(value)


def _kind(field: FieldInfo, inner: type[BaseModel] | None) -> str:
    """In words: whole number, number, text, path, true or false, list, keys; "or null" where that is legal."""
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    found = parts(field)
    origins = [get_origin(each) for each in found]
    if inner is not None:
        word = "keys"
    elif choices(field):
        word = "true, false or a word" if bool in found else "whole number or word" if int in found else "word"
    elif tuple in origins or list in origins:
        word = "list"
    elif dict in origins:
        word = "keys"
    else:
        word = next((names[each] for each in found if each in names), "path")
    return word + " or null" * (type(None) in found)
