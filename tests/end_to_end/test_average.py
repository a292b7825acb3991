"""A run that keeps a moving average of its weights: killed and resumed, validated, exported."""

import signal
from pathlib import Path

import pytest
import torch

from tests.end_to_end.lives import Shot, contents, live, opened, series
from tests.end_to_end.test_weights import exported, weights
from tests.ranks import RankError, RankPool

EMA = ("task.ema_decay=0.8", "task.steps=6", "task.validate_every=3", "checkpoint.every=2", "parallel=single")


def test_killed_and_resumed_it_is_the_straight_run_s_and_goes_out(
    text: tuple[str, ...], ranks: RankPool, tmp_path: Path
) -> None:
    straight, killed = (opened(*text, *EMA, f"name={name}") for name in ("straight_ema", "killed_ema"))
    assert ranks(1, live, straight) == [True]
    with pytest.raises(RankError, match="died of SIGKILL"):
        ranks(1, live, killed, Shot("step", signal.SIGKILL, at=6, saved=4, told=5))
    assert ranks(1, live, killed) == [True]
    assert contents(killed, 6) == contents(straight, 6)
    smoothed = series(straight, "validation_loss_ema")
    assert series(killed, "validation_loss_ema") == smoothed
    assert list(smoothed) == [3, 6]
    assert all(smoothed[step] != loss for step, loss in series(straight, "validation_loss").items())
    exported(ranks, straight, "ema=true", f"to={tmp_path / 'ema'}", "task.check=false")
    exported(ranks, straight, f"to={tmp_path / 'last'}", "task.check=false")
    averages, last = weights(tmp_path / "ema"), weights(tmp_path / "last")
    assert averages.keys() == last.keys()
    assert not any(torch.equal(each, last[name]) for name, each in averages.items())
