"""Trees become frozen objects, or one error that lists every mistake."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from src.config.build import build
from src.config.groups import SECTIONS, options
from src.config.presets import with_target
from src.config.wording import unknown
from src.errors import ConfigError
from tests.config import nouns

HERE = "tests.config.nouns"
TOP = {"name": "a", "seed": 0, "root": "runs", "folder": None, "dry_run": False}
NETWORK = {
    "_target_": f"{HERE}.Network",
    "n_layers": 2,
    "n_heads": 4,
    "dropout": 0,
    "tied": False,
    "mask": "causal",
    "scaling": None,
    "devices": "all",
}
SOURCE = {"_target_": f"{HERE}.Source", "path": "a.txt", "weight": 1.0}
MIXTURE = {"_target_": f"{HERE}.Mixture", "sources": [SOURCE, SOURCE | {"weight": 2}], "held_out": SOURCE}


def tree(top: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    return TOP | {"model": NETWORK | model, "data": MIXTURE} | (top or {})


def built(config: dict[str, Any]) -> dict[str, Any]:
    return build(config, within="tests.", sections=("model", "data"))


def problems(config: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        built(config)
    return caught.value.problems


def test_every_section_becomes_its_object() -> None:
    sections = built(tree(scaling={"factor": 8, "low": 1}))
    assert list(sections) == ["name", "seed", "root", "folder", "dry_run", "model", "data"]
    assert sections["root"] == Path("runs")
    assert sections["model"] == nouns.Network(
        n_layers=2,
        n_heads=4,
        dropout=0.0,
        tied=False,
        mask="causal",
        scaling=nouns.Scaling(factor=8.0, low=1.0),
        devices="all",
    )


def test_nested_targets_are_built_before_the_whole() -> None:
    mixture = built(tree())["data"]
    first, second = mixture.sources
    assert (first, second.weight) == (nouns.Source(path="a.txt", weight=1.0), 2.0)
    assert mixture.held_out == first


def test_objects_are_frozen_and_the_tree_is_left_alone() -> None:
    config = tree()
    model = built(config)["model"]
    assert config == tree()
    with pytest.raises(ValidationError):
        model.n_layers = 3


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"n_layer": 3}, "model.n_layer: no such key; did you mean n_layers?"),
        ({"N_HEADS": 3}, "model.N_HEADS: no such key; did you mean n_heads?"),
        (
            {"zzz": 3},
            "model.zzz: no such key; there are: n_layers, n_heads, dropout, tied, mask, scaling, devices",
        ),
        ({"n_layers": "many"}, "model.n_layers: 'many' is not a whole number"),
        ({"n_layers": "3"}, "model.n_layers: '3' is not a whole number"),
        ({"n_layers": 2.0}, "model.n_layers: 2.0 is not a whole number"),
        ({"n_layers": True}, "model.n_layers: true is not a whole number"),
        ({"n_layers": None}, "model.n_layers: null is not a whole number"),
        ({"n_layers": 0}, "model.n_layers: 0 is not above 0"),
        ({"dropout": "x"}, "model.dropout: 'x' is not a number"),
        ({"dropout": float("inf")}, "model.dropout: inf is not a finite number"),
        ({"dropout": 1}, "model.dropout: 1 is not at least 0 and below 1"),
        ({"dropout": -0.5}, "model.dropout: -0.5 is not at least 0 and below 1"),
        ({"tied": 1}, "model.tied: 1 is not true or false"),
        ({"mask": "casual"}, "model.mask: 'casual' is not 'causal' or 'block_causal'"),
        ({"scaling": "x"}, "model.scaling: 'x' is not a group of keys"),
        ({"scaling": {"factor": 1, "low": 1, "facto": 2}}, "model.scaling.facto: no such key; did you mean factor?"),
        ({"scaling": {"factor": 1}}, "model.scaling.low: missing; pass model.scaling.low=..."),
        ({"devices": "some"}, "model.devices: 'some' is not a whole number or 'all'"),
        ({"_target_": "os.system"}, "model._target_: os.system is refused; only classes under tests. may be named"),
        ({"_target_": 3}, "model._target_: 3 is not text"),
        ({"_target_": "tests.nowhere.Network"}, "model._target_: there is no module tests.nowhere"),
        (
            {"_target_": f"{HERE}.Networks"},
            f"model._target_: {HERE}.Networks is no Config class; no such class; did you mean Network?",
        ),
        (
            {"_target_": f"{HERE}.Plain"},
            f"model._target_: {HERE}.Plain is no Config class; no such class; "
            "there are: Scaling, Network, Source, Mixture",
        ),
    ],
)
def test_a_mistake_in_a_section(model: dict[str, Any], problem: str) -> None:
    assert problems(tree(**model)) == (problem,)


def test_a_missing_key() -> None:
    config = tree()
    config["model"] = {key: value for key, value in NETWORK.items() if key != "tied"}
    assert problems(config) == ("model.tied: missing; pass model.tied=...",)


@pytest.mark.parametrize(
    ("top", "problem"),
    [
        ({"modle": {"dim": 3}}, "modle: no such section; did you mean model?"),
        ({"optimm": {}}, "optimm: no such section; did you mean optim?"),
        ({"n_heads": 3}, "n_heads: no such section; did you mean model.n_heads?"),
        ({"net": {"n_layers": 3}}, "net: no such section; did you mean model.n_layers?"),
        ({"experiment": {"x": 1}}, "experiment: no such section; begin the file with '# @package _global_'"),
        ({"seed": "zero"}, "seed: 'zero' is not a whole number"),
        ({"seed": -1}, "seed: -1 is not at least 0 and below 9223372036854775808"),
        ({"dry_run": "no"}, "dry_run: 'no' is not true or false or 'json' or 'script'"),
        ({"root": 3}, "root: 3 is not a path"),
        ({"name": "a/b"}, "name: 'a/b' must name a folder: letters, digits and . _ - only, and no dot in front"),
        ({"name": ".."}, "name: '..' must name a folder: letters, digits and . _ - only, and no dot in front"),
    ],
)
def test_a_mistake_at_the_top(top: dict[str, Any], problem: str) -> None:
    assert problems(tree(top)) == (problem,)


@pytest.mark.parametrize("value", ["llama3_8b", None, {"dim": 3}, ["x"]])
def test_something_else_where_a_group_belongs_shows_the_options(value: object) -> None:
    (problem,) = problems(tree({"model": value}))
    assert problem.startswith("model: ")
    assert "llama3_8b, llama3_debug" in problem


def test_a_class_check_of_its_own_is_told_with_its_section() -> None:
    sources = [SOURCE | {"weight": 0.0}]
    assert problems(tree({"data": MIXTURE | {"sources": sources}})) == ("data: weights must add up to more than 0",)


def test_all_problems_of_all_sections_come_at_once_and_none_twice() -> None:
    sources = [SOURCE, SOURCE | {"pth": "b"}, SOURCE | {"weight": "heavy"}]
    config = tree({"sed": 1, "seed": 0.5, "data": MIXTURE | {"sources": sources}}, n_layer=3, tied="yes")
    assert problems(config) == (
        "sed: no such section; did you mean seed?",
        "seed: 0.5 is not a whole number",
        "model.tied: 'yes' is not true or false",
        "model.n_layer: no such key; did you mean n_layers?",
        "data.sources.1.pth: no such key; did you mean path?",
        "data.sources.2.weight: 'heavy' is not a number",
    )


def test_problems_of_the_whole_are_told_beside_those_of_its_parts() -> None:
    config = tree({"data": MIXTURE | {"held_out": SOURCE | {"weight": "x"}, "held": 1}})
    assert problems(config) == (
        "data.held_out.weight: 'x' is not a number",
        "data.held: no such key; did you mean held_out?",
    )


def test_where_there_is_nothing_to_choose_from_no_list_is_begun() -> None:
    """As of fault_tolerance=none over an experiment that sets keys of the section."""
    assert unknown("groups", [], "key") == "no such key; there are none here"


def test_a_file_without_a_class_is_named_with_what_it_was_meant_to_build_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was offered among the options to choose from."""
    network = {"_target_": "x", "n_layers": 2, "n_heads": 4}
    whole = {"large": network | {"dropout": 0.1}, "noun": network | {"dropout": 0.1}, "other": {"_target_": "y"}}
    mine = {"n_heads": 8, "dropout": 0.0}
    monkeypatch.setattr("src.config.build.with_target", lambda _: (whole, {"mine": mine, "his": {"tied": True}}))
    (said,) = problems(tree() | {"model": mine})
    assert said == "model: no _target_ in this group; begin conf/model/mine.yaml with 'defaults: [noun, _self_]'"
    (said,) = problems(tree() | {"model": {"n_heads": 9}})
    assert said == "model: no _target_ in this group; choose one with model=... (large, noun, other)"


@pytest.mark.parametrize("group", SECTIONS)
def test_every_option_of_ours_names_a_class(group: str) -> None:
    whole, broken = with_target(group)
    assert list(whole) == options(group)
    assert broken == {}
