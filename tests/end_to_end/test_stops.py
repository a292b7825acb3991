"""A signal at any moment: all ranks save and leave well, and the same command ends with the same losses."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.lives import Shot, live, opened, records, series, values
from tests.ranks import RankPool

Straight = Callable[[str], Path]


@pytest.mark.parametrize(
    ("shot", "step"),
    [
        (Shot("step", signal.SIGTERM, at=6, rank=1), 7),  # the vote of rank 1 is counted with the next step
        (Shot("step", signal.SIGINT, at=12, rank=1), 12),
        (Shot("validation", signal.SIGINT, at=2, rank=1), 4),
        (Shot("start", signal.SIGTERM, rank=1), 0),
    ],
    ids=["training", "last step", "validation", "before the first step"],
)
def test_ranks_agree_save_and_go_on(
    shot: Shot, step: int, text: tuple[str, ...], straight: Straight, ranks: RankPool
) -> None:
    name = f"name=stopped_{shot.where}_{shot.at}"
    argv = (*text, "parallel=fsdp2", name, "task.validate_every=4", "task.validate_samples=6")
    folder = opened(*argv)
    assert ranks(2, live, folder, shot) == [False] * 2  # also in the last step: its validation is to come
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints[-1:] == ([f"step_{step:08d}"] if step > 0 else [])
    assert step == 0 or values(folder, step)["position"] == 4 * step
    opened(*argv)
    assert ranks(2, live, folder) == [True] * 2
    assert series(folder) == series(straight("fsdp2"))
    assert list(series(folder, "validation_loss")) == [4, 8, 12], "one that was cut off is made good"


def test_nothing_to_save_is_said(text: tuple[str, ...], ranks: RankPool, capfd: pytest.CaptureFixture[str]) -> None:
    ranks.close()  # new workers write to this test's terminal
    folder = opened(*text, "checkpoint.every=null", "name=unsaved")
    assert ranks(1, live, folder, Shot("step", at=3)) == [False]
    assert "stopped after step 4; nothing was saved: checkpoint.every=null" in capfd.readouterr().out
    assert list((folder / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("at", [1, 8])
def test_a_validation_that_a_stop_cut_off_is_made_good(text: tuple[str, ...], ranks: RankPool, at: int) -> None:
    """In the validation of step 3, or in that of step 6: the same points with the same bits as undisturbed."""
    argv = (*text, "task.steps=9", "task.validate_every=3", "task.validate_samples=6", "checkpoint.every=2")
    calm = opened(*argv, "name=calm")
    assert ranks(1, live, calm) == [True]
    folder = opened(*argv, f"name=cut-{at}")
    assert ranks(1, live, folder, Shot("validation", at=at)) == [False]
    cut = 3 if at == 1 else 6
    assert cut not in series(folder, "validation_loss"), "the stop fell into it"
    assert ranks(1, live, opened(*argv, f"name=cut-{at}")) == [True]
    assert list(series(calm, "validation_loss")) == [3, 6, 9]
    assert series(folder, "validation_loss") == series(calm, "validation_loss")
    lines = [line["step"] for line in records(folder) if "validation_loss" in line]
    assert lines == [3, 6, 9], "each once"
