"""What a mistake says: plain words instead of pydantic's, and the nearest legal name."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from src.config import synonyms
from src.config.presets import options_with

MOST_OPTIONS = 3
_TYPES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a group of keys",
    "model_type": "a group of keys",
    "model_attributes_type": "a group of keys",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant; upper and lower case count as equal."""
    by_lower = {each.lower(): each for each in names}
    close = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def unknown(name: str, names: Iterable[str], noun: str) -> str:
    """Like "no such key; did you mean n_layers?", or the whole list when nothing is near."""
    known = list(names)
    near = nearest(name, known)
    if not known:
        return f"no such {noun}; there are none here"
    return f"no such {noun}; " + (f"did you mean {near}?" if near else f"there are: {', '.join(known)}")


def shown(value: object) -> str:
    """A value as its author wrote it in YAML."""
    return bare(value) if value is None or isinstance(value, bool) else repr(value)


def bare(value: object) -> str:
    """A value as one would type it, without quotes."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def problems(error: ValidationError, cls: type[BaseModel], values: Mapping[str, Any], path: str) -> dict[str, str]:
    """One problem per key, by the key's full path."""
    found: dict[str, list[str]] = {}
    for detail in error.errors():
        location = _location(detail["loc"], values, detail["type"])
        key = ".".join([*filter(None, [path]), *map(str, location)])
        said = found.setdefault(key, [])
        words = _words(detail, cls, location, key)
        if words not in said:
            said.append(words)
    return {key: f"{key}: {_joined(said)}" for key, said in found.items()}


def _joined(said: Sequence[str]) -> str:
    """Two branches of a union complain about one value: name the value once."""
    first, *others = said
    prefix = first.split(" is not ")[0] + " is not "
    return " or ".join([first, *(other.removeprefix(prefix) for other in others)])


def _location(loc: tuple[int | str, ...], values: Any, kind: str) -> list[int | str]:
    """A location of pydantic without the names of union branches, which no user has written."""
    location: list[int | str] = []
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if _holds(values, part):
            values = values[part]
        elif not (last and kind == "missing"):
            continue
        location.append(part)
    return location


def _holds(values: Any, part: int | str) -> bool:
    if isinstance(values, list | tuple):
        return isinstance(part, int) and part < len(values)
    return isinstance(values, Mapping) and part in values


def _words(detail: ErrorDetails, cls: type[BaseModel], location: Sequence[int | str], key: str) -> str:
    kind, value, context = detail["type"], shown(detail["input"]), detail.get("ctx", {})
    if kind == "extra_forbidden":
        owner = _owner(cls, location[:-1])
        names = (field.alias or name for name, field in owner.model_fields.items())
        name, known = str(location[-1]), list(names)
        if (rule := synonyms.follows(name)) is not None:
            return f"no such key; it {rule}"
        if others := [each for each in options_with(key) if len(location) == 1]:
            theirs = f"{', '.join(others[:MOST_OPTIONS])} ha{'ve' if others[1:] else 's'} it"
            near = nearest(name, known)
            return f"no such key of this option; {theirs}" + (f"; did you mean {near}?" if near else "")
        meant = synonyms.ours(name)
        if meant is None or meant.rpartition(".")[2] == nearest(name, known):
            return unknown(name, known, "key")
        return f"no such key; did you mean {meant}?"
    if kind == "missing":
        return f"missing; pass {key}=..."
    if kind in _TYPES:
        return f"{value} is not {_TYPES[kind]}"
    if kind in _BOUNDS:
        word, name = _BOUNDS[kind]
        return f"{value} is not {_range(cls, location) or f'{word} {context[name]}'}"
    if kind == "literal_error":
        return f"{value} is not {context['expected']}"
    if kind == "is_instance_of":
        return f"{value} is not a {context['class']}"
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    return f"{value}: {detail['msg']}"


def _owner(cls: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """The class whose key is at `location`, seen through `| None`, tuples and annotations."""
    for part in location:
        if isinstance(part, str) and part in cls.model_fields:
            cls = next(_models(cls.model_fields[part].annotation), cls)
    return cls


def _range(cls: type[BaseModel], location: Sequence[int | str]) -> str | None:
    """Both ends of what may stand at `location`, like "at least 1 and at most 1000"; None where one end is open."""
    field = _owner(cls, location[:-1]).model_fields.get(str(location[-1])) if location else None
    if field is None:
        return None
    words: dict[str, str] = {}
    for rule in [*field.metadata, *_rules(field.annotation)]:
        for word, name in _BOUNDS.values():
            if (limit := getattr(rule, name, None)) is not None:
                words.setdefault(name, f"{word} {limit:g}" if isinstance(limit, float) else f"{word} {limit}")
    ends = [words[name] for name in ("ge", "gt", "le", "lt") if name in words]
    return " and ".join(ends) if len(ends) == 2 else None


def _rules(annotation: Any) -> Iterator[Any]:
    """What `Annotated` says in the branches of a union."""
    for branch in get_args(annotation):
        for rule in getattr(branch, "__metadata__", ()):
            yield from getattr(rule, "metadata", [rule])


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    return (kind for kind in leaves(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel))


def leaves(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of, seen through unions, tuples and Annotated."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for each in inner:
        yield from leaves(each)
