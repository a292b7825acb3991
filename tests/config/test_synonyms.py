"""Words of other repositories are answered with ours."""

import re
from functools import cache

import pytest

from src.config.build import build
from src.config.groups import SECTIONS, options
from src.config.synonyms import FOLLOWS, SYNONYMS, ours
from src.config.tree import Tree
from src.errors import ConfigError
from tests.test_conf import composed

# Where a word of ours may only stand in some option of a group.
HOMES = ("model=llama3_debug", "model=deepseek_v3_debug", "data=text", "cluster=slurm", "optim=adamw")


@cache
def trees() -> tuple[Tree, ...]:
    """Configs that together have every key that a synonym stands for."""
    return tuple(composed(each, *(("data.files=a.txt",) if each == "data=text" else ())) for each in HOMES)


def has(tree: Tree, key: str) -> bool:
    value: object = tree
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def answer(tree: Tree, section: str | None, word: str) -> str:
    """What is said of `section.word=1`, or of `word=1`."""
    inner = {word: 1} if section is None else {section: tree[section] | {word: 1}}
    with pytest.raises(ConfigError) as caught:
        build(tree | inner)
    (said,) = (line for line in caught.value.problems if line.startswith(f"{section}.{word}: " if section else word))
    return said


def test_there_are_enough_and_none_is_a_word_of_ours() -> None:
    assert len(SYNONYMS) >= 100
    assert not [word for word in SYNONYMS if any(has(tree, word) for tree in trees()) or word in SECTIONS]


@pytest.mark.parametrize("word", SYNONYMS)
def test_a_word_of_another_repository_is_answered_with_ours(word: str) -> None:
    meant = SYNONYMS[word]
    group, chosen, option = meant.partition("=")
    if chosen:
        assert option in options(group)
    else:
        assert any(has(tree, meant) for tree in trees())
    assert answer(trees()[0], None, word) == f"{word}: no such section; did you mean {meant}?"
    section = meant.partition("=")[0].partition(".")[0]
    if section in SECTIONS:
        said = answer(trees()[0], section, word)
        assert said in {
            f"{section}.{word}: no such key; did you mean {each}?" for each in (meant, meant.split(".")[-1])
        }


def test_sections_case_and_dashes_of_others_do_not_matter() -> None:
    assert ours("parallelism.Tensor-Parallel-Degree") == ours("TP") == "parallel.tensor"
    assert ours("parallel.tensr") is None
    tree = trees()[0] | {"training": {"max_steps": 5}}
    with pytest.raises(ConfigError, match=r"^training: no such section; did you mean task\.steps\?$"):
        build(tree)


@pytest.mark.parametrize("word", FOLLOWS)
def test_what_follows_from_other_keys_is_answered_with_them(word: str) -> None:
    assert not has(trees()[3], f"cluster.{word}")
    assert word not in SYNONYMS
    for section in ("cluster", None):
        said = answer(trees()[3], section, word)
        assert said.endswith(f"; it {FOLLOWS[word]}")
    named = re.findall(r"\w+\.\w+", FOLLOWS[word])
    assert all(has(trees()[3], key) for key in named), named


def test_a_flag_of_a_scheduler_is_answered_in_its_spelling() -> None:
    said = answer(trees()[3], "cluster", "ntasks-per-node")
    assert said == (
        "cluster.ntasks-per-node: no such key; it follows from the layout: parallel=, parallel.shard and the other "
        "degrees, or the gpus of parallel=auto, over cluster.gpus_per_node"
    )
