"""The loss curve holds what metrics.jsonl holds."""

import math
from pathlib import Path

import numpy
import pytest
from matplotlib.image import imread

from src.errors import FolderError
from src.metrics.curve import TRAIN, VALIDATION, plot, smoothed
from src.metrics.history import read
from src.metrics.trackers.config import Log


def write(folder: Path, points: int) -> None:
    log = Log(folder)
    for step in range(1, points + 1):
        loss = 2.2 + 3.3 * math.exp(-step / 60) + 0.06 * math.sin(step * 12.9898)
        log.record(10 * step, {"loss": loss, "tokens": 10 * step * 65536})
        if step % 20 == 0:
            log.record(10 * step, {"validation_loss": 2.25 + 3.3 * math.exp(-step / 60)})


def pixels(path: Path, colour: str) -> int:
    """How many pixels have just this colour."""
    wanted = numpy.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    picture = numpy.rint(imread(path)[..., :3] * 255).astype(int)
    return int((picture == wanted).all(axis=-1).sum())


@pytest.mark.parametrize("points", [3, 200])
def test_curve(tmp_path: Path, points: int) -> None:
    write(tmp_path, points)
    path = plot(tmp_path)
    assert path == tmp_path / "loss.png"
    assert imread(path).shape[:2] == (810, 1350)
    assert pixels(path, TRAIN) > 300
    assert (pixels(path, VALIDATION) > 100) == (points == 200)


def test_no_loss_yet(tmp_path: Path) -> None:
    Log(tmp_path).record(1, {"lr": 0.1})
    with pytest.raises(FolderError, match="holds no loss"):
        plot(tmp_path)


def test_smoothing_keeps_lines_and_skips_what_is_not_finite() -> None:
    line = [5.0 - 0.01 * step for step in range(200)]
    assert smoothed(line)[50:150] == pytest.approx(line[50:150])  # no lag
    assert smoothed([2.0] * 99 + [math.nan] + [2.0] * 99) == pytest.approx([2.0] * 199)
    noise = [(-1.0) ** step for step in range(200)]
    assert max(abs(value) for value in smoothed(noise)[10:-10]) < 0.01


def test_strange_lines_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 60)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'null\n7\n{}\n{"step": 1}\n{"attempt": "x", "step": 2}\n{"attempt": 1, "loss": 3.0}\n\xff\xfe\n')
    assert len(read(tmp_path).series["loss"].steps) == 60
