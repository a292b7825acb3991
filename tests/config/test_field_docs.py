"""Every field of a config class says what it is, no more than its type allows, and conf/ says the same."""

import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from src.config import comments
from src.config.base import Config
from src.config.comments import WIDTH, bounds, choices, clauses, comment, commented, field_docs, meanings, parts
from src.config.groups import CONF

FILES = sorted(CONF.rglob("*.yaml"))
RANGE = re.compile(r"[\[(]\d[\d.]*, \d|\d to \d|\b(at least|at most|above|below|between) \d|[<>]=? ?\d")


def subclasses(cls: type[Config]) -> Iterator[type[Config]]:
    for each in cls.__subclasses__():
        yield each
        yield from subclasses(each)


def config_classes() -> list[type[Config]]:
    """Those that conf/ names, those inside of them, and whatever else of src their modules bring along."""
    for file in FILES:
        for target in re.findall(r"_target_: (\S+)", file.read_text()):
            importlib.import_module(target.rpartition(".")[0])
    found = {each for each in subclasses(Config) if each.__module__.startswith("src.")}
    return sorted(found, key=lambda cls: (cls.__module__, cls.__name__))


FIELDS = [(cls, name) for cls in config_classes() for name in cls.model_fields]


def allows(field: FieldInfo, value: object) -> bool:
    annotated: Any = Annotated[field.annotation, field] if field.metadata else field.annotation
    try:
        TypeAdapter(annotated).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def faults(doc: str, field: FieldInfo) -> list[str]:
    """What is wrong with a field's docstring."""
    explained = [value for value, _ in meanings(doc)]
    found = [] if re.fullmatch(r"\S.*\.", doc) else ["no sentence"]
    found += [f"a range of its own: {match[0]}" for match in [RANGE.search(doc)] if match]
    for value in explained:
        read = value if value in choices(field) else yaml.safe_load(value)
        if not allows(field, read) and not (isinstance(read, int) and allows(field, float(read))):
            found.append(f"{value} is not allowed")
    if allows(field, None) and "null" not in explained:
        found.append("null is not explained")
    if field.annotation is bool and not {"true", "false"} & set(explained):
        found.append("neither true nor false is explained")
    numbers = {int, float} & {part for part in parts(field) if isinstance(part, type)}
    if numbers and not {"gt", "ge"} & bounds(field).keys():
        found.append("a number without a lower bound")
    return found


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda each: each if isinstance(each, str) else each.__name__)
def test_a_field_has_a_true_docstring(cls: type[Config], name: str) -> None:
    assert faults(field_docs(cls)[name], cls.model_fields[name]) == []


def test_every_class_of_conf_is_there() -> None:
    names = {f"{cls.__module__}.{cls.__name__}" for cls, _ in FIELDS}
    assert len(FIELDS) > 250
    assert {"src.config.build.Top", "src.models.moe.config.MixtureOfExperts", "src.optim.lion.Lion"} <= names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_comments_are_those_of_the_fields(file: Path) -> None:
    """Else: python -m src.config.comments --write"""
    assert file.read_text() == commented(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_other_comments_give_no_range(file: Path) -> None:
    """Beside a key that a file overrides stands why, and nothing that its class could contradict."""
    generated = every_clause()
    beside = [line.partition(" # ")[2] for line in file.read_text().splitlines() if not line.startswith("#")]
    free = [clause for text in beside for clause in text.rstrip(";").split("; ") if clause not in generated]
    assert [clause for clause in free if RANGE.search(clause) and not any(clause in each for each in generated)] == []


@cache
def every_clause() -> set[str]:
    return {clause for cls, name in FIELDS for clause in clauses(comment_of(cls, name))}


def comment_of(cls: type[Config], name: str) -> str:
    return comment(field_docs(cls)[name], cls.model_fields[name])


class Meal(BaseModel):
    """Fields of every kind, with what their comments must be."""

    cups: PositiveInt
    spoons: NonNegativeInt
    port: Annotated[int, Field(ge=1, le=65535)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    share: Annotated[float, Field(ge=0, lt=1)]
    factor: Annotated[float, Field(ge=1)] | None
    tea: Literal["green", "black"]
    milk: Literal["cow", "oat"] | None
    hot: bool


@pytest.mark.parametrize(
    ("name", "doc", "said"),
    [
        ("cups", "Cups in a day.", "cups in a day, at least 1"),
        ("spoons", "Spoons of sugar.", "spoons of sugar, at least 0"),
        ("spoons", "Spoons of sugar; 0: none.", "spoons of sugar, at least 0; 0: none"),
        ("port", "TCP port; 80: the usual one.", "TCP port, 1 to 65535; 80: the usual one"),
        ("seed", "Seed.", "seed, 0 to 2^63 - 1"),
        ("share", "Share of milk.", "share of milk, in [0, 1)"),
        ("factor", "Factor; null: none.", "factor, at least 1; null: none"),
        ("tea", "Kind; black: strong.", "kind: green or black; black: strong"),
        ("tea", "Kind; green: mild; black: strong.", "kind; green: mild; black: strong"),
        ("milk", "Of what; null: none.", "of what: cow or oat; null: none"),
        ("hot", "True: hot; it is better.", "true: hot; it is better"),
    ],
)
def test_choices_and_range_come_from_the_type(name: str, doc: str, said: str) -> None:
    assert comment(doc, Meal.model_fields[name]) == said
    assert faults(doc, Meal.model_fields[name]) == []


@pytest.mark.parametrize(
    ("name", "doc", "fault"),
    [
        ("cups", "", "no sentence"),
        ("cups", "Cups, at least 2.", "a range of its own: at least 2"),
        ("share", "Share in [0, 1].", "a range of its own: [0, 1"),
        ("cups", "Cups; 0: none.", "0 is not allowed"),
        ("cups", "Cups; null: none.", "null is not allowed"),
        ("factor", "Factor.", "null is not explained"),
        ("tea", "Kind; white: rare.", "white is not allowed"),
        ("hot", "Whether it is hot.", "neither true nor false is explained"),
    ],
)
def test_an_untrue_docstring_is_found(name: str, doc: str, fault: str) -> None:
    assert faults(doc, Meal.model_fields[name]) == [fault]


def test_the_first_file_with_a_key_carries_its_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comments, "CONF", tmp_path)
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(
        "# Of the task.\n_target_: src.tasks.verify.config.Verify\nsteps: 5 # old\nseq_len: 8 # old,\n"
        "           # older\n"
    )
    second.write_text("defaults: [first, _self_]\nsteps: 9 # as the paper has it\nmicro_batch: 1\n")
    docs = {name: comment_of(*each) for each in FIELDS if each[0].__name__ == "Verify" for name in [each[1]]}
    assert commented(first).splitlines()[2:] == [f"steps: 5 # {docs['steps']}", f"seq_len: 8 # {docs['seq_len']}"]
    own = f"micro_batch: 1 # {docs['micro_batch']}"
    assert commented(second).splitlines()[1:] == ["steps: 9 # as the paper has it", own]


def test_a_long_comment_is_cut_between_clauses() -> None:
    lines = comments._lines("one two; three four; five", 14)
    assert lines == ["one two;", "three four;", "five"]
    assert comments._lines("one two three four", 9) == ["one two", "three", "four"]
    long = [line for file in FILES for line in file.read_text().splitlines() if len(line) > WIDTH]
    assert [line for line in long if not line.startswith("#")] == []
