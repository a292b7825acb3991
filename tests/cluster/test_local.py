"""Launchers and ranks in real processes."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from src.cluster.local.signals import SAME_SIGNAL_SECONDS
from src.cluster.local.supervisor import RankSupervisor, killed_for_memory
from src.cluster.rank import RankJob
from src.runs import node_copy
from src.runs.folder import Attempt, attempts
from tests.cluster.fakes import launch, place, repository, until_heard

PATIENCE_SECONDS = 120.0


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository(tmp_path_factory.mktemp("repository"))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(folder: Path, launcher: "subprocess.Popen[str]", world: int) -> list[int]:
    """The pids of the ranks, once all of them are inside their task."""
    marks = [folder / f"alive_{rank}" for rank in range(world)]
    until(lambda: launcher.poll() is not None or all(mark.exists() and mark.read_text() for mark in marks))
    assert launcher.poll() is None, launcher.communicate()
    return [int(mark.read_text()) for mark in marks]


def gone(pid: int) -> bool:
    """Whether the process has ended; a zombie that its new parent has not reaped yet counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_two_ranks_add_up_and_log(code: Path, tmp_path: Path) -> None:
    launcher = launch(tmp_path, code, "sum", 2, warm=False)
    out, err = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 0, err
    folder = place(tmp_path, "sum", 2)
    (attempt,) = attempts(folder)
    copy = node_copy.place(folder / "code" / attempt.code)  # this machine's own
    told = [f"threads 1 in {tmp_path}", f"code {copy}"]
    assert out.splitlines() == ["rank 0 of 2: sum 3", *told, "outcome finished"]
    assert err.strip() == "a warning"
    for rank in range(2):
        log = (folder / f"logs/attempt_1/rank_{rank}.log").read_text().splitlines()
        assert sorted(log) == sorted([f"rank {rank} of 2: sum 3", *told, "a warning", "words of a library in C"]), (
            f"rank {rank}"
        )
    assert (attempt.number, attempt.world, attempt.ended) == (1, 2, "finished")


def test_a_crash_shows_the_failing_rank_first(code: Path, tmp_path: Path) -> None:
    launcher = launch(tmp_path, code, "crash", 2)
    out, err = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert out == "outcome failed\n"
    lines = err.strip().splitlines()
    assert lines[0] == "rank 1 failed first: ValueError: the weights of rank 1 are bad"
    log = place(tmp_path, "crash", 2) / "logs/attempt_1/rank_1.log"
    assert lines[-1] == f"log: {log}"
    assert "ValueError: the weights of rank 1 are bad" in log.read_text()
    (attempt,) = attempts(place(tmp_path, "crash", 2))
    assert (attempt.ended, "rank 1: ValueError" in attempt.detail) == ("failed", True)


def test_a_crash_is_shown_where_its_record_cannot_be_written(code: Path, tmp_path: Path) -> None:
    """Whatever else breaks: here attempts.jsonl becomes a folder as soon as it is read."""
    launcher = launch(tmp_path, code, "spoil", 2)
    _, err = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert err.startswith("rank 1 failed first: ValueError: the weights of rank 1 are bad\n"), err
    attempts_file = place(tmp_path, "spoil", 2) / "attempts.jsonl"
    assert f"warning: {attempts_file}: the end of this attempt cannot be noted: " in err
    assert err.count("Traceback") == 1, "that of the rank"


def test_a_full_disk_is_told_by_the_launcher_where_the_rank_cannot(code: Path, tmp_path: Path) -> None:
    launcher = launch(tmp_path, code, "full", 1)
    _, err = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 74
    said = rf"rank 0 failed first: DiskFullError: {tmp_path}.*: no space left on device; .* are free\n"
    assert re.match(said, err), err
    assert "Traceback" not in err


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_streams_may_be_closed(code: Path, tmp_path: Path, closed: tuple[int, ...]) -> None:
    launcher = launch(tmp_path, code, "sum", 2, closed=closed)
    launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 0
    for rank in range(2):
        log = (place(tmp_path, "sum", 2) / f"logs/attempt_1/rank_{rank}.log").read_text()
        assert f"rank {rank} of 2: sum 3" in log
        assert "words of a library in C" in log


@pytest.mark.slow
def test_a_rank_that_dies_without_a_word_is_named_with_its_signal(code: Path, tmp_path: Path) -> None:
    launcher = launch(tmp_path, code, "segfault", 2, warm=False)  # or its trace would hold frames of tests/warm
    _, err = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 128 + signal.SIGSEGV
    assert err.strip().splitlines()[0] == "rank 1 failed first: ended by SIGSEGV"
    assert "Fatal Python error: Segmentation fault" in err, "the end of its log is shown"
    assert attempts(place(tmp_path, "segfault", 2))[0].detail.endswith("rank 1: ended by SIGSEGV"), "not rank 0's words"


def test_a_signal_before_training_began(code: Path, tmp_path: Path) -> None:
    launcher = launch(tmp_path, code, "early", 1)
    alive(place(tmp_path, "early", 1), launcher, 1)
    launcher.send_signal(signal.SIGINT)
    out, err = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert (launcher.returncode, out) == (0, "outcome stopped\n")
    assert "before training began or after it ended" in err
    assert "Traceback" not in err


def test_a_users_fault_on_a_rank_is_told_without_a_traceback(code: Path, tmp_path: Path) -> None:
    launcher = launch(tmp_path, code, "refuse", 1)
    _, err = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 2
    assert "Traceback" not in err
    assert "crc32 differs" in err.splitlines()[0]
    assert "checkpoint.initial: try step_00000005" in err.splitlines()


def test_an_answer_of_no_is_exit_code_1_without_a_traceback(code: Path, tmp_path: Path) -> None:
    launcher = launch(tmp_path, code, "judge", 2)
    _, err = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert "Traceback" not in err
    assert "3 of 9 figures differ" in err.splitlines()


def test_a_signal_reaches_every_rank_and_the_run_resumes(code: Path, tmp_path: Path) -> None:
    folder = place(tmp_path, "wait", 2)
    launcher = launch(tmp_path, code, "wait", 2)
    alive(folder, launcher, 2)

    second = launch(tmp_path, code, "wait", 2)  # while the first lives
    _, refusal = second.communicate(timeout=PATIENCE_SECONDS)
    assert second.returncode != 0
    named = re.search(rf"process (\d+) on {os.uname().nodename} .* stop it with: kill -TERM (\d+)", refusal)
    assert named is not None, refusal
    assert named[1] == named[2]

    launcher.send_signal(signal.SIGHUP)  # ignored: it was started as by nohup
    os.kill(int(named[1]), signal.SIGTERM)
    out, err = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert (launcher.returncode, out.splitlines()[-1]) == (0, "outcome stopped"), err
    assert [(folder / f"seen_{rank}").read_text() for rank in range(2)] == ["SIGTERM", "SIGTERM"]
    assert (
        err.strip()
        .splitlines()[-1]
        .startswith("stopped by SIGTERM; nothing was saved, so the same command starts anew: ")
    )

    for rank in range(2):
        (folder / f"alive_{rank}").unlink()
    again = launch(tmp_path, code, "wait", 2)
    pids = alive(folder, again, 2)
    again.kill()  # kill -9: no handler runs
    again.communicate(timeout=PATIENCE_SECONDS)
    until(lambda: all(gone(pid) for pid in pids))
    assert [(a.number, a.ended) for a in attempts(folder)] == [(1, "stopped"), (2, None)]


def test_a_second_ctrl_c_ends_at_once(code: Path, tmp_path: Path) -> None:
    folder = place(tmp_path, "stubborn", 2)
    launcher = launch(tmp_path, code, "stubborn", 2)
    pids = alive(folder, launcher, 2)
    launcher.send_signal(signal.SIGINT)
    until_heard(launcher, "SIGINT")
    launcher.send_signal(signal.SIGINT)  # the same Ctrl-C, through a wrapper
    time.sleep(SAME_SIGNAL_SECONDS)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 130
    assert all(gone(pid) for pid in pids)
    assert attempts(folder)[-1].ended == "killed"


def test_ranks_that_outlast_the_grace_are_ended(code: Path, tmp_path: Path) -> None:
    folder = place(tmp_path, "stubborn", 1)
    launcher = launch(tmp_path, code, "stubborn", 1, grace_seconds=0.2)
    (pid,) = alive(folder, launcher, 1)
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 137
    assert "not saved 0.2 s after SIGTERM" in err
    assert gone(pid)


def test_the_kernel_is_asked_whether_it_killed_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess after every kill -9 sends people after memory that was never short."""
    counts = iter((3, 3, 3, 4))
    monkeypatch.setattr("src.cluster.local.supervisor.killed_for_memory", lambda: next(counts))
    attempt = Attempt(1, "", "", 1, "", None, None, ())
    (tmp_path / "logs/attempt_1").mkdir(parents=True)
    (tmp_path / "logs/attempt_1/rank_0.log").write_text("step 7\nstep 8\n")
    told = [RankSupervisor(RankJob(tmp_path, None), attempt, {}, 1.0)._describe(0, -signal.SIGKILL) for _ in range(2)]
    assert [each.error for each in told] == [
        "ended by SIGKILL",
        "ended by SIGKILL (the system's out-of-memory killer)",
    ]
    assert told[0].text == "the last lines of its log:\n  | step 7\n  | step 8"
    (tmp_path / "logs/attempt_1/rank_0.log").write_text("")
    monkeypatch.setattr("src.cluster.local.supervisor.killed_for_memory", lambda: 0)
    silent = RankSupervisor(RankJob(tmp_path, None), attempt, {}, 1.0)
    assert silent._describe(0, -signal.SIGKILL).text == "(it wrote nothing)"
    monkeypatch.undo()
    assert killed_for_memory() >= 0, "of this machine"
