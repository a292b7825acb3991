"""What one rank of a node does for its neighbours at a start and an end, and that a start waits for a disk."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from src.cluster import rank
from src.cluster.backend import JobStart
from src.cluster.diagnosis.rank_failure import RankFailure
from src.cluster.slurm.payload import await_release, leave
from src.cluster.slurm.scheduler import SlurmScheduler
from src.storage.patience import Patience


def test_one_rank_of_a_node_asks_the_shared_disk_whether_all_may_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four nodes of eight ranks that wait for ten seconds: 20 looks a node, where there were 20 a rank."""
    looks: dict[str, int] = {"shared": 0, "near": 0}
    whole = Path.exists

    def exists(path: Path) -> bool:
        looks["shared" if path.name == "released" else "near"] += 1
        return whole(path)

    monkeypatch.setattr(Path, "exists", exists)
    for node in range(4):
        released, near = tmp_path / str(node) / "released", tmp_path / str(node) / "near"
        near.parent.mkdir()
        leader = iter(range(20))

        def later(_seconds: float, mark: Path = released, left: Iterator[int] = leader) -> None:
            if next(left, None) is None:
                mark.touch()

        await_release(released, near, leads=True, sleep=later)
        for _ in range(7):
            await_release(released, near, leads=False, sleep=lambda _: None)
    assert looks == {"shared": 4 * 22, "near": 4 * 7}


def test_a_rank_that_cannot_see_its_nodes_file_still_leaves(tmp_path: Path) -> None:
    (tmp_path / "released").touch()
    pauses: list[float] = []
    await_release(tmp_path / "released", tmp_path / "of another container", leads=False, sleep=pauses.append)
    assert sum(pauses) < 31


def lives(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Ranks of two nodes of eight that verify the code, and that record the end, where all meet this error."""
    verified, recorded, now = list[int](), list[int](), [0]

    def fails(_self: object, _run: object, _folder: Path) -> bool:
        raise error

    run = SimpleNamespace(task=SimpleNamespace(run=lambda *given: fails(None, *given)))
    monkeypatch.setattr(rank, "verify", lambda _: verified.append(now[0]))
    monkeypatch.setattr(rank, "end", lambda *_: recorded.append(now[0]))
    monkeypatch.setattr("src.config.build.build", lambda _: {})
    monkeypatch.setattr("src.run.Run.from_sections", lambda _: run)
    for number in range(16):
        now[0] = number
        facts = {"RANK": number, "WORLD_SIZE": 16, "LOCAL_RANK": number % 8, "LOCAL_WORLD_SIZE": 8}
        for key, value in facts.items():
            monkeypatch.setenv(key, str(value))
        with pytest.raises(type(error)):
            rank.run_rank(rank.RankJob(folder, "c0de"), {})
    return verified, recorded


def test_one_rank_reads_the_code_and_one_of_a_node_tells_of_a_lost_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nodes import the run folder's own code, having no place for a copy, one of each reads it."""
    assert lives(tmp_path, ConnectionResetError("by peer"), monkeypatch) == ([0], [0, 8])
    assert lives(tmp_path, KeyError("its own"), monkeypatch) == ([0], [*range(16)])
    monkeypatch.setattr(rank, "imported", lambda: (tmp_path / "code/c0de").resolve())
    assert lives(tmp_path, ConnectionResetError("by peer"), monkeypatch) == ([0, 8], [0, 8])


def test_a_start_waits_for_a_disk_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the config, which a person must mend if it is wrong."""
    (tmp_path / "config.yaml").write_text("name: tiny\n")
    pauses, left, whole = list[float](), [2], Path.read_text

    def sick(path: Path, *more: Any, **named: Any) -> str:
        if path.name == "config.yaml" and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return whole(path, *more, **named)

    seen: list[object] = []
    run = SimpleNamespace(task=SimpleNamespace(run=lambda *_: True))
    monkeypatch.setattr(Path, "read_text", sick)
    monkeypatch.setattr(rank, "Patience", lambda: Patience(sleep=pauses.append))
    monkeypatch.setattr(rank, "end", lambda *_: None)
    monkeypatch.setattr("src.config.build.build", seen.append)
    monkeypatch.setattr("src.run.Run.from_sections", lambda _: run)
    assert rank.run_rank(rank.RankJob(tmp_path, None))
    assert (pauses, [tree["name"] for tree in seen if isinstance(tree, dict)]) == ([1.0, 2.0], ["tiny"])


def test_a_lost_peer_leaves_a_file_of_each_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two nodes of eight ranks; who failed itself has the word wherever it is."""
    where = tmp_path / "logs" / "job_7.0"
    monkeypatch.setattr(SlurmScheduler, "current_start", lambda _: JobStart("7", 0, ("a", "b")))
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("src.cluster.diagnosis.rank_failure.gather_traces", lambda *_: None)

    def left(_code: int) -> None:
        raise SystemExit

    monkeypatch.setattr(os, "_exit", left)
    for number in range(16):
        error: Exception = KeyError("its own") if number == 11 else ConnectionResetError("by peer")
        told = RankFailure.of(error, number, "ab"[number // 8])
        with pytest.raises(SystemExit):
            leave(told, tmp_path, error, leads=number % 8 == 0)
    assert sorted(file.name for file in where.iterdir()) == [f"rank_{number}.error.json" for number in (0, 11, 8)]
    assert capsys.readouterr().err.count("\n") < 16 * 2 + 3 * 2
