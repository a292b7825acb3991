"""The options of conf/ without Hydra: what Hydra composes, and which of them a section is."""

import pytest

from src.config.composition.command_line import typed
from src.config.composition.overrides import overrides
from src.config.groups import SECTIONS, options
from src.config.presets import defaults, nearest_option, section_of
from src.config.tree import identity, leaves_of
from src.errors import ConfigError
from tests.test_conf import composed, offered

MUST_BE_GIVEN = "???"


@pytest.mark.parametrize("number", [0, 2, 5])
def test_an_option_is_what_hydra_composes(number: int) -> None:
    """One composition serves an option of each group."""
    tree = offered(f"parallel={options('parallel')[number]}")
    for group in SECTIONS:
        option = options(group)[min(number, len(options(group)) - 1)]
        ours, theirs = leaves_of(section_of(group, option)), leaves_of(tree[group])
        given = {key for key, value in ours.items() if value == MUST_BE_GIVEN}
        assert {key: value for key, value in theirs.items() if key not in given} == {
            key: value for key, value in ours.items() if key not in given
        }
        assert nearest_option(group, tree[group])[1].keys() <= given
        assert defaults()[group] in options(group)


def test_what_differs_from_an_option_is_told_with_its_key() -> None:
    section = section_of("model", "llama3_8b") | {"rope_scaling": {"factor": 8.0}, "dim": 4608}
    assert nearest_option("model", section) == ("llama3_8b", {"rope_scaling.factor": 8.0, "dim": 4608})
    with pytest.raises(ConfigError, match="schedule=wds: no such option; there are: constant, cosine"):
        section_of("schedule", "wds")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("optim.lr", 3e-4, "0.0003"),
        ("optim.betas", [0.9, 0.95], "[0.9,0.95]"),
        ("model.rope_scaling", {"factor": 8.0, "low": None}, "{factor:8.0,low:null}"),
        ("task.deterministic", True, "true"),
        ("data.path", "a b", "'a b'"),
        ("data.path", "it's", "'it\\'s'"),
        ("data.path", "null", "'null'"),
        ("data.path", "1e3", "'1e3'"),
        ("data.path", "runs/a-1@2", "runs/a-1@2"),
        ("task.sample_prompt", "it's, all [of] it", "it's, all [of] it"),
    ],
)
def test_a_value_as_it_is_typed(key: str, value: object, text: str) -> None:
    assert typed(key, value) == text


@pytest.mark.parametrize(
    "words", [(), ("model=llama3_8b",), ("model=qwen3_8b", "optim.lr=8e-4"), ("experiment=moe_16b",)]
)
def test_a_config_with_a_recipe_is_typed_without_it(words: tuple[str, ...]) -> None:
    """Every value that a recipe decides stands in the command, so that the command is as good as the config."""
    tree = composed(*words)
    again = composed(*(f"{key}={text}" for key, text in overrides(tree).items()), f"name={tree['name']}")
    assert identity(again) == identity(tree)
    assert overrides(tree).get("recipe") == ("debug" if words else None)
