"""Where the time went, on runs whose every second is known."""

import json
from pathlib import Path
from typing import Any

import pytest

from src.metrics.goodput import Goodput, Span, goodput


def life(attempt: int, began: float, first: int, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An attempt whose process started at `began`, opened its tracker after 4 s and ended its first step after 10 s."""
    start = {"attempt": attempt, "time": began + 4, "event": "start"}
    told = {"startup/total_seconds": 10.0, "startup/compile_seconds": 3.0, "step": first}
    step = {"step": first, "step_seconds": 5.0, "data_seconds": 0.5}
    return [start, *({"attempt": attempt, "time": began + 10} | each for each in (told, step)), *records]


def steps(attempt: int, time: float, step: int, **more: float) -> dict[str, Any]:
    return {"attempt": attempt, "time": time, "step": step, "step_seconds": 2.0, "data_seconds": 0.25, **more}


def write(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_one_attempt(tmp_path: Path) -> None:
    saved = {"attempt": 1, "time": 134.0, "step": 11, "checkpoint/stall_seconds": 4.0}
    write(tmp_path, life(1, 100.0, 1, [steps(1, 130.0, 11), saved]))
    found = goodput(tmp_path, [Span(98.0, 140.0)], submitted=90.0)
    assert found == Goodput(useful=17.5, restart=9.0, compile=3.0, checkpoint=4.0, data=2.5, other=6.0, queue=8.0)
    assert (found.total, found.share) == (50.0, 17.5 / 50.0)


def test_steps_done_again_are_not_useful(tmp_path: Path) -> None:
    """The first attempt reached step 21 and died; the second goes on from a checkpoint of step 14."""
    first = life(1, 100.0, 1, [steps(1, 130.0, 11), steps(1, 150.0, 21)])
    second = life(2, 200.0, 15, [steps(2, 222.0, 21)])
    write(tmp_path, first + second)
    found = goodput(tmp_path, [Span(100.0, 155.0), Span(200.0, 222.0)], submitted=100.0)
    again = 7  # steps 15 to 21
    assert found.useful == pytest.approx((20 - again + 6) * 1.75)
    assert found.restart == pytest.approx(7.0 + 7.0 + again * 2.0)
    assert found.data == pytest.approx((20 - again + 6) * 0.25)
    assert found.queue == 45.0
    assert found.total == pytest.approx(122.0)


def test_attempts_that_never_took_a_step_and_those_that_nobody_noted(tmp_path: Path) -> None:
    write(tmp_path, life(1, 100.0, 1, [steps(1, 130.0, 11)]))
    died = goodput(tmp_path, [Span(50.0, 60.0), Span(99.0, None)], submitted=50.0)
    assert (died.restart, died.queue, died.total) == (10.0 + 8.0, 39.0, 80.0)
    assert goodput(tmp_path).total == 30.0
    assert goodput(tmp_path / "nothing") == Goodput()
    assert goodput(tmp_path / "nothing").share is None
