"""Where the time went, on runs whose every second is known."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from src.metrics.goodput import Goodput, Meter, goodput
from src.metrics.trackers.config import Log


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


def note(folder: Path, *attempts: tuple[float, float | None], submitted: float | None = None) -> None:
    """What launchers leave in a run folder."""
    lines = []
    for number, (started, ended) in enumerate(attempts, 1):
        lines.append({"number": number, "started": moment(started)})
        if ended is not None:
            lines.append({"number": number, "ended": "failed", "detail": f"{moment(ended)} rank 0: dead"})
    (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if submitted is not None:
        (folder / "slurm.jsonl").write_text(json.dumps({"job": "7", "submitted": submitted}) + "\n")


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def test_one_attempt(tmp_path: Path) -> None:
    saved = {"attempt": 1, "time": 134.0, "step": 11, "checkpoint/stall_seconds": 4.0}
    write(tmp_path, life(1, 100.0, 1, [steps(1, 130.0, 11), saved]))
    note(tmp_path, (98.0, 140.0), submitted=90.0)
    found = goodput(tmp_path)
    assert found == Goodput(useful=17.5, start=9.0, compile=3.0, checkpoint=4.0, data=2.5, other=6.0, queue=8.0)
    assert (found.total, found.share) == (50.0, 17.5 / 50.0)


def test_steps_done_again_are_not_useful(tmp_path: Path) -> None:
    """The first attempt reached step 21 and died; the second goes on from a checkpoint of step 14."""
    first = life(1, 100.0, 1, [steps(1, 130.0, 11), steps(1, 150.0, 21)])
    second = life(2, 200.0, 15, [steps(2, 222.0, 21)])
    write(tmp_path, first + second)
    note(tmp_path, (100.0, 155.0), (200.0, 222.0))
    found = goodput(tmp_path, submitted=100.0)
    again = 7  # steps 15 to 21
    assert found.useful == pytest.approx((20 - again + 6) * 1.75)
    assert found.start == 7.0
    assert found.restart == pytest.approx(7.0 + again * 2.0)
    assert found.data == pytest.approx((20 - again + 6) * 0.25)
    assert (found.queue, found.idle) == (0.0, 45.0), "started by hand, twice"
    assert found.total == pytest.approx(122.0)


def test_attempts_that_never_took_a_step_and_those_that_nobody_noted(tmp_path: Path) -> None:
    write(tmp_path, life(1, 100.0, 1, [steps(1, 130.0, 11)]))
    assert goodput(tmp_path).total == 30.0
    note(tmp_path, (50.0, 60.0), (99.0, None))
    died = goodput(tmp_path, submitted=50.0)
    assert (died.start, died.restart, died.idle, died.total) == (10.0, 8.0, 39.0, 80.0)
    assert goodput(tmp_path / "nothing") == Goodput()
    assert goodput(tmp_path / "nothing").share is None


def test_who_is_waited_for(tmp_path: Path) -> None:
    """A scheduler, which starts again by itself, then a person, who submits once more, then the scheduler."""
    lines = [
        {"number": number, "started": moment(began), "job": job} | {"ended": "failed", "detail": f"{moment(ended)} x"}
        for number, (began, ended, job) in enumerate([(100, 110, "7"), (130, 140, "7"), (190, 200, "8")], 1)
    ]
    (tmp_path / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asks = [{"job": "7", "submitted": 90.0}, {"job": "8", "submitted": 175.0}]
    (tmp_path / "slurm.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asks))
    found = goodput(tmp_path)
    assert (found.queue, found.idle) == (10.0 + 20.0 + 15.0, 35.0)
    assert (found.start, found.restart, found.total) == (10.0, 20.0, 110.0)


def test_the_meter_says_at_every_line_what_the_folder_says(tmp_path: Path) -> None:
    """Three attempts: one that took steps, one that never did, one that takes some of the first one's steps again."""
    first = life(1, 100.0, 1, [steps(1, 130.0, 11), steps(1, 150.0, 21)])
    saved = {"attempt": 3, "time": 320.0, "step": 17, "checkpoint/stall_seconds": 4.0}
    third = life(3, 300.0, 15, [steps(3, 314.0, 17), saved, steps(3, 330.0, 21)])
    note(tmp_path, (100.0, 155.0), (200.0, 205.0), (300.0, None), submitted=90.0)
    write(tmp_path, [*first, third[0]])
    meter = Meter(tmp_path, 3, 304.0)
    told = []
    for index, line in enumerate(third[1:], 2):
        told.append(meter.metrics(line))
        write(tmp_path, [*first, *third[:index]])
        if "step_seconds" in line:
            own = {key: value for key, value in told[-1].items() if key != "goodput/interruption_seconds"}
            assert own == pytest.approx(goodput(tmp_path).metrics())
        else:
            assert told[-1] == {}
    assert told[1]["goodput/interruption_seconds"] == 160.0, "from second 150 to second 310"
    assert "goodput/interruption_seconds" not in told[2]
    assert (told[-1]["goodput/queue_seconds"], told[-1]["goodput/idle_seconds"]) == (10.0, 45.0 + 95.0)
    assert meter.last(330.0) == pytest.approx(goodput(tmp_path).metrics())


def test_the_log_writes_the_account_beside_the_steps_and_at_the_end(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.record(1, {"startup/total_seconds": 2.0, "startup/compile_seconds": 0.5})
    log.record(1, {"loss": 3.0, "step_seconds": 1.0, "data_seconds": 0.1})
    log.record(5, {"loss": 2.0, "step_seconds": 1.0, "data_seconds": 0.1})
    log.finish("done")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("goodput/useful_seconds") for line in lines] == [None, None, 0.0, 3.6, 3.6, None]
    assert lines[3]["goodput/data_seconds"] == pytest.approx(0.4)
    assert (lines[4]["step"], lines[5]["event"]) == (5, "finish")
