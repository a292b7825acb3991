"""The section `checkpoint` and the files of its group."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from src.checkpoint.config import Checkpoint
from src.checkpoint.folder import Marker, step_folder, write_marker
from tests.checkpoint.options import CONF, options, problems, values


def put(checkpoints: Path, step: int) -> Path:
    path = step_folder(checkpoints, step)
    path.mkdir(parents=True)
    write_marker(path, Marker(step, "2", {}, {}))
    return path


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_file_of_the_group_builds(name: str) -> None:
    assert options(name).model_dump().keys() == values("every_500").keys() - {"_target_"}


def test_first_file_lists_every_key() -> None:
    assert set(values("every_500")) == {"_target_", *Checkpoint.model_fields}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": 1}, "greater than or equal to 2"),
        ({"keep": 0}, "greater than or equal to 2"),
        ({"every": 0}, "greater than or equal to 1"),
        ({"every": "10"}, "valid integer"),
        ({"verify": "fast"}, "'full' or 'size'"),
        ({"keep_every": 1200}, "keep_every=1200 is not a multiple of every=500 (1000 is)"),
        ({"keep_every": 100}, "keep_every=100 is not a multiple of every=500 (500 is)"),
        ({"every": None, "keep_every": 1000}, "keep_every=1000 keeps nothing while every=null"),
        ({"evry": 3}, "Extra inputs are not permitted"),
    ],
)
def test_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        options(**changes)
    assert words in str(caught.value)


def test_due() -> None:
    every_3 = options(every=3)
    assert [step for step in range(1, 11) if every_3.due(step, last=step == 10)] == [3, 6, 9, 10]
    never = options("none")
    assert not any(never.due(step, last=step == 10) for step in range(1, 11))


def test_origin_prefers_the_run_s_own(tmp_path: Path) -> None:
    own, other = tmp_path / "own" / "checkpoints", tmp_path / "other" / "checkpoints"
    put(other, 5)
    newest = put(other, 70)
    assert options().origin(own) is None
    for initial in (newest, tmp_path / "other", other):
        assert options(initial=str(initial)).origin(own) == newest
    mine = put(own, 10)
    assert options(initial=str(other)).origin(own) == mine


def test_origin_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    own, other = tmp_path / "own" / "checkpoints", tmp_path / "other" / "checkpoints"
    newest = put(other, 70)
    assert options(initial=str(newest)).origin(own) == newest

    half = step_folder(other, 80)
    half.mkdir()
    (unfinished,) = problems(options(initial=str(half)).origin, own)
    assert f"{half}: has no COMPLETE.json" in unfinished
    assert str(newest) in unfinished

    (absent,) = problems(options(initial=str(tmp_path / "nowhere")).origin, own)
    assert absent == f"checkpoint.initial={tmp_path / 'nowhere'}: does not exist"
    (empty,) = problems(options(initial=str(tmp_path)).origin, own)
    assert "neither a folder step_XXXXXXXX nor a run folder with a complete checkpoint" in empty
