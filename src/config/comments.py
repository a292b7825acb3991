"""The meaning of every config key: a docstring below each field of a config class, and in conf/ the key's comment.

The first file that has a key carries its comment; one that overrides the key may say why its value is so. After a
change of a field: `python -m src.config.comments --write`. Without `--write`, exit code 1 and the files that differ.

A docstring is clauses, parted by "; ". The first says what the value is and in which unit; the choices or the range
follow from the field's type and are put behind it. Others read like "null: never save": what one value does.
"""

import ast
import importlib
import itertools
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from src.config.build import Top
from src.config.groups import CONF
from src.storage.atomic_write import atomic_write

WIDTH = 120
# Keys of a section that belong to no field: Hydra's own, and the class.
_SILENT = frozenset({"_target_", "defaults", "hydra"})
# A field that is a plain dict because any subset of a class's keys may be in it.
SUBSETS = {
    ("src.models.families.Auto", "moe"): "src.models.moe.config.MixtureOfExperts",
    ("src.models.families.Auto", "mtp"): "src.models.mtp.config.MultiTokenPrediction",
}
_LOW, _HIGH = ("gt", "ge"), ("lt", "le")
_CLOSED, _STEP = {"gt": "ge", "lt": "le"}, {"gt": 1, "lt": -1}
_WORD = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_VALUE = re.compile(r"(\S+): ")


def field_docs(cls: type[BaseModel]) -> dict[str, str]:
    """By field, in the order of the class: the docstring below it, on one line; "" where there is none.

    Read from the source when asked for. pydantic's use_attribute_docstrings would parse every module at each import,
    about a second of every start of a rank.
    """
    found = dict.fromkeys(cls.model_fields, "")
    for base in reversed(cls.__mro__):
        if issubclass(base, BaseModel) and base.__module__.startswith("src."):
            found |= {name: doc for name, doc in _docs_of(base.__module__, base.__name__).items() if name in found}
    return found


def field_names(cls: type[BaseModel]) -> dict[str, frozenset[str]]:
    """By field, the names that its annotation is written with: {"seq_len": {"Tokens"}}, which say its unit."""
    found: dict[str, frozenset[str]] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, BaseModel) and base.__module__.startswith("src."):
            found |= {
                field.target.id: frozenset(each.id for each in ast.walk(field.annotation) if isinstance(each, ast.Name))
                for field in _body(base.__module__, base.__name__)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            }
    return found


def _body(module: str, name: str) -> list[ast.stmt]:
    file = importlib.import_module(module).__file__
    assert file is not None, module
    return _parsed(file)[name].body


@cache
def _docs_of(module: str, name: str) -> Mapping[str, str]:
    body = _body(module, name)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


@cache
def _parsed(file: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def comment(doc: str, field: FieldInfo) -> str:
    """A field's docstring as a comment: "Decay of the moment." and a Beta give "decay of the moment, in [0, 1)"."""
    first, *others = clauses(doc)
    if not first[1:2].isupper():
        first = first[0].lower() + first[1:]
    explained = {value for value, _ in meanings(doc)}
    if not set(choices(field)) <= explained:
        first += f": {', '.join(choices(field)[:-1])} or {choices(field)[-1]}"
    elif legal := legal_range(field):
        first += f", {legal}"
    return "; ".join([first, *others])


def clauses(doc: str) -> list[str]:
    return doc.removesuffix(".").split("; ")


def meanings(doc: str) -> list[tuple[str, str]]:
    """The values that a docstring explains, as they are written in YAML, and what they do."""
    found = [(match[1], each[match.end() :]) for each in clauses(doc) if (match := _VALUE.match(each))]
    return [(value.lower() if value in ("True", "False") else value, text) for value, text in found]


def choices(field: FieldInfo) -> list[str]:
    """Those of a Literal, also of one beside `None`."""
    return [str(each) for part in parts(field) if get_origin(part) is Literal for each in get_args(part)]


def bounds(field: FieldInfo) -> dict[str, Any]:
    """gt, ge, lt and le of a number; those of the elements of a tuple or dict are not its own."""
    return {
        name: value
        for part in parts(field)
        for name in (*_LOW, *_HIGH)
        if (value := getattr(part, name, None)) is not None
    }


def legal_range(field: FieldInfo) -> str:
    """Like "at least 2", "1 to 2^20" or "in [0, 1)"; "" for what is no number."""
    found = bounds(field)
    if int in parts(field):  # no number lies between two whole ones: every bound can be one that is legal
        found = {_CLOSED.get(name, name): number + _STEP.get(name, 0) for name, number in found.items()}
    low, high = (next(((name, found[name]) for name in pair if name in found), None) for pair in (_LOW, _HIGH))
    if low is None or high is None:
        return next((f"{_WORD[name]} {_shown(number)}" for name, number in filter(None, (low, high))), "")
    if "gt" in found or "lt" in found:
        return f"in {'(' if 'gt' in found else '['}{_shown(low[1])}, {_shown(high[1])}{')' if 'lt' in found else ']'}"
    return f"{_shown(low[1])} to {_shown(high[1])}"


def _shown(number: float) -> str:
    """16 as "16", 65536 as "2^16", 2^63 - 1 as "2^63 - 1", 1e-06 as "1e-6"."""
    whole = int(number)
    if whole == number and whole >= 2**16:
        for rest, words in ((whole, ""), (whole + 1, " - 1")):
            if rest & (rest - 1) == 0:
                return f"2^{rest.bit_length() - 1}{words}"
    if whole == number and whole < 10**6:
        return str(whole)
    return f"{number:g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def parts(field: FieldInfo) -> list[Any]:
    """Types and constraints of the value itself, through unions, Annotated and pydantic's Field."""
    return [*_parts([field.annotation, *field.metadata])]


def _parts(annotations: Iterable[Any]) -> Iterator[Any]:
    for each in annotations:
        yield each
        if isinstance(each, FieldInfo):
            yield from _parts(each.metadata)
        elif get_origin(each) not in (tuple, list, dict, Literal):
            yield from _parts(get_args(each))


def commented(file: Path) -> str:
    """The text of a file of conf/ with the comments that its keys should have."""
    text = file.read_text(encoding="utf-8")
    root = yaml.compose(text, yaml.SafeLoader)
    wanted = dict(_wanted(root, class_of(file), inherited(file))) if isinstance(root, yaml.MappingNode) else {}
    old, new = text.splitlines(), []
    number = 0
    while number < len(old):
        line, at = old[number], number
        number += 1
        if at not in wanted:
            new.append(line)
            continue
        end, words = wanted[at]
        column = line.find("#", end)
        while column >= 0 and number < len(old) and old[number].startswith(" " * column + "# "):
            number += 1  # the rest of a comment that takes several lines
        start = line[:end].rstrip()
        first, *rest = _lines(words, WIDTH - len(start) - 3)
        new += [f"{start} # {first}", *(f"{' ' * (len(start) + 1)}# {each}" for each in rest)]
    return "\n".join(new) + "\n"


def _lines(words: str, width: int) -> list[str]:
    """A comment in lines of at most `width`, each of whole clauses where they fit."""
    lines = [""]
    for clause in words.replace("; ", ";\n").split("\n"):
        joined = f"{lines[-1]} {clause}".lstrip()
        lines[-1:] = [joined] if len(joined) <= width else [*filter(None, lines[-1:]), *textwrap.wrap(clause, width)]
    return lines


def _wanted(
    node: yaml.MappingNode, cls: type[BaseModel] | None, known: Mapping[str, Any]
) -> Iterator[tuple[int, tuple[int, str]]]:
    """Line where each value ends whose key needs a comment, the column there, and the comment."""
    docs = {} if cls is None else field_docs(cls)
    names = {} if cls is None else {field.alias or name: name for name, field in cls.model_fields.items()}
    for key, value in node.value:
        if key.value in _SILENT:
            continue
        inline = value.start_mark.line == key.start_mark.line
        field = cls.model_fields[names[key.value]] if cls is not None and key.value in names else None
        if field is not None and key.value not in known:
            end = value.end_mark if inline else key.end_mark
            column = end.column if inline else end.column + len(":")
            yield end.line, (column, comment(docs[names[key.value]], field))
        if isinstance(value, yaml.MappingNode) and not inline:
            yield from _wanted(value, _class_below(value, cls, field, key.value), known.get(key.value) or {})


def _class_below(
    node: yaml.MappingNode, cls: type[BaseModel] | None, field: FieldInfo | None, key: str
) -> type[BaseModel] | None:
    """Whose keys a mapping has: its own `_target_`, or the class that the field's type names."""
    for name, value in node.value:
        if name.value == "_target_":
            return named_class(value.value)
    if field is None or cls is None:
        return None
    if (name := SUBSETS.get((f"{cls.__module__}.{cls.__name__}", key))) is not None:
        return named_class(name)
    return next((each for each in parts(field) if isinstance(each, type) and issubclass(each, BaseModel)), None)


def named_class(name: str) -> type[BaseModel]:
    module, _, cls = name.rpartition(".")
    found: type[BaseModel] = getattr(importlib.import_module(module), cls)
    return found


def class_of(file: Path) -> type[BaseModel] | None:
    """The class of a file's keys: of its own `_target_` or an inherited one; None for files of the whole config."""
    if file == CONF / "config.yaml":
        return Top
    target = (inherited(file) | _loaded(file)).get("_target_")
    return None if target is None else named_class(target)


def inherited(file: Path) -> dict[str, Any]:
    """The keys that a file gets from others of its folder through its defaults list."""
    found: dict[str, Any] = {}
    for entry in _loaded(file).get("defaults", []):
        name, _, package = str(entry).partition("@")
        if isinstance(entry, str) and name != "_self_" and package in ("", "_here_"):
            parent = file.parent / f"{name}.yaml"
            found = _merged(found, _merged(inherited(parent), _loaded(parent)))
    return found


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(low[key], high[key])
        for key in low.keys() & high.keys()
        if isinstance(high[key], dict) and isinstance(low[key], dict)
    }
    return {**low, **high, **both}


@cache
def _loaded(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def main(arguments: Sequence[str]) -> int:
    stale = [file for file in sorted(CONF.rglob("*.yaml")) if commented(file) != file.read_text(encoding="utf-8")]
    for file in stale:
        print(file.relative_to(CONF.parent))
        if "--write" in arguments:
            atomic_write(file, commented(file))
    return 1 if stale and "--write" not in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
