"""Every option of every group composes, names a class and fills it; every experiment is well formed."""

import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf, open_dict
from pydantic import BaseModel

from src.config.build import Top, build
from src.config.composition.command_line import arguments
from src.config.composition.composer import Composer, composer
from src.config.composition.resolution import resolve
from src.config.groups import CONF, EXPERIMENT, GROUPS, SECTIONS, options
from src.config.tree import Tree
from src.tasks.source import completed

CHOICES = [f"{group}={option}" for group in SECTIONS for option in options(group)]
EXPERIMENTS = options(EXPERIMENT)
KEYWORDS = {"override", "optional"}


@cache
def composed(*overrides: str) -> Tree:
    """The tree that launch.py would get; what a user must pass is "x". Tests that ask for the same share one."""
    cfg = deepcopy(shared().compose(arguments(overrides)))
    with open_dict(cfg):
        del cfg["hydra"]
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, "x")
    return resolve(cfg)


@cache
def shared() -> Composer:
    """It needs nothing of Hydra's global state once it is made."""
    with composer() as one:
        return one


def offered(choice: str) -> Tree:
    """The tree with this option of a group, and with some of the others: one composition serves an option of each."""
    group, _, option = choice.partition("=")
    number = options(group).index(option)
    chosen = {each: options(each)[min(number, len(options(each)) - 1)] for each in SECTIONS}
    recipe = "debug" if chosen["task"] == "pretrain" else "none"  # whose values would stand in other options, too
    return composed(*(f"{each}={name}" for each, name in chosen.items()), f"recipe={recipe}")


def made(choice: str) -> BaseModel:
    """The object of one option, built without the other sections."""
    group = choice.partition("=")[0]
    tree = {key: value for key, value in offered(choice).items() if key == group or key in Top.model_fields}
    section = build(tree, sections=(group,))[group]
    assert isinstance(section, BaseModel)
    return section


@cache
def default() -> Tree:
    return composed()


def parsed(file: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(file.read_text())
    assert isinstance(loaded, dict)
    return loaded


def defaults(file: Path) -> list[Any]:
    return list(parsed(file).get("defaults", []))


def test_the_groups_are_those_of_the_code() -> None:
    listed = [next(iter(entry)) for entry in defaults(CONF / "config.yaml") if isinstance(entry, dict)]
    groups = [each for each in listed if not each.startswith("override")]
    assert sorted(groups) == sorted(GROUPS)
    # A task without data chooses recipe=none, else a model its own, which chooses options of the groups before it:
    # Hydra asks the last of the list first.
    assert groups[-4:] == ["recipe", "model", "task", "experiment"]
    assert sorted(folder.name for folder in CONF.iterdir() if folder.is_dir()) == sorted(GROUPS)
    assert set(parsed(CONF / "config.yaml")) - {"defaults", "hydra"} == set(Top.model_fields)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_option_builds_and_no_key_hides_in_the_code(choice: str) -> None:
    """A key with a default in Python could not be set without `+`: so no field has one, and conf/ lists all."""
    hidden = {
        key for cls in classes(made(choice)) for key, field in cls.model_fields.items() if not field.is_required()
    }
    assert hidden == set()


def classes(value: object) -> set[type[BaseModel]]:
    if isinstance(value, BaseModel):
        return {type(value)}.union(*(classes(getattr(value, key)) for key in type(value).model_fields))
    if isinstance(value, dict):
        value = tuple(value.values())
    return set().union(*map(classes, value)) if isinstance(value, list | tuple) else set()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds(experiment: str) -> None:
    text = [f"data.files={CONF.parent / 'LICENSE'}"] if experiment == "own_text" else []
    tree = composed(f"experiment={experiment}", *text)
    build(completed(tree, {}))
    assert tree != default()
    assert EXPERIMENT not in tree


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_begins_with_its_package_and_its_command(experiment: str) -> None:
    first, second = (CONF / EXPERIMENT / f"{experiment}.yaml").read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert second.startswith("# python launch.py ")
    assert f"experiment={experiment}" in second


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_with_a_sweep_says_so(experiment: str) -> None:
    hydra = parsed(CONF / EXPERIMENT / f"{experiment}.yaml").get("hydra", {})
    assert ("params" in hydra.get("sweeper", {})) == (hydra.get("mode") == "MULTIRUN")


@pytest.mark.parametrize("file", sorted(CONF.glob("**/*.yaml")), ids=lambda file: str(file.relative_to(CONF)))
def test_defaults_lists_have_only_words_that_hydra_knows(file: Path) -> None:
    """Hydra drops an entry whose `override` or `optional` is misspelt, in silence."""
    for entry in defaults(file):
        if entry == "_self_":
            continue
        key, option = next(iter(entry.items())) if isinstance(entry, dict) else ("", entry)
        *words, group = key.split() or [""]
        assert set(words) <= KEYWORDS, entry
        group = group.partition("@")[0]
        folder = CONF / group.removeprefix("/") if words or file.parent == CONF else file.parent / group
        if option is not None and not group.startswith("hydra/"):
            assert (folder / f"{option.partition('@')[0]}.yaml").is_file(), entry


@pytest.mark.parametrize("option", options("parallel"))
def test_a_layout_is_what_its_name_says(option: str) -> None:
    degrees = {key: value for key, value in offered(f"parallel={option}")["parallel"].items() if type(value) is int}
    words = {"tp": "tensor", "fsdp": "shard", "ddp": "replicate", "cp": "context", "pp": "pipeline", "ep": "expert"}
    said: dict[str, int] = {}
    for part in option.removeprefix("async_").split("_") if option not in ("single", "auto") else []:
        if grid := re.fullmatch(r"hsdp(\d+)x(\d+)", part):
            said |= {"replicate": int(grid[1]), "shard": int(grid[2])}
        else:
            named = re.fullmatch(r"([a-z]+)(\d+)", part)
            assert named is not None, part
            said[words[named[1]]] = int(named[2])
    assert {key: value for key, value in degrees.items() if value != 1} == said


LLAMA3 = {  # dim, layers, heads, kv heads, vocabulary, multiple_of, multiplier, feed-forward width
    "llama3_debug": (256, 6, 16, 16, 2048, 256, None, 768),
    "llama3_1b": (2048, 16, 32, 8, 128256, 256, 1.5, 8192),
    "llama3_8b": (4096, 32, 32, 8, 128256, 1024, 1.3, 14336),
    "llama3_70b": (8192, 80, 64, 8, 128256, 4096, 1.3, 28672),
    "llama3_405b": (16384, 126, 128, 8, 128256, 4096, 1.2, 53248),
}
STRETCH = {"llama3_1b": (32.0, 131072), "llama3_405b": (8.0, 131072)}


@pytest.mark.parametrize("option", LLAMA3)
def test_llama3_presets_have_the_published_numbers(option: str) -> None:
    model = composed(f"model={option}")["model"]
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier")
    *numbers, width = LLAMA3[option]
    assert [model[key] for key in keys] == numbers
    before = int(2 * 4 * model["dim"] / 3)
    scaled = int(model["ffn_dim_multiplier"] * before) if model["ffn_dim_multiplier"] else before
    assert -(-scaled // model["multiple_of"]) * model["multiple_of"] == width
    factor, length = STRETCH.get(option, (None, 8192))
    assert model["max_seq_len"] == length
    assert model["rope_theta"] == 500000.0
    assert model["norm_eps"] == 1e-5
    assert model["tie_word_embeddings"] == (option == "llama3_1b")
    assert (model["rope_scaling"] or {}).get("factor") == factor
    if factor is not None:
        assert model["rope_scaling"] == {"factor": factor, "low": 1.0, "high": 4.0, "original": 8192}


def chosen(*overrides: str) -> dict[str, str]:
    """Option of each group."""
    return dict(shared().compose(arguments(overrides)).hydra.runtime.choices)


@pytest.mark.parametrize("option", options("model"))
def test_a_released_model_has_a_recipe_of_its_own_and_tasks_with_own_sizes_have_none(option: str) -> None:
    own = option not in ("auto", "llama3_debug", "deepseek_v3_debug", "qwen3_debug", "qwen3_moe_debug")
    assert chosen(f"model={option}")["recipe"] == (option if own else "debug")
    assert chosen(f"model={option}", "task=bench")["recipe"] == "none"
    if own:
        first = (CONF / f"recipe/{option}.yaml").read_text().splitlines()
        assert first[0] == "# @package _global_"


@pytest.mark.parametrize("task", [each for each in options("task") if each != "pretrain"])
def test_without_data_a_task_is_what_it_was_before_there_were_recipes(task: str) -> None:
    plain, large = composed(f"task={task}"), composed(f"task={task}", "model=llama3_8b")
    assert {key for key in plain if plain[key] != large[key]} == {"model", "name"}


RECIPES = {  # tokens of a step, of a sequence, of all steps in 10^12, peak learning rate, steps of warm-up
    "llama3_1b": (512 * 8192, 8192, 9.0, 3e-4, 8000),
    "llama3_8b": (512 * 8192, 8192, 15.0, 3e-4, 8000),
    "llama3_70b": (512 * 8192, 8192, 15.0, 1.5e-4, 8000),
    "llama3_405b": (2048 * 8192, 8192, 15.6, 8e-5, 8000),
    "deepseek_v3_16b": (4608 * 4096, 4096, 5.7, 4.2e-4, 2000),
    "deepseek_v3_236b": (9216 * 4096, 4096, 8.1, 2.4e-4, 2000),
    "deepseek_v3_671b": (15360 * 4096, 4096, 14.8, 2.2e-4, 2000),
    "qwen3_0_6b": (1024 * 4096, 4096, 30.0, 3e-4, 2000),
    "qwen3_8b": (1024 * 4096, 4096, 30.0, 3e-4, 2000),
    "qwen3_30b_a3b": (1024 * 4096, 4096, 30.0, 3e-4, 2000),
}


@pytest.mark.parametrize("option", RECIPES)
def test_recipes_have_the_published_numbers(option: str) -> None:
    tree = composed(f"model={option}")
    task, optim = tree["task"], tree["optim"]
    tokens = task["global_batch"] * task["seq_len"]
    assert (tokens, task["seq_len"], round(task["steps"] * tokens / 1e12, 1), optim["lr"]) == RECIPES[option][:4]
    assert tree["schedule"]["warmup_steps"] == RECIPES[option][4]
    assert (optim["weight_decay"], optim["max_norm"], optim["beta2"]) == (0.1, 1.0, 0.95)
    assert (tree["precision"]["compute"], tree["compile"]["blocks"], tree["recompute"]["mode"]) == (
        "bfloat16", True, "auto",
    )  # fmt: skip
    build(tree)


def test_the_command_line_beats_an_experiment_that_a_recipe_that_the_defaults() -> None:
    keys = ("task.seq_len", "task.global_batch", "optim.lr", "schedule.warmup_steps", "recompute.mode")

    def told(*overrides: str) -> list[object]:
        return [composed(*overrides)[section][key] for section, key in (each.split(".") for each in keys)]

    assert told() == [256, 16, 8e-4, 20, "none"]
    assert told("model=llama3_8b") == [8192, 512, 3e-4, 8000, "auto"]
    assert told("experiment=moe_16b") == [4096, 64, 4.2e-4, 200, "auto"]
    assert told("experiment=moe_16b", "optim.lr=1e-4", "recompute=full") == [4096, 64, 1e-4, 200, "full"]
    assert composed("model=llama3_8b", "schedule=constant")["schedule"]["decay_ratio"] == 0.0
    assert composed("model=llama3_8b", "recipe=debug")["task"] == composed()["task"]


@pytest.mark.parametrize("option", options("recipe"))
def test_a_recipe_sets_no_key_by_which_options_differ_whose_group_it_chooses(option: str) -> None:
    """It would beat the option that a command line chooses. The learning rate may: it goes with the model."""
    content = parsed(CONF / f"recipe/{option}.yaml")
    for group in ("schedule", "precision", "compile", "recompute"):
        base = {"schedule": "wsd", "precision": "fp32", "compile": "off", "recompute": "none"}[group]
        others = [each for each in options(group) if each not in (base, "decay")]  # decay is for from=, without recipes
        varied = {key for each in others for key in parsed(CONF / group / f"{each}.yaml")}
        assert not set(content.get(group, {})) & varied
