"""Resolving, hashing, comparing and storing a run's config."""

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from src.config.composition.resolution import resolve
from src.config.tree import SITE, difference, identity, read, read_section, write
from src.errors import ConfigError


def tree(**changes: Any) -> dict[str, Any]:
    return {
        "name": "a",
        "seed": 0,
        "root": "runs",
        "folder": None,
        "dry_run": False,
        "optim": {"lr": 0.0003, "betas": [0.9, 0.95]},
        "cluster": {"gpus": None},
        "tracker": {"wandb": False},
    } | changes


def test_resolve_gives_plain_data_with_references_followed() -> None:
    resolved = resolve(OmegaConf.create({"a": {"b": 1e-4, "c": [1, "${a.b}"]}, "d": "x_${a.b}", "e": None}))
    assert resolved == {"a": {"b": 0.0001, "c": [1, 0.0001]}, "d": "x_0.0001", "e": None}
    assert type(resolved["a"]) is dict
    assert type(resolved["a"]["c"]) is list


def test_resolve_tells_every_missing_value_and_dangling_reference_at_once() -> None:
    cfg = OmegaConf.create(
        {"cluster": {"partition": "???", "account": None}, "a": ["${nowhere.b}"], "b": "${cluster.account}", "c": "???"}
    )
    with pytest.raises(ConfigError) as caught:
        resolve(cfg)
    assert caught.value.problems == (
        "cluster.partition: missing; pass cluster.partition=...",
        "a.0: ${nowhere.b} cannot be resolved (Interpolation key 'nowhere.b' not found)",
        "c: missing; pass c=...",
    )


def test_identity_is_short_and_stable() -> None:
    assert re.fullmatch("[0-9a-f]{8}", identity(tree()))
    assert identity({"b": 1, "a": {"d": 2, "c": 3}}) == identity({"a": {"c": 3, "d": 2}, "b": 1})
    assert identity({"a": 1}) == "015abd7f"  # sha256 of {"a":1}: folders of older runs must stay found


@pytest.mark.parametrize("key", sorted(SITE))
def test_identity_and_difference_ignore_where_a_run_happens(key: str) -> None:
    moved = tree(**{key: "elsewhere"})
    assert identity(moved) == identity(tree())
    assert difference(tree(), moved) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optim": {"lr": 0.001, "betas": [0.9, 0.95]}}, "optim.lr: 0.0003 -> 0.001"),
        ({"optim": {"lr": 0.0003, "betas": [0.9, 0.99]}}, "optim.betas.1: 0.95 -> 0.99"),
        ({"seed": None}, "seed: 0 -> null"),
        ({"seed": False}, "seed: 0 -> false"),
        ({"more": "x"}, 'more: absent -> "x"'),
        ({"optim": {"lr": 0.0003}}, "optim.betas.0: 0.9 -> absent"),
    ],
)
def test_difference_names_each_changed_key_and_goes_with_identity(changes: dict[str, Any], line: str) -> None:
    assert line in difference(tree(), tree(**changes))
    assert identity(tree()) != identity(tree(**changes))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    awkward = tree(text="1e-4", umlaut="ü: #", small=1e-30, flag="off", empty={}, none="null", dollar="${a}")
    write(tmp_path / "config.yaml", awkward)
    assert read(tmp_path / "config.yaml") == awkward
    assert list(read(tmp_path / "config.yaml")) == list(awkward)


@pytest.mark.parametrize("text", ["a: [1", "just text", ""])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        read(file)
    with pytest.raises(ConfigError, match="gone"):
        read(tmp_path / "gone.yaml")


def test_a_section_is_read_as_the_whole_tree_has_it(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    written = tree(
        task={"text": "a\nb: c\n\n d", "files": ["x", "y"]}, names=["p", "q"], after={"n": None}, last="z: 'é"
    )
    write(file, written)
    assert {key: read_section(file, key) for key in written} == read(file) == written
    assert read_section(file, "optim.lr") is None
    file.write_text("model: {tied_embeddings: true, moe: null}\n")
    assert read_section(file, "model") == read(file)["model"] == {"tie_word_embeddings": True, "moe": None}
    with pytest.raises(ConfigError, match="cannot be read as a config"):
        read_section(tmp_path / "gone.yaml", "model")
