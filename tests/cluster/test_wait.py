"""cluster.wait=true: what a person reads while jobs wait and run, and when they have ended."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from src.cluster.backend import JobState
from src.cluster.slurm.scheduler import SlurmScheduler
from src.cluster.submission import Submitted
from src.cluster.wait import wait

QUEUED, RUNNING = JobState("queued", "PENDING"), JobState("running", "RUNNING")
LONG = "a_name_of_a_run_that_is_longer_than_the_80_columns_that_nobody_has_asked_for-[0a1b2c3d]"


class Answers(SlurmScheduler):
    """What is known of the jobs at each look; None: Ctrl-C while it is waited for."""

    def __init__(self, *looks: dict[str, JobState] | None) -> None:
        object.__setattr__(self, "looks", list(looks))

    def states(self, jobs: Iterable[str]) -> dict[str, JobState]:
        look: dict[str, JobState] | None = self.looks.pop(0)  # type: ignore[attr-defined]
        if look is None:
            raise KeyboardInterrupt
        return look


def submitted(root: Path, *ends: str) -> list[Submitted]:
    """Runs with one attempt each."""
    found = []
    for number, ended in enumerate(ends):
        folder = root / f"{LONG}{number}"
        folder.mkdir()
        start = {"number": 1, "started": "2026-01-01T00:00:00+00:00", "host": "n", "world": 1, "code": "c", "sha": None}
        lines = [start | {"job": f"{number}", "changed": []}, {"number": 1, "ended": ended, "detail": "x"}]
        (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "metrics.jsonl").write_text('{"attempt": 1, "step": 7, "loss": 2.5}\n')
        found.append(Submitted(f"{number}", folder, folder / "log", f"scancel {number}"))
    return found


def test_a_file_has_each_change_and_the_whole_last_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = submitted(tmp_path, "finished", "failed")
    looks = ({"0": QUEUED, "1": QUEUED}, {"0": QUEUED, "1": QUEUED}, {"0": RUNNING}, {}, {})
    assert wait(runs, Answers(*looks), poll_seconds=0.0).exit_code == 1
    lines = capsys.readouterr().err.splitlines()
    told = [line.rpartition(": ")[2] for line in lines if line.startswith("job 0: ")]
    assert told == ["PENDING", "RUNNING", "gone", "finished"]
    words = [line.split() for line in lines[-2:]]
    assert words == [["0", f"{LONG}0", "finished", "1", "7", "2.5000"], ["1", f"{LONG}1", "failed", "1", "7", "2.5000"]]


def test_ctrl_c_ends_the_waiting_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = wait(submitted(tmp_path, "finished"), Answers({"0": RUNNING}, None), poll_seconds=0.0)
    assert (outcome.status, outcome.exit_code) == ("submitted", 130)
    told = capsys.readouterr().err
    assert "nobody waits any more; the jobs go on:\nscancel 0  # ends " in told
    assert "Traceback" not in told
