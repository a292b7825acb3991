"""Values that no run can mean are refused with the range, and paths and names that no file system takes."""

from pathlib import Path
from typing import Any

import pytest

from src.config.base import Config, Line, PathField
from src.config.bounds import Count
from src.config.build import Top, build
from src.errors import ConfigError
from tests.test_conf import composed

TOP = {"name": "a", "seed": 0, "root": "runs", "folder": None, "dry_run": False}


def said(section: str, **changes: Any) -> tuple[str, ...]:
    """What is said of one section of the defaults with these changes; nothing: it is built."""
    tree = composed()
    try:
        build(TOP | {section: tree[section] | changes}, sections=(section,))
    except ConfigError as error:
        return error.problems
    return ()


@pytest.mark.parametrize(
    ("section", "key", "value", "range_"),
    [
        ("optim", "lr", 1e300, "at least 1e-30 and at most 10"),
        ("optim", "eps", 1e300, "at least 1e-30 and at most 1"),
        ("model", "norm_eps", 1e300, "at least 1e-12 and at most 0.1"),
        ("model", "rope_theta", 1e-300, "above 1 and at most 1e+12"),
        ("model", "n_layers", 10**9, "at least 1 and at most 1000"),
        ("model", "head_dim", 0, "at least 1 and at most 1048576"),  # behind `| None`
        ("cluster", "gpu_memory_gib", 1e300, "at least 1e-06 and at most 1048576"),
        ("task", "steps", 0, "at least 1 and at most 2147483647"),
    ],
)
def test_a_number_out_of_its_range_is_told_both_ends(section: str, key: str, value: object, range_: str) -> None:
    assert said(section, **{key: value}) == (f"{section}.{key}: {value!r} is not {range_}",)


def test_what_people_train_with_is_inside() -> None:
    assert said("optim", lr=1e-7, eps=1e-15, max_norm=1e5, weight_decay=10.0) == ()
    assert said("model", n_layers=126, dim=16384, n_heads=128, n_kv_heads=8, rope_theta=5e8, norm_eps=1e-5) == ()


def test_a_layout_of_more_ranks_than_there_are_machines() -> None:
    (problem,) = said("parallel", shard=65536, tensor=1024)
    assert problem == "parallel: shard=65536 * tensor=1024 are 67108864 ranks; at most 1048576"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "root: '' is empty; it must name a file or folder"),
        (" ", "root: ' ' is empty; it must name a file or folder"),
        ("a\nb", r"root: 'a\nb' holds a line break or another control character, '\n'; leave it out"),
        ("a\0b", r"root: 'a\x00b' holds a line break or another control character, '\x00'; leave it out"),
        ("a\udcffb", r"root: 'a\udcffb' is not UTF-8; give it a name that is"),
        ("ü" * 128, f"root: '{'ü' * 40}'... is too long: at most 255 bytes between two / and 4095 in all"),
        ("~nobody-of-this-name/x", "root: '~nobody-of-this-name/x': ~nobody-of-this-name is nobody's home; "),
        (3, "root: 3 is not a path"),
    ],
)
def test_a_path_that_no_file_has(value: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(TOP | {"root": value}, sections=())
    (problem,) = caught.value.problems
    assert problem.startswith(words)


def test_a_home_is_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert build(TOP | {"root": "~/runs", "folder": "/a~b"}, sections=()) == TOP | {
        "root": Path("/home/me/runs"),
        "folder": Path("/a~b"),
    }


def test_a_name_leaves_room_for_what_is_added_to_it() -> None:
    assert Top(**TOP | {"name": "x" * 160}).name == "x" * 160
    with pytest.raises(
        ConfigError, match=r"^name: '(x{40})'\.\.\. is too long for a folder's name; at most 160 bytes$"
    ):
        build(TOP | {"name": "x" * 300}, sections=())


class Kinds(Config):
    path: PathField | None
    line: Line | None
    count: Count | None


def test_null_stays_null() -> None:
    assert Kinds(path=None, line=None, count=None).model_dump() == {"path": None, "line": None, "count": None}


@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint", "exclude", "python"])
@pytest.mark.parametrize("value", ["a\nb", "", "a\x1b[0m"])
def test_what_goes_into_a_batch_script_is_one_line(key: str, value: str) -> None:
    tree = composed("cluster=slurm")
    with pytest.raises(ConfigError, match=rf"^cluster\.{key}: "):
        build(TOP | {"cluster": tree["cluster"] | {key: value}}, sections=("cluster",))
