"""The fault drill (benchmarks/faults): a small round of it on real runs, and that it sees what is lost."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks.faults import __main__ as drills
from benchmarks.faults import lives
from benchmarks.faults.__main__ import main
from benchmarks.faults.faults import FAULTS, RUN_FILES, Fault, no_small_disk
from benchmarks.faults.lives import MARK, STEPS, Process, Round, Starter, future

NOBODY = 2**22 + 1  # beyond the largest process id that Linux gives


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A drill that lost something keeps its folder: let that be one of the test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.slow
def test_a_small_round(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole drill is for `python -m benchmarks.faults --rounds 40`: minutes."""
    argv = ("--rounds", "2", "--seed", "3", "--layout", "single", "--only", "9 of a rank;metrics")
    code = main(argv)
    said = capsys.readouterr().out
    assert code == 0, said
    assert "2 rounds, nothing lost" in said
    assert said.count(" | 1 | 1 | 1 | 0 | ") == 2


class Ended:
    """A life without a process: all that it does is done as it begins."""

    def __init__(self, code: int) -> None:
        self.pid, self.returncode = NOBODY, code

    def poll(self) -> int:
        return self.returncode


def fine(folder: Path, life: int) -> int:
    """Nothing is spoiled."""
    return 0


def pretended(spoil: Callable[[Path, int], int] = fine) -> Starter:
    """A command line that fills its run folder at once; `spoil(folder, which life of it)` then returns an exit code."""
    lives_of: dict[str, int] = {}

    def start(argv: tuple[str, ...], environment: dict[str, str], log: Path) -> Process:
        folder = Path(environment[MARK])
        lives_of[folder.name] = number = lives_of.get(folder.name, 0) + 1
        last = folder / "checkpoints" / f"step_{STEPS:08d}"
        last.mkdir(parents=True, exist_ok=True)
        (last / "__0_0.distcp").write_bytes(b"weights")
        (last / "COMPLETE.json").write_text("{}")
        for name in RUN_FILES:
            (folder / name).write_text("{}")
        lines = [json.dumps({"step": step, "loss": 6.0 - step / 100, "time": 1e9}) for step in range(1, STEPS + 1)]
        (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return Ended(0 if folder.name.startswith("undisturbed") else spoil(folder, number))

    return start


def drill(spoil: Callable[[Path, int], int], only: str = "of the launcher") -> int:
    return main(("--rounds", "1", "--layout", "single", "--only", only), pretended(spoil))


def test_all_faults_of_a_run_that_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    unlike = ("disk full", "two launchers at once")  # these ask what the lives said
    others = ";".join(each.name for each in FAULTS if "checkpoint" not in each.name and each.name not in unlike)
    assert main(("--only", others, "--rounds", "9"), pretended()) == 0
    assert "9 rounds, nothing lost" in capsys.readouterr().out


def test_a_planted_loss_is_seen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def one_bit(folder: Path, life: int) -> int:
        file = folder / "metrics.jsonl"
        if life == 2:
            file.write_text(file.read_text().replace('"loss": 5.7,', '"loss": 5.700000000000001,'))
        return 0

    result = tmp_path / "results.json"
    argv = ("--rounds", "1", "--layout", "single", "--only", "of the launcher", "--json", str(result))
    assert main(argv, pretended(one_bit)) == 1
    said = capsys.readouterr().out
    assert "| kill -9 of the launcher | 1 | 0 | 1 | 0 | 0.0 |" in said
    assert "something was lost in 1 of 1 rounds" in said
    (row,) = json.loads(result.read_text())["faults"]
    assert (row["losses equal"], row["bytes equal"], row["found"]) == (0, 1, [])


@pytest.mark.parametrize("what", ["another byte", "a lost step", "no checkpoint", "a refusal"])
def test_every_kind_of_loss_is_seen(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(folder: Path, life: int) -> int:
        last, metrics = folder / f"checkpoints/step_{STEPS:08d}", folder / "metrics.jsonl"
        if what == "another byte":
            (last / "__0_0.distcp").write_bytes(b"weighty")
        if what == "a lost step":
            metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
        if what == "no checkpoint":
            (last / "COMPLETE.json").unlink()
        return 2 if what == "a refusal" and life == 2 else 0

    assert drill(spoil) == 1
    said = capsys.readouterr().out
    assert "something was lost in 1 of 1 rounds" in said
    assert (what == "a refusal") == ("the same command ended with code 2" in said)


def test_a_process_that_is_left_is_counted_and_ended(capsys: pytest.CaptureFixture[str]) -> None:
    left = []

    def leave(folder: Path, life: int) -> int:
        if life == 1:
            command = (sys.executable, "-c", "import time; time.sleep(600)")
            left.append(subprocess.Popen(command, env={MARK: str(folder)}, start_new_session=True))
        return 0

    with patch.object(lives, "ORPHAN_SECONDS", 0.1):
        assert drill(leave) == 1
    assert left[0].wait(10) == -9
    assert "| kill -9 of the launcher | 1 | 1 | 1 | 1 |" in capsys.readouterr().out


def test_what_a_refusal_advises_is_done(tmp_path: Path) -> None:
    def refuse(argv: tuple[str, ...], environment: dict[str, str], log: Path) -> Process:
        with log.open("a") as file:
            print(f"to go on, `mv {tmp_path}/a {tmp_path}/b` and run the same command again", file=file)
        return Ended(0 if (tmp_path / "b").exists() else 2)

    (tmp_path / "a").touch()
    one = Round("none", "single", tmp_path / "run", tmp_path, "0", refuse)
    one.go_on()
    assert (tmp_path / "b").exists()
    assert not one.result.faults_found


def test_a_drill_that_is_ended_leaves_no_disk_and_no_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told, before = list[str](), signal.getsignal(signal.SIGTERM)

    @contextmanager
    def disk() -> Iterator[Path]:
        told.append("mounted")
        try:
            yield here
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # once more, while it is being ended
            told.append("unmounted")

    def strike(_: Round) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60.0)

    with patch.object(drills, "FAULTS", (Fault("a fault", strike, place=disk),)):
        assert drill(fine, only="a fault") == 130
    assert told == ["mounted", "unmounted"]
    assert "0 rounds, nothing lost" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    assert list(here.iterdir()) == []


def test_what_a_machine_cannot_have_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with patch("os.geteuid", return_value=1000):
        assert no_small_disk() == "a small disk is mounted by root alone"
        assert drill(fine, only="disk full;of the launcher") == 0
    said = capsys.readouterr().out
    assert "| disk full | skipped: a small disk is mounted by root alone | | | | |" in said
    assert "1 rounds, nothing lost" in said


def test_a_clock_that_is_set_back(tmp_path: Path) -> None:
    pretended()((), {MARK: str(tmp_path)}, tmp_path / "log")
    before = (tmp_path / "metrics.jsonl").stat().st_mtime
    future(tmp_path, seconds=3600.0)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["step"], first["time"]) == (1, 1e9 + 3600.0)
    assert (tmp_path / "metrics.jsonl").stat().st_mtime >= before + 3599.0
