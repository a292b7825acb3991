"""`python launch.py fault_tolerance=torchft` on one machine: groups, their lighthouse, and who starts them again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from src.checkpoint.folder import complete
from src.cluster.replicas.supervisor import GroupProcess, Groups
from src.errors import PlanError, SampleError
from src.runs.folder import RunFolder, attempts, end
from src.runs.lock import Lock
from tests.end_to_end.commands import command, start
from tests.end_to_end.lives import TINY, opened, records, series, write_text
from tests.train.runs import changed, section

PATIENCE_SECONDS = 240.0
QUICK = (
    *("fault_tolerance=torchft", "fault_tolerance.heartbeat_seconds=1.0", "fault_tolerance.join_seconds=1.0"),
    *("fault_tolerance.backoff_seconds=0.1", "fault_tolerance.sum_seconds=20.0"),
)


def until(true: Callable[[], Any], process: "subprocess.Popen[str]") -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := true()):
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            raise AssertionError(process.communicate(PATIENCE_SECONDS))
        time.sleep(0.1)
    return found


def pids(*words: str) -> list[int]:
    """Of the processes whose command line has all of these words."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if all(any(word in part for part in line) for word in words):
            found.append(int(file.parent.name))
    return sorted(found)


def there(folder: Path) -> list[int]:
    """How many groups took part, record by record."""
    try:
        return [int(line["groups/participants"]) for line in records(folder) if "groups/participants" in line]
    except (OSError, ValueError):
        return []


@pytest.mark.slow
def test_a_dead_rank_and_a_dead_lighthouse_are_started_again(tmp_path: Path) -> None:
    argv = (*TINY, *write_text(tmp_path), f"root={tmp_path}", "schedule=constant")
    folder = tmp_path / "run"
    given = (*QUICK, f"folder={folder}", "parallel=fsdp2", "task.steps=100000", "checkpoint.every=100000")
    process = start(*argv, *given)
    until(lambda: 2 in there(folder), process)
    os.kill(pids("src.cluster.rank", f"{folder}/groups/1")[0], signal.SIGKILL)
    # Not until a step of one group alone: the other one may be back before there is one.
    until(lambda: len(attempts(folder / "groups/1")) == 2, process)
    before = len(there(folder))
    until(lambda: 2 in there(folder)[before:], process)
    owner = Lock(folder / "lock").owner()
    assert owner is not None
    (lighthouse,) = (pid for pid in pids("src.fault_tolerance.lighthouse") if _parent(pid) == owner["pid"])
    os.kill(lighthouse, signal.SIGKILL)
    before = len(there(folder))
    until(lambda: len(there(folder)) > before + 5, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, said
    assert "group 1: exit code" in said
    assert "the lighthouse is gone" in said
    # Two, where the signal came before one of the groups had found the new lighthouse.
    *_, saved = complete(folder / "checkpoints")
    assert not list((folder / "checkpoints").glob("*.group_*")), "nothing half-written is left"
    assert json.loads((saved / "values.json").read_text())["step"] == max(series(folder))
    assert [attempt.ended for attempt in attempts(folder)] == ["stopped"]
    assert [attempt.ended for attempt in attempts(folder / "groups/1")] == ["failed", "stopped"]
    assert command(*argv, "task.steps=15", f"folder={tmp_path / 'whole'}")[0] == 0
    whole = series(tmp_path / "whole")
    assert sorted(whole.keys() - series(folder).keys()) == [], (said, records(folder)[:20])
    assert {step: loss for step, loss in series(folder).items() if step <= 15} == pytest.approx(whole, rel=1e-4)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def supervised(tmp_path: Path, programs: dict[int, str], **options: Any) -> tuple[Groups, list[int], Any]:
    """What a supervisor makes of groups that are these programs; also which it started, in order."""
    path = opened(*TINY, "data=synthetic", f"root={tmp_path}", "fault_tolerance=torchft")
    config = changed(
        section("fault_tolerance", "torchft"), lighthouse="http://nowhere:1", backoff_seconds=0.01, **options
    )
    started: list[int] = []

    def begin(self: Groups, group: GroupProcess, now: float) -> None:
        started.append(group.number)
        program = f"import sys, time; sys.path[:0] = [{str(Path.cwd())!r}]; {programs[group.number]}"
        group.process, group.began = subprocess.Popen([sys.executable, "-c", program]), now

    with RunFolder.rejoin(path, next((path / "code").iterdir()).name) as folder:
        groups = Groups(folder, config, [{}, {}], world=1, grace_seconds=20.0)
        with patch.object(Groups, "_start", begin):
            outcome = groups.run()
    return groups, started, outcome


def test_a_lighthouse_that_cannot_start_is_told_at_once(tmp_path: Path) -> None:
    """A package that torchft needs is missing, say."""
    path = opened(*TINY, "data=synthetic", f"root={tmp_path}", "fault_tolerance=torchft")
    (code,) = (path / "code").iterdir()
    broken = patch(
        "src.cluster.replicas.lighthouse.command", lambda _: [sys.executable, "-c", "import no_such_package"]
    )
    with RunFolder.rejoin(path, code.name) as folder, broken, pytest.raises(PlanError) as caught:
        Groups(folder, section("fault_tolerance", "torchft"), [{}, {}], world=1, grace_seconds=20.0).run()
    assert "ModuleNotFoundError: No module named 'no_such_package'" in str(caught.value)
    assert len(attempts(path)) == 1, "only the one that the test has made"


def test_a_group_that_fails_again_and_again_is_given_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, started, outcome = supervised(tmp_path, {0: "sys.exit(3)", 1: "sys.exit(3)"}, restarts=2)
    assert (outcome.status, outcome.exit_code) == ("failed", 3)
    assert sorted(started) == [0, 0, 0, 1, 1, 1]
    said = capfd.readouterr().err
    assert "group 0: exit code 3; starts again in 0.02 s (restart 2 of 2)" in said
    assert "group 1: exit code 3; it stays away" in said


def test_a_first_wait_that_is_longer_than_the_longest_is_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fault_tolerance.backoff_seconds=1000 was 300 in silence."""
    monkeypatch.setattr("src.cluster.replicas.supervisor.LONGEST_BACKOFF_SECONDS", 0.005)
    supervised(tmp_path, {0: "sys.exit(3)", 1: "sys.exit(3)"}, restarts=2)
    said = capfd.readouterr().err
    assert "group 0: exit code 3; starts again in 0.01 s (restart 1 of 2)" in said
    assert "group 0: exit code 3; starts again in 0.01 s (restart 2 of 2)" in said


def test_what_a_user_must_put_right_is_not_tried_again(tmp_path: Path) -> None:
    _, started, outcome = supervised(tmp_path, {0: "sys.exit(2)", 1: "sys.exit(2)"})
    assert (outcome.status, outcome.exit_code, sorted(started)) == ("failed", 2, [0, 1])


def test_a_group_that_took_wrong_samples_is_not_started_again(tmp_path: Path) -> None:
    """Nor is any other error a reason: the code of an exit is the same."""
    path = opened(*TINY, "data=synthetic", "data.documents=100", f"root={tmp_path}", "fault_tolerance=torchft")
    code = next((path / "code").iterdir()).name
    with RunFolder.rejoin(path, code) as folder:
        groups = Groups(folder, section("fault_tolerance", "torchft"), [{}, {}], world=1, grace_seconds=20.0)
        groups._groups = [groups._group(number, "http://nowhere:1") for number in range(2)]
        for group, error, ended in zip(
            groups._groups, (SampleError("step 1"), ValueError("step 1")), ("given up", ""), strict=True
        ):
            with RunFolder.rejoin(group.folder, code) as own:
                own.begin(1)
            end(group.folder, "failed", f"rank 0: {type(error).__name__}: {error}")
            groups._ended(group, 1, time.monotonic())
            assert group.ended == ended


def test_too_few_groups_are_not_left_waiting(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    programs = {0: "time.sleep(600)", 1: "sys.exit(2)"}
    _, _, outcome = supervised(tmp_path, programs, min_groups=2)
    assert (outcome.status, outcome.exit_code) == ("failed", 2)
    assert "1 group is left and fault_tolerance.min_groups=2: it stops" in capfd.readouterr().err
