"""A save that does not end: given up shortly before the time limit, and started again only from something new."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.cluster.diagnosis.verdict import Verdict, settle
from src.cluster.slurm import client, time_limit
from src.cluster.slurm.time_limit import Deadline, margin
from src.runs.folder import attempts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of a run in its first attempt, with one checkpoint; the rank remembers its signals and acts on none."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(time_limit, "POLL_SECONDS", 0.01)
    started = {"number": 1, "started": "2026-01-01T00:00:00+00:00", "host": "n1", "world": 1, "code": "c", "sha": None}
    (tmp_path / "attempts.jsonl").write_text(json.dumps(started | {"job": "7", "changed": []}) + "\n")
    save(tmp_path, 5)
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    yield tmp_path
    signal.signal(signal.SIGUSR2, before)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What scontrol is told."""
    told: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", lambda command, **_: told.append(command))
    return told


def save(folder: Path, step: int) -> None:
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE.json").write_text("{}")


def left(monkeypatch: pytest.MonkeyPatch, seconds: list[float | None]) -> None:
    """What SLURM says, one answer after another; the last one for ever."""
    monkeypatch.setattr(client, "seconds_left", lambda _: seconds.pop(0) if len(seconds) > 1 else seconds[0])


def stuck(folder: Path, until_verdicts: int, *, saves: int | None = None, requeues: int = 20) -> None:
    """A signal, and a save that lasts until somebody gives it up."""
    with Deadline(folder, requeues, 600):
        if saves is not None:
            save(folder, saves)
        os.kill(os.getpid(), signal.SIGUSR2)
        end = time.monotonic() + 20
        while len(verdicts(folder)) < until_verdicts and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)  # for scontrol


def verdicts(folder: Path) -> list[dict[str, object]]:
    file = folder / "verdicts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_an_attempt_that_has_saved_is_requeued(
    folder: Path, sent: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    left(monkeypatch, [None, 30.1, 29.9])
    stuck(folder, 1, saves=10)
    assert sent == [["scontrol", "requeue", "7"]]
    (verdict,) = verdicts(folder)
    assert (verdict["kind"], verdict["action"], verdict["checkpoint"]) == ("late", "requeue", "step_00000010")
    assert str(verdict["words"]).endswith("pass a larger cluster.grace_seconds. The run goes on from step_00000010")
    assert attempts(folder)[-1].ended == "killed"


def test_one_that_has_saved_nothing_stays_down(
    folder: Path, sent: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    left(monkeypatch, [20.0])
    stuck(folder, 1)
    assert sent == []
    assert verdicts(folder)[0]["action"] == "stop"
    assert "has saved nothing, so another one would not come further" in str(verdicts(folder)[0]["words"])


def test_not_for_ever(folder: Path, sent: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    left(monkeypatch, [20.0])
    stuck(folder, 1, saves=10, requeues=1)
    stuck(folder, 2, saves=20, requeues=1)
    assert len(sent) == 2, "each has come further"
    assert settle(folder, "7", Verdict("peer", "requeue", None, "lost"), 1).action == "stop", "this one has not"
    assert [each["action"] for each in verdicts(folder)] == ["requeue", "requeue", "stop"]


def test_a_save_that_ends_in_time_and_a_run_without_a_signal_are_left_alone(
    folder: Path, sent: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    left(monkeypatch, [100.0])
    with Deadline(folder, 20, 600):
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.1)
    left(monkeypatch, [1.0])
    with Deadline(folder, 20, 600):
        time.sleep(0.1)
    assert (sent, verdicts(folder)) == ([], [])
    assert (margin(600), margin(20)) == (30, 10)
