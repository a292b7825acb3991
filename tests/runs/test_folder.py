"""Create, resume, refuse, race and lock."""

import json
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from src.cluster.rank import RankJob, run_rank
from src.cluster.slurm.scheduler import SlurmScheduler
from src.config.tree import read
from src.errors import FolderError
from src.runs.folder import RunFolder, attempts, end, log_folder
from src.runs.frozen_code import verify
from src.runs.lock import Lock
from src.version import VERSION

TREE: dict[str, Any] = {
    "name": "a",
    "seed": 0,
    "optim": {"lr": 0.1},
    "parallel": {"shard": 2},
    "cluster": {"threads": 1},
}


@pytest.fixture
def code(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "src/__pycache__").mkdir(parents=True)
    (root / "src/a.py").write_text("one = 1\n")
    (root / "src/__pycache__/a.pyc").write_text("cache")
    (root / "launch.py").write_text("print()\n")
    return root


def start(root: Path, code: Path, tree: dict[str, Any] | None = None, **options: Any) -> RunFolder:
    given = {"root": root, "name": "a", "identity": "01234567", "repository": code} | options
    return RunFolder.open(TREE if tree is None else tree, {"world": 2}, **given)


def problems(error: pytest.ExceptionInfo[FolderError]) -> str:
    return "\n".join(error.value.problems)


def test_creates_everything(tmp_path: Path, code: Path) -> None:
    with start(tmp_path, code) as folder:
        assert folder.path == tmp_path / "a-01234567"
        assert not folder.resumed
        assert read(folder.path / "config.yaml") == TREE
        assert json.loads((folder.path / "plan.json").read_text()) == {"world": 2}
        assert json.loads((folder.path / "git.json").read_text())["sha"] is None  # said, not an error
        assert (folder.path / "version").read_text() == f"{VERSION}\n"
        frozen = folder.path / "code" / folder.code
        assert sorted(str(p.relative_to(frozen)) for p in frozen.rglob("*.py")) == ["launch.py", "src/a.py"]
        attempt = folder.begin(world=2)
        assert read(log_folder(folder.path, attempt.number) / "config.yaml") == TREE
        job = RankJob(folder.path, folder.code)
        assert pickle.loads(pickle.dumps(job)) == job


def test_git_facts_and_only_files_that_git_does_not_ignore(tmp_path: Path, code: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *who, *arguments], cwd=code, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q", "-b", "trunk")
    (code / ".gitignore").write_text("*.log\n__pycache__\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    (code / "src/a.py").write_text("one = 2\n")
    (code / "src/new.py").write_text("")
    (code / "src/run.log").write_text("ignored")
    with start(tmp_path, code) as folder:
        facts = json.loads((folder.path / "git.json").read_text())
        assert (facts["sha"], facts["branch"], facts["dirty"]) == (git("rev-parse", "HEAD"), "trunk", True)
        assert "+one = 2" in (folder.path / "git.diff").read_text()
        frozen = folder.path / "code" / folder.code / "src"
        assert sorted(p.name for p in frozen.iterdir()) == ["a.py", "new.py"]


def test_same_config_resumes_and_unchanged_code_is_not_copied_twice(tmp_path: Path, code: Path) -> None:
    with start(tmp_path, code) as first:
        first.begin(2)
        end(first.path, "failed", "rank 1: no")
        end(first.path, "killed", "later words do not count")
    with start(tmp_path, code) as second:
        assert second.resumed
        assert not second.finished
        assert second.code == first.code
        second.begin(2)
    (code / "src/a.py").write_text("one = 3\n")
    with start(tmp_path, code) as third:
        assert third.code != first.code
        third.begin(4)
        end(third.path, "finished")
        assert third.finished
    found = attempts(third.path)
    assert [(a.number, a.world, a.ended) for a in found] == [(1, 2, "failed"), (2, 2, None), (3, 4, "finished")]
    assert len(list((third.path / "code").iterdir())) == 2


def test_another_run_is_refused_with_every_difference(tmp_path: Path, code: Path) -> None:
    start(tmp_path, code).close()
    other = TREE | {"optim": {"lr": 0.2}, "parallel": {"shard": 4}, "seed": 1}
    with pytest.raises(FolderError) as error:
        start(tmp_path, code, other)
    assert error.value.problems[1:] == ("seed: 0 -> 1", "optim.lr: 0.1 -> 0.2")
    assert read(tmp_path / "a-01234567/config.yaml") == TREE, "a refusal changes nothing"
    start(tmp_path, code).close()  # and holds nothing


def test_operational_changes_are_taken_and_recorded(tmp_path: Path, code: Path) -> None:
    start(tmp_path, code).close()
    other = TREE | {"parallel": {"shard": 4}, "cluster": {"threads": 9}, "task": {"log_every": 3}}
    with start(tmp_path, code, other, folder=tmp_path / "a-01234567", identity="ffffffff") as folder:
        assert folder.begin(4).changed == ("parallel.shard: 2 -> 4", "task.log_every: absent -> 3")
        assert read(folder.path / "config.yaml") == other


@pytest.mark.parametrize("blocked", ["a-01234567", "."])
def test_a_file_in_the_way(tmp_path: Path, code: Path, blocked: str) -> None:
    root = tmp_path / "runs"
    (root if blocked == "." else root / blocked).parent.mkdir(exist_ok=True)
    (root if blocked == "." else root / blocked).write_text("a file")
    with pytest.raises(FolderError, match="a file is where a folder belongs"):
        start(root, code)


def test_a_root_that_cannot_be_written(code: Path) -> None:
    with pytest.raises(FolderError, match="that you may write"):
        start(Path("/proc/runs"), code)  # not even root may make folders there


def test_somebody_elses_folder(tmp_path: Path, code: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    with pytest.raises(FolderError, match=r"not empty either \(thesis.tex\)"):
        start(tmp_path, code, folder=tmp_path / "mine")


def test_an_unreadable_config_is_not_taken_for_a_new_run(tmp_path: Path, code: Path) -> None:
    start(tmp_path, code).close()
    (tmp_path / "a-01234567/config.yaml").write_text("a: [")
    with pytest.raises(FolderError, match="cannot be told from another"):
        start(tmp_path, code)


def test_edited_frozen_code_is_refused_and_then_replaced(tmp_path: Path, code: Path) -> None:
    with start(tmp_path, code) as folder:
        frozen = folder.path / "code" / folder.code
    verify(frozen)
    (frozen / "src/a.py").write_text("one = 4\n")
    with pytest.raises(FolderError, match="the frozen code was edited"):
        run_rank(RankJob(folder.path, folder.code))
    start(tmp_path, code).close()
    verify(frozen)


def test_a_torn_line_of_attempts_loses_no_other(tmp_path: Path, code: Path) -> None:
    with start(tmp_path, code) as folder:
        folder.begin(2)
        with (folder.path / "attempts.jsonl").open("a") as file:
            file.write('{"number": 1, "end')
        end(folder.path, "failed", "no")
        assert [a.ended for a in attempts(folder.path)] == ["failed"]


def test_racing_starts_in_one_process(tmp_path: Path, code: Path) -> None:
    results: list[RunFolder | str] = []
    barrier = threading.Barrier(8)

    def race() -> None:
        barrier.wait()
        try:
            results.append(start(tmp_path, code))
        except FolderError as error:
            results.append(error.problems[0])

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [each for each in results if isinstance(each, RunFolder)]
    assert len(winners) == 1
    assert all("live" in each or "starting" in each for each in results if isinstance(each, str))
    winners[0].close()
    start(tmp_path, code).close()


def _take(path: Path, taken: Any, go_on: Any) -> None:
    Lock(path).take()
    taken.set()
    go_on.wait()
    os._exit(1)  # without releasing


def test_the_lock_of_a_live_process_refuses_and_that_of_a_dead_one_does_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    taken, go_on = context.Event(), context.Event()
    owner = context.Process(target=_take, args=(tmp_path / "lock", taken, go_on))
    owner.start()
    assert taken.wait(60)
    with pytest.raises(FolderError) as error:
        Lock(tmp_path / "lock").take()
    assert f"process {owner.pid} on {socket.gethostname()}" in problems(error)
    assert f"kill -TERM {owner.pid}" in problems(error)
    go_on.set()
    owner.join()
    lock = Lock(tmp_path / "lock")
    lock.take()
    lock.release()
    lock.release()
    Lock(tmp_path / "lock").take()


@pytest.mark.parametrize("content", ["{}", "[1]", '{"pid": 1}', '{"host": "n1", "since": "2020", "pid"', "\0"])
def test_a_lock_that_nobody_of_ours_wrote_is_free(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    Lock(tmp_path / "lock").take()


def test_a_lock_of_another_machine_needs_a_person_or_the_same_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"pid": 1, "host": "elsewhere", "since": "2020"}
    (tmp_path / "lock").write_text(json.dumps(record))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(FolderError, match="if that machine is gone, remove"):
        Lock(tmp_path / "lock", SlurmScheduler()).take()
    (tmp_path / "lock").write_text(json.dumps(record | {"job": "77"}))
    with pytest.raises(FolderError, match="scancel 77"):
        Lock(tmp_path / "lock", SlurmScheduler()).take()
    monkeypatch.setenv("SLURM_JOB_ID", "77")  # requeued on another node
    Lock(tmp_path / "lock", SlurmScheduler()).take()


@pytest.mark.parametrize(
    "name", ["yaml.py", "sitecustomize.py", "evil.pth", "src/a.so", "src/b/__init__.py", "src/link"]
)
def test_code_that_was_added_to_the_frozen_code_is_refused_by_name(tmp_path: Path, code: Path, name: str) -> None:
    with start(tmp_path, code) as folder:
        frozen = folder.path / "code" / folder.code
    (frozen / name).parent.mkdir(exist_ok=True)
    if name == "src/link":
        (frozen / name).symlink_to(tmp_path)
    else:
        (frozen / name).write_text("")
    for act in (lambda: verify(frozen), lambda: start(tmp_path, code)):
        with pytest.raises(FolderError, match=f"holds {name}.* no part of the code that was frozen here"):
            act()
    shutil.rmtree(frozen)
    start(tmp_path, code).close()
    verify(frozen)


def test_bytecode_beside_the_frozen_code_is_never_run(tmp_path: Path, code: Path) -> None:
    """A start makes the snapshot anew without it; ranks, which write none, refuse it."""
    with start(tmp_path, code) as folder:
        frozen = folder.path / "code" / folder.code
    (frozen / "src/__pycache__").mkdir()
    (frozen / "src/__pycache__/a.cpython-311.pyc").write_bytes(b"")
    with pytest.raises(FolderError, match=r"a.cpython-311.pyc"):
        verify(frozen)
    start(tmp_path, code).close()
    verify(frozen)
    assert not (frozen / "src/__pycache__").exists()


def test_half_frozen_code_of_a_killed_launcher_is_removed(tmp_path: Path, code: Path) -> None:
    start(tmp_path, code).close()
    (tmp_path / "a-01234567/code/0a0a0a0a.partial-77/src").mkdir(parents=True)
    with start(tmp_path, code) as folder:
        assert [each.name for each in (folder.path / "code").iterdir()] == [folder.code]


def test_a_config_that_was_cut_short_is_restored_as_advised(tmp_path: Path, code: Path) -> None:
    """From any length: some are whole YAML of fewer keys, which would be another run."""
    with start(tmp_path, code) as folder:
        folder.begin(2)
    config = folder.path / "config.yaml"
    content = config.read_bytes()
    for size in range(len(content)):
        config.write_bytes(content[:size])
        with pytest.raises(FolderError, match="cannot be told from another") as caught:
            start(tmp_path, code)
        (advice,) = re.findall(r"`(cp .*?)` and run the same command again", problems(caught))
        if size % 20 == 0:
            subprocess.run(shlex.split(advice), check=True)
            start(tmp_path, code).close()
            assert config.read_bytes() == content


@pytest.mark.parametrize("line", ["null", "[1]", "7", '{"number": 3}', '{"number": 4, "started": "x"}', "\x00\xff"])
def test_a_strange_line_of_attempts_is_passed_over(tmp_path: Path, code: Path, line: str) -> None:
    with start(tmp_path, code) as folder:
        folder.begin(2)
        with (folder.path / "attempts.jsonl").open("ab") as file:
            file.write(line.encode("latin-1") + b"\n")
        end(folder.path, "failed", "no")
        assert [a.ended for a in attempts(folder.path)] == ["failed"]


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", b"", b"7", b"\x00"])
def test_garbage_in_config_yaml_is_told(tmp_path: Path, code: Path, content: bytes) -> None:
    start(tmp_path, code).close()
    (tmp_path / "a-01234567/config.yaml").write_bytes(content)
    with pytest.raises(
        FolderError, match=r"config.yaml: unreadable, so this run cannot be told from another; restore or"
    ):
        start(tmp_path, code)
