"""The ledger on disk, how points stand, and what each command does about it."""

import csv
import json
import os
import re
import runpy
import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src.cluster.slurm import client
from src.config import tree as trees
from src.config.tree import identity
from src.errors import UserError
from src.runs.lock import Lock
from src.runs.records import SUBMISSIONS_FILE
from src.storage import json_lines
from src.sweeps import commands
from src.sweeps import grid as sweeps
from src.sweeps.commands import main
from src.sweeps.ledger import Ledger
from src.sweeps.status import State
from tests.sweeps.points import START, attempt, failed, finished, grid, train, tree


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return grid(tmp_path, ["1e-4", "3e-4", "1e-3"], ["0", "1"])


def states(ledger: Ledger) -> list[State]:
    return [now.state for _, now in ledger.standings()]


def squeue(monkeypatch: pytest.MonkeyPatch, answer: dict[str, str]) -> None:
    monkeypatch.setattr(client, "states", lambda _: answer)


def test_a_point_is_entered_once_and_survives_a_torn_line(ledger: Ledger) -> None:
    before = ledger.points()
    assert [point.number for point in before] == [1, 2, 3, 4, 5, 6]
    assert ledger.swept() == ["optim.lr", "seed"]
    root = Path(ledger.tree(before[0])["root"])
    again = ledger.add(tree(root, seed=1, optim={"lr": 3e-4}), {"optim.lr": "0.0003"})
    assert again == before[3]
    with (ledger.path / "ledger.jsonl").open("a") as file:
        file.write('{"event": "cancelled", "iden')  # a kill in the middle of a write
    ledger.submitted(before[0])
    assert [point.submitted is not None for point in ledger.points()] == [True, *[False] * 5]
    assert ledger.tree(before[3])["optim"] == {"lr": 3e-4}


def test_a_point_more_costs_a_line_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a look at all of those before it: 100 points are 100 lines written, and each is read once."""
    ledger, parsed = Ledger.make(tmp_path / "sweep", [], {}), list[object]()
    whole = json_lines._records

    def counting(lines: Iterable[bytes]) -> list[dict[str, Any]]:
        found = list(whole(lines))
        parsed.extend(found)
        return found

    monkeypatch.setattr(json_lines, "_records", counting)
    monkeypatch.setattr(trees, "write", lambda *_: None)
    made = [ledger.add(tree(tmp_path, seed=seed), {"seed": str(seed)}) for seed in range(100)]
    assert len(parsed) == 99
    assert ledger.points() == made
    assert len(parsed) == 100
    other = Ledger.open(ledger.path)  # another command on the same sweep
    other.cancelled(made[3])
    assert [point.number for point in ledger.points() if point.cancelled] == [4]
    assert ledger.add(tree(tmp_path, seed=3), {"seed": "3"}).cancelled


def test_every_way_to_stand(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    points = ledger.points()
    assert states(ledger) == ["missing"] * 6
    finished(points[0], loss=3.0)
    failed(points[1], "DivergedError: step 61: loss nan")
    failed(points[2], "ValueError: bad")
    attempt(points[3].folder, 1, START, None)
    attempt(points[4].folder, 1, START, "stopped", START + 50)
    ledger.refused(points[5], "data: no such file")
    assert states(ledger) == ["finished", "diverged", "failed", "lost", "stopped", "refused"]
    ledger.cancelled(points[4])
    (points[5].folder).mkdir(exist_ok=True)
    for point in (points[3], points[5]):
        job = {"job": f"9_{point.number}", "submitted": START}
        (point.folder / SUBMISSIONS_FILE).write_text(json.dumps(job) + "\n")
    squeue(monkeypatch, {"9_4": "PENDING", "9_6": "RUNNING"})
    assert states(ledger) == ["finished", "diverged", "failed", "queued", "cancelled", "running"]
    squeue(monkeypatch, {"9_4": "COMPLETED"})
    assert states(ledger)[3::2] == ["lost", "refused"]


def test_a_run_whose_lock_is_held_is_running(ledger: Ledger) -> None:
    point = ledger.points()[0]
    attempt(point.folder, 1, START, None)
    if (child := os.fork()) == 0:  # a lock is a process's own
        try:
            Lock(point.folder / "lock").take()
            (point.folder / "taken").touch()
            os.read(os.open(_pipe(point.folder), os.O_RDONLY), 1)
        finally:
            os._exit(0)
    while not (point.folder / "taken").exists():
        pass
    assert states(ledger)[0] == "running"
    os.close(os.open(_pipe(point.folder), os.O_WRONLY))
    os.waitpid(child, 0)
    assert states(ledger)[0] == "lost"


def _pipe(folder: Path) -> Path:
    path = folder / "pipe"
    if not path.exists():
        os.mkfifo(path)
    return path


class Starts:
    """Stands for `start`: every point ends as told; remembers the seeds and rates that it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: dict[tuple[float, int], Any]) -> None:
        self.ends, self.given = ends, list[tuple[float, int]]()
        monkeypatch.setattr(sweeps, "start", self)
        monkeypatch.setattr(sweeps, "checked", lambda trees: [(each, Here(), None) for each in trees])
        monkeypatch.setattr(sweeps, "ask_schedulers", lambda _: None)

    def __call__(self, tree: Any, run: Any, plan: None, shared: object) -> tuple[str, int]:
        key = (tree["optim"]["lr"], tree["seed"])
        self.given.append(key)
        end = self.ends.get(key, ("finished", 0))
        if isinstance(end, Exception):
            raise end
        ended: tuple[str, int] = end
        folder = Path(tree["root"]) / f"tiny-{identity(tree)}"
        attempt(folder, len(self.given), START, ended[0], START + 9)
        return ended


class Here:
    """A run on this machine."""

    cluster = None


def enter(ledger: Ledger) -> int:
    given = [(ledger.tree(point), Here(), None, dict(point.overrides)) for point in ledger.points()]
    return sweeps.enter(ledger, given)  # type: ignore[arg-type]


def test_the_same_sweep_again_starts_only_what_is_open(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {(1e-4, 1): ("failed", 3), (3e-4, 0): UserError("no data"), (1e-3, 0): ("killed", 130)}
    starts = Starts(monkeypatch, ends)
    assert enter(ledger) == 3
    assert starts.given == [(1e-4, 0), (1e-4, 1), (3e-4, 0), (3e-4, 1), (1e-3, 0)]
    assert states(ledger) == ["finished", "failed", "refused", "finished", "stopped", "missing"]
    starts.given.clear()
    starts.ends = {}
    assert enter(ledger) == 0
    assert starts.given == [(3e-4, 0), (1e-3, 0), (1e-3, 1)]
    assert states(ledger) == ["finished", "failed", "finished", "finished", "finished", "finished"]


def test_retry_takes_what_failed_or_what_is_named(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = ledger.points()
    for point in points[2:]:
        finished(point, loss=3.0)
    failed(points[0], "ValueError: bad")
    ledger.cancelled(points[1])
    starts = Starts(monkeypatch, {})
    assert main(["retry", str(ledger.path)]) == 0
    assert starts.given == [(1e-4, 0)]
    assert main(["retry", str(ledger.path), "2", "3"]) == 0
    assert starts.given[1:] == [(1e-4, 1)]
    assert "3: finished, left alone" in capsys.readouterr().err
    assert states(ledger) == ["finished"] * 6
    assert main(["retry", str(ledger.path), "7"]) == 2
    assert "no point 7; there are 1 to 6" in capsys.readouterr().err


def test_cancel_ends_a_job_and_keeps_waiting_points_from_starting(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = ledger.points()
    for point in others[1:]:
        finished(point, loss=3.0)
    first.folder.mkdir(parents=True)
    (first.folder / SUBMISSIONS_FILE).write_text('{"job": "7_0", "submitted": 1.0}\n')
    squeue(monkeypatch, {"7_0": "RUNNING"})
    monkeypatch.setattr(client, "available", lambda: True)
    sent: list[list[str]] = []

    class Done:
        returncode = 0

    def run(command: list[str], **options: object) -> Done:
        sent.append(command)
        return Done()

    monkeypatch.setattr("subprocess.run", run)
    assert main(["cancel", str(ledger.path)]) == 0
    assert sent == [["scancel", "7_0"]]
    squeue(monkeypatch, {})
    assert states(ledger) == ["cancelled", "cancelled", *["finished"] * 4]
    starts = Starts(monkeypatch, {})
    assert enter(ledger) == 0
    assert starts.given == []


@pytest.mark.parametrize(
    ("owner", "ends", "said"),
    [
        ({}, None, "cancelled"),  # between the look at its state and now
        ({"host": socket.gethostname(), "pid": 7}, ProcessLookupError(), "cancelled"),
        ({"host": socket.gethostname(), "pid": 7}, PermissionError(), "process 7 is another user's"),
        ({"host": "n9", "pid": 7}, None, "it runs on n9: end process 7 there"),
    ],
)
def test_cancel_of_what_has_ended_or_cannot_be_ended(
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: dict[str, Any],
    ends: OSError | None,
    said: str,
) -> None:
    """A process may go between the look at it and the signal: no traceback."""

    def kill(_pid: int, _number: int) -> None:
        assert ends is not None, "nobody may be sent a signal"
        raise ends

    monkeypatch.setattr(Lock, "owner", lambda _: owner)
    monkeypatch.setattr("os.kill", kill)
    ((point, now), *_) = ledger.standings()
    chosen = [(point, replace(now, state="running"))]
    monkeypatch.setattr(commands, "_chosen", lambda _ledger, _numbers: chosen)
    assert main(["cancel", str(ledger.path)]) == (0 if said == "cancelled" else 1)
    assert capsys.readouterr().err == f"1: {said}\n"


def test_the_table_has_every_number(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    finished(ledger.points()[0], loss=3.25, steps=100, rate=2000.0)
    ledger.submitted(ledger.points()[0])
    assert main(["table", str(ledger.path)]) == 0
    assert re.search(r"1 +finished +1e-4 +0 +3\.2500 +2,000", capsys.readouterr().out)
    with (ledger.path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished", *["missing"] * 5]
    assert (rows[0]["optim.lr"], rows[0]["loss"], rows[0]["tokens_per_second"]) == ("1e-4", "3.25", "2000.0")
    assert float(rows[0]["useful_seconds"]) == pytest.approx(90 * 0.48)
    assert float(rows[0]["compile_seconds"]) == 9.0


def test_a_key_that_only_later_points_name_is_read_from_the_config(ledger: Ledger) -> None:
    root = Path(ledger.tree(ledger.points()[0])["root"])
    ledger.add(tree(root, seed=0, optim={"lr": 1e-4}, task={"steps": 7}), {"optim.lr": "1e-4", "task.steps": "7"})
    overrides = [point.overrides for point, _ in ledger.standings()]
    assert overrides[-1] == {"optim.lr": "1e-4", "task.steps": "7", "seed": "0", "experiment": ""}
    assert overrides[0] == {"experiment": "tiny", "optim.lr": "1e-4", "seed": "0", "task.steps": ""}


def test_a_final_loss_is_the_newest_attempts(ledger: Ledger) -> None:
    point = ledger.points()[0]
    train(point.folder, steps=100, loss=3.5)
    train(point.folder, steps=100, loss=3.25, began=START + 1000, number=2)
    assert ledger.standings()[0][1].loss == 3.25


def test_a_folder_that_is_no_sweep_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "no sweep folder" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_ledger_is_no_command_and_names_the_one_that_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        runpy.run_module("src.sweeps.ledger", run_name="__main__")
    assert left.value.code == 2
    assert "python -m src.sweeps status" in capsys.readouterr().err
