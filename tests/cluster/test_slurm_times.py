"""SLURM's words for times, and a grace that is too short for a save."""

from pathlib import Path

import pytest

from src.cluster.slurm import client
from src.cluster.slurm.client import minutes
from src.cluster.slurm.time_limit import slow_saves
from src.storage.json_lines import Lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30:00", 30), ("1:00:00", 60), ("4-00:00:00", 5760), ("1-12:30:00", 2190), ("infinite", None), ("2-06", 3240)],
)
def test_times(text: str, expected: int | None) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:31", 31), ("9:59:00", 35940), ("1-00:00:01", 86401), ("-0:05", -5), ("UNLIMITED", None), ("", None)],
)
def test_time_left(text: str, expected: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_ask", lambda *_: f"{text}\n")
    assert client.seconds_left("7") == expected


def test_a_grace_that_hardly_holds_a_save_is_told(tmp_path: Path) -> None:
    assert slow_saves(tmp_path, 60) is None
    for seconds in (12.0, 41.0, 30.0):
        Lines(tmp_path / "metrics.jsonl").append({"step": 1, "checkpoint/write_seconds": seconds})
    assert slow_saves(tmp_path, 100) is None
    warning = slow_saves(tmp_path, 60)
    assert warning is not None
    assert "a save took 41 s" in warning
    assert warning.endswith("pass at least 82")
