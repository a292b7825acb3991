"""Who records the steps of a run, where a group that was to record them may have died."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from src.checkpoint.store import SavedCheckpoint, Store
from src.errors import DiskFaultError
from src.metrics.console import Console
from src.train.loop import Loop
from src.train.report import Report, SaveReport
from src.train.setup import Training


class Log:
    """A tracker that keeps metrics.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "metrics.jsonl"

    def record(self, step: int, values: Mapping[str, float]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def finish(self, status: str) -> None:
        return None


class Lines(list[int]):
    """A console: the steps that a person read."""

    def record(self, step: int, _: Mapping[str, float]) -> None:
        self.append(step)


def report(folder: Path) -> tuple[Report, Lines]:
    lines = Lines()
    return Report(None, cast(Console, lines), folder, lambda: Log(folder)), lines  # type: ignore[arg-type,return-value]


def recorded(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_who_comes_to_lead_records_what_the_last_one_had_not(tmp_path: Path) -> None:
    (first, _), (second, read) = report(tmp_path), report(tmp_path)
    first.lead(True)
    second.lead(False)
    for step in (1, 2, 3):
        for each in [first, second][step > 2 :]:  # the first dies in step 3
            each.record(step, {"loss": step / 10})
            if step == 2:
                each.measure(step, {"validation_loss": 0.25})
    second.measure(3, {"validation_loss": 0.35})
    second.lead(True)
    second.record(4, {"loss": 0.4})
    steps = [{"step": step, "loss": step / 10} for step in (1, 2, 3, 4)]
    second_steps = [{"step": 2, "validation_loss": 0.25}, steps[2], {"step": 3, "validation_loss": 0.35}, steps[3]]
    assert recorded(tmp_path) == [*steps[:2], *second_steps]
    assert read == [4], "a person reads no old steps"


def test_steps_that_another_state_replaced_are_nobodys(tmp_path: Path) -> None:
    each, _ = report(tmp_path)
    each.record(1, {"loss": 0.1})
    each.forget()
    each.lead(True)
    each.record(1, {"loss": 0.2})
    assert recorded(tmp_path) == [{"step": 1, "loss": 0.2}]


def test_the_newest_of_a_number_is_of_whichever_life(tmp_path: Path) -> None:
    each, _ = report(tmp_path)
    assert each.newest("groups/lost_steps", "loss") == [0.0, 0.0]
    log = Log(tmp_path)
    log.record(7, {"groups/lost_steps": 2.0, "loss": 1.0})
    log.record(3, {"loss": 2.0})
    assert each.newest("groups/lost_steps", "loss") == [2.0, 2.0]


def test_a_save_that_failed_is_told_once_and_counted_with_the_next(tmp_path: Path) -> None:
    said, store = list[str](), SimpleNamespace(last=None, lost=None)
    speaker, _ = report(tmp_path)
    speaker.lead(True)
    speaker.say = said.append  # type: ignore[method-assign]
    saves = SaveReport(speaker, cast(Store, store), 600.0)
    saves.tell()
    store.lost = DiskFaultError("/shared: input/output error, still after 299 s of trying again")
    for _ in range(3):
        saves.tell()
    (line,) = said
    assert line.startswith("warning: a save failed: /shared: input/output error, still after 299 s")
    assert "training goes on" in line
    store.last, store.lost = SavedCheckpoint(20, tmp_path, 0.5, 2.0, 100, faults=7, waited_seconds=31.0), None
    for _ in range(2):
        saves.tell()
    (record,) = recorded(tmp_path)
    assert (record["step"], record["checkpoint/failures"], record["checkpoint/faults"]) == (20, 1.0, 7.0)
    assert record["checkpoint/waited_seconds"] == 31.0


def test_a_save_that_hangs_is_passed_over_once_and_then_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three that are due in a row; on every rank alike, whoever's disk it is."""
    loop, asked = object.__new__(Loop), list[bool]()
    loop.store = cast(Store, SimpleNamespace(busy=lambda: False))
    loop.training = cast(Training, SimpleNamespace(ranks=SimpleNamespace(device="cpu")))
    loop._passed_over = False

    def of_another_rank(mine: bool, _device: object) -> bool:
        asked.append(mine)
        return True

    monkeypatch.setattr("src.train.loop.any_rank", of_another_rank)
    assert [loop._hangs() for _ in range(3)] == [True, False, True]
    assert asked == [False, False]
