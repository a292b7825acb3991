"""Points of a sweep in the hands of a scheduler that refuses some, and what a person is told of it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from src.cluster.backend import AttemptOutcome
from src.cluster.submission import Prepared, Submitted
from src.config.build import build
from src.config.tree import write
from src.errors import DataError, PlanError, UserError
from src.launch.start import Shared, map_collecting_errors
from src.sweeps import grid as sweeps
from src.sweeps.commands import main
from src.sweeps.ledger import Ledger
from tests.cluster.fake_backend import Fake
from tests.sweeps.points import failed, finished, grid, tree

FACTS: Mapping[str, Any] = {
    "gpu_memory_gib": None,
    "gpus_per_node": 1,
    "grace_seconds": 60,
    "requeues": 3,
    "wait": False,
}


class Refusing(Fake):
    """cluster=fake, which queues nothing and refuses points whose seed is 1 while it submits, of one kind all."""

    partition: str

    def check(self, points: Sequence[tuple[Path, Mapping[str, Any]]], *, dry: bool) -> None:
        if self.partition == "gone":
            raise PlanError("cluster.partition=gone: no such partition")

    def submit_many(self, points: Sequence[Prepared]) -> list[Submitted | UserError]:
        if self.partition == "broken":
            raise PlanError("the scheduler does not answer")
        return [
            PlanError("sbatch refused: no")
            if point.plan["seed"] == 1
            else Submitted("7", point.folder.path, point.folder.path / "log", "cancel 7")
            for point in points
        ]


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """Six points, seeds 0 and 1 of three rates; the data of the last rate cannot be prepared."""

    def prepare(given: Any, run: Any, plan: Any, shared: Shared) -> tuple[Any, Any]:
        shared.tell(["warning: the vocabulary is small"])
        if given["optim"]["lr"] == 1e-3:
            raise DataError("data: no text")
        write(tmp_path / "config.yaml", given)
        folder = SimpleNamespace(path=tmp_path, close=lambda: None)
        return folder, SimpleNamespace(to_dict=lambda: {"seed": given["seed"]})

    monkeypatch.setattr(sweeps, "prepare", prepare)
    return grid(tmp_path, ["1e-4", "3e-4", "1e-3"], ["0", "1"])


def entries(ledger: Ledger, *partitions: str) -> list[sweeps.SweepEntry]:
    """Of all points; the rates in order are of these partitions."""
    clusters = {name: Refusing(partition=name, **FACTS) for name in partitions}
    found = []
    for index, point in enumerate(ledger.points()):
        cluster, off = clusters[partitions[index // 2]], SimpleNamespace(on=False)
        run: Any = SimpleNamespace(cluster=cluster, fault_tolerance=off)
        found.append(sweeps.SweepEntry(point, ledger.tree(point), run, plan=None))  # type: ignore[arg-type]
    return found


def test_each_refusal_is_told_with_its_point_and_none_stops_the_others(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweeps.hand_over(ledger, entries(ledger, "broken", "a", "a")) == 2
    told = capsys.readouterr().err
    for number, why in ((1, "the scheduler does"), (2, "the scheduler does"), (4, "sbatch"), (5, "data"), (6, "data")):
        assert f"\n{number}: {ledger.points()[number - 1].folder.name} refused\n{why}" in f"\n{told}"
    assert told.count("refused\n") == 5
    assert "\n3: " in told
    assert told.count("warning: the vocabulary is small") == 1
    refused = [point.refused for point in ledger.points()]
    assert refused == [*["the scheduler does not answer"] * 2, None, "sbatch refused: no", *["data: no text"] * 2]
    assert [point.submitted is not None for point in ledger.points()] == [False, False, True, False, False, False]


def test_all_are_submitted_before_any_is_waited_for(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = list[int]()

    def wait(runs: Sequence[Submitted], _: object) -> AttemptOutcome:
        waited.append(sum(point.submitted is not None for point in ledger.points()))
        return AttemptOutcome("finished", 0)

    monkeypatch.setattr("src.cluster.wait.wait", wait)
    assert sweeps.hand_over(ledger, entries(ledger, "a", "b", "b"), wait=True) == 2
    assert waited == [2, 2]


def test_retry_ends_with_the_code_of_what_it_could_not_hand_over(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One config that makes no run any more, one partition that is gone, and one that is taken."""
    by_seed = {entry.point.identity: entry for entry in entries(ledger, "a", "gone", "a")}
    order = iter([entry for entry in by_seed.values() if entry.point.number in (1, 3, 5)])

    def checked(_: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
        entry = next(order)
        if entry.point.number == 5:
            raise UserError("optim.lr: no such key")
        return [(entry.tree, entry.run, SimpleNamespace(to_dict=dict))]

    for point in ledger.points()[1::2]:
        finished(point, loss=3.0)
    monkeypatch.setattr(sweeps, "checked", checked)
    monkeypatch.setattr(sweeps, "ask_schedulers", lambda points: points[0][1].cluster.check([], dry=False))
    assert main(["retry", str(ledger.path)]) == 2
    assert [point.refused for point in ledger.points()[::2]] == [
        None,
        "cluster.partition=gone: no such partition",
        "optim.lr: no such key",
    ]
    assert ledger.points()[0].submitted is not None


def test_brackets_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not markup, which loses words or fails."""
    ledger = Ledger.make(tmp_path / "sweeps" / "a", ["-m"], {})
    for value in ("[bold]", "[/]", ":smile:"):
        ledger.add(tree(tmp_path, data={"text": value}), {"data.text": value})
    failed(ledger.points()[0], "ValueError: shape '[2, 3]' is [/red] of [1]")
    for command in ("status", "table"):
        assert main([command, str(ledger.path)]) == 0
        told = capsys.readouterr().out
        assert all(value in told for value in ("[bold]", "[/]", ":smile:"))
        assert command == "table" or "shape '[2, 3]' is [/red] of [1]" in told


def test_what_is_wrong_with_some_points_is_told_with_them() -> None:
    """And what is wrong with all of them is told once."""
    names = sweeps.names([{"seed": "1", "optim.lr": lr} for lr in ("1", "2", "3")])
    assert names[1] == "point 2 of 3 (optim.lr=2)"

    def act(lr: int) -> int:
        raise UserError(["all: bad", *(["optim.lr: too large"] if lr > 1 else [])])

    with pytest.raises(UserError) as caught:
        map_collecting_errors(act, [1, 2, 3], names)
    some = "point 2 of 3 (optim.lr=2); point 3 of 3 (optim.lr=3): optim.lr: too large"
    assert caught.value.problems == ("all: bad", some)
    with pytest.raises(UserError) as caught:
        map_collecting_errors(build, [{}], ["point 1 of 1"])
    assert "point 1" not in str(caught.value)


def test_a_job_that_was_taken_away_before_it_began_is_not_lost(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.cluster.slurm.client.states", lambda _: {"7": "CANCELLED"})
    for point, log in zip(ledger.points(), ("none", "slurm.jsonl"), strict=False):
        point.folder.mkdir()
        record = f'{{"job": "7", "submitted": 1.0, "log": "{point.folder / log}"}}\n'
        (point.folder / "slurm.jsonl").write_text(record)
    first, second = (now for _, now in ledger.standings()[:2])
    assert (first.state, first.detail) == ("stopped", "job 7 is CANCELLED: it was taken away before it began")
    assert (second.state, second.detail.partition(";")[0]) == ("lost", "job 7 left without a start")


def test_points_with_the_same_data_open_them_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their text would be listed and hashed for each point: 88 % of the seconds of fifty."""
    opened = list[tuple[object, ...]]()

    def prepare(*given: object, progress: bool, commits: Mapping[str, str] | None) -> Any:
        opened.append((*given, commits))
        return SimpleNamespace(preparation=SimpleNamespace(lines=lambda: ["data: 1 document"]))

    monkeypatch.setattr("src.data.prepare.prepare", prepare)
    shared, runs = Shared(), [SimpleNamespace(data=each, tokenizer="bytes", cache=tmp_path) for each in "aba"]
    found = [shared.corpus(run) for run in runs]  # type: ignore[arg-type]
    assert found[0] is found[2] is not found[1]
    begun = [shared.corpus(runs[0], {"hub": "c" * 40}) for _ in range(2)]  # type: ignore[arg-type]
    assert begun[0] is begun[1] is not found[0], "a run that has begun reads what it began with"
    assert opened == [("a", "bytes", tmp_path, None), ("b", "bytes", tmp_path, None),
                      ("a", "bytes", tmp_path, {"hub": "c" * 40})]  # fmt: skip
    assert shared.code is shared.code


class Sharing:
    """cluster=local, cluster.at_once=auto: what it starts ends as told."""

    shared, gpu_memory_gib, gpus_per_node, grace_seconds, scheduler = True, None, None, 60.0, None

    def __init__(self, codes: Mapping[int, int]) -> None:
        self.codes, self.began = codes, list[list[int]]()

    def submit_side_by_side(self, points: Sequence[Prepared], begin: Callable[[Path], bool]) -> dict[Path, int]:
        started = [point for point in points if begin(point.folder.path)]
        self.began.append([point.plan["number"] for point in started])
        return {point.folder.path: self.codes.get(point.plan["number"], 0) for point in started}

    def devices(self) -> None: ...
    def check(self, points: object, *, dry: bool) -> None: ...
    def script(self, points: object) -> str: ...  # type: ignore[empty-body]
    def submit(self, folder: object, world: int) -> None: ...
    def submit_groups(self, folder: object, world: int, options: object) -> None: ...


def test_points_that_share_this_machine_are_handed_over_together(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster, off, closed = Sharing({2: 3}), SimpleNamespace(on=False), list[Path]()
    given = []
    for point in ledger.points():
        run: Any = SimpleNamespace(cluster=cluster, fault_tolerance=off)
        given.append(sweeps.SweepEntry(point, ledger.tree(point), run, plan=None))  # type: ignore[arg-type]

    def prepare(tree: Any, run: Any, plan: Any, shared: Shared) -> tuple[Any, Any]:
        (point,) = [each.point for each in given if each.tree == tree]
        if point.number == 1:
            raise DataError("data: no text")
        folder = SimpleNamespace(path=point.folder, close=lambda: closed.append(point.folder))
        return folder, SimpleNamespace(to_dict=lambda: {"number": point.number})

    monkeypatch.setattr(sweeps, "prepare", prepare)
    monkeypatch.setattr(sweeps, "_cancelled", lambda _, point: point.number == 4)
    assert sweeps.hand_over(ledger, given) == 2
    assert cluster.began == [[2, 3, 5, 6]]
    assert closed == [point.folder for point in ledger.points()[1:]]
    assert [point.submitted is not None for point in ledger.points()] == [False, True, True, False, True, True]
    told = capsys.readouterr().err
    assert f"1: {ledger.points()[0].folder.name} refused\ndata: no text" in told
    assert f"2: {ledger.points()[1].folder.name} ended with code 3" in told
    cluster.shared = False
    assert sweeps._by_sharing(given) == ([], given)
