"""--help: short, complete, and what it says of keys is what the classes and conf/ say."""

import pytest

from src.config.groups import EXPERIMENT, GROUPS, RECIPE, options
from src.config.presets import section_of
from src.config.reference.help import help_of
from src.config.reference.keys import INDENT, WIDTH, keys, kinds, top_keys
from src.config.reference.options import ABOUT_GROUPS, LONGEST, about, listed
from src.config.tree import leaves_of
from src.errors import ConfigError

OPTIONS = [(group, option) for group in ABOUT_GROUPS for option in options(group)]


@pytest.mark.parametrize("group", ABOUT_GROUPS)
def test_every_option_says_what_it_is_in_half_a_line(group: str) -> None:
    said = [about(group, option) for option in options(group)]
    assert [each for each in said if not 4 <= len(each) <= LONGEST or "first file of the" in each] == []
    assert len(set(said)) == len(said), "two options say the same"


def test_an_option_without_a_comment_says_its_keys() -> None:
    assert about("parallel", "tp2_fsdp4") == "8 ranks: tensor=2 shard=4"
    assert about("model", "llama3_1b") == "Llama 3.2 1B"
    assert listed("compile", ["off"]) == ["  off  Eager: nothing is compiled"]
    assert listed("model", ["mine"]) == ["  mine"], "an option of another folder of conf"


def test_help_without_a_word_is_one_screen() -> None:
    lines = help_of(["--help"]).splitlines()
    assert len(lines) <= 48
    assert [line for line in lines if len(line) > WIDTH] == []
    assert {name for name in GROUPS if any(line.startswith(f"  {name} ") for line in lines)} == set(GROUPS)
    assert set(ABOUT_GROUPS) == {*GROUPS, "data/source"}


def test_help_of_a_group_lists_options_and_keys() -> None:
    said = help_of(["--help", "optim"]).splitlines()
    assert said[0].startswith("optim: ")
    assert [line for line in said if line.startswith("  ") and not line.startswith(INDENT)] == listed("optim")
    assert "optim.lr=0.0008" in said
    assert "keys of optim=adamw, the default (AdamW):" in said
    assert "optim.row_beta=null" in said, "each class of the group has its keys"
    assert [line for line in said if len(line) > WIDTH] == []


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("word", [[], ["model"], ["task"], ["data"], ["cluster=slurm"], ["vocab_size"]])
def test_help_is_no_wider_than_the_terminal(word: list[str], width: int) -> None:
    """Lines break between words and go on below their column, with every word of a wide one."""
    said, wide = help_of(["--help", *word], width), help_of(["--help", *word], 1000)
    assert [line for line in said.splitlines() if len(line) > width] == []
    assert said.split() == wide.split()


def test_help_of_an_option_has_its_values() -> None:
    assert "model.n_layers=32" in help_of(["model=llama3_8b", "-h"]).splitlines()


def test_help_of_a_key() -> None:
    assert help_of(["--help", "task.seq_len"]).splitlines() == [
        "task.seq_len=256",
        "    Tokens per sequence",
        "    whole number, 1 to 2^24, in tokens",
        "    elsewhere: 128 (verify)",
        "    read by src.tasks.pretrain.config.Pretrain",
    ]
    named = help_of(["--help", "vocab_size"])
    assert "model.vocab_size=2048" in named
    assert "tokenizer.vocab_size=8192" in named
    assert "rope_scaling.factor" in help_of(["--help", "model.rope_scaling.factor"])
    assert "moe.num_experts=8" in help_of(["--help", "num_experts"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("block_size", "block_size: no such group or key; did you mean task.seq_len?"),
        ("optimm", "optimm: no such group or key; did you mean optim?"),
        ("task.seqlen", "task.seqlen: no such group or key; did you mean task.seq_len?"),
        ("model=llama", "model=llama: no such option; there are:\n  auto "),
    ],
)
def test_help_of_nothing_names_what_is_near(word: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        help_of(["--help", word])
    assert caught.value.problems[0].startswith(said)


@pytest.mark.parametrize("group", [group for group in GROUPS if group not in (RECIPE, EXPERIMENT)])
def test_every_key_of_conf_is_listed_with_its_value(group: str) -> None:
    for option in options(group):
        shown = {key.name.removeprefix(f"{group}."): key for key in keys(group, option)}
        there = {key for key in leaves_of(section_of(group, option)) if not key.endswith("_target_")}
        lost = {key for key in there if key not in shown and not key.startswith(("sources.", "weights."))}
        assert {key for key in lost if not any(key.startswith(f"{each}.") for each in shown)} == set()
        assert all(key.meaning and key.kind for key in shown.values())
    assert sorted(name for names in kinds(group).values() for name in names) == options(group)


def test_the_top_keys_are_there() -> None:
    assert {key.name for key in top_keys()} >= {"name", "seed", "root", "folder", "dry_run"}
