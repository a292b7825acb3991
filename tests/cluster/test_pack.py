"""Runs side by side: who gets what, in which order, and that no run's end is another's."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from src.cluster.local.board import Board
from src.cluster.local.config import Local, LocalDevices
from src.cluster.local.side_by_side import Node, Pack, PackedRun
from src.cluster.slurm.packing import PackedJob, filled, whole_node
from src.errors import PlanError
from src.planning.time.site import NO_FACTS
from src.runs.records import CANCEL_FILE, SUBMISSIONS_FILE
from src.storage.json_lines import Lines

NODE = Node(gpus=("4", "5", "6", "7"), cores=tuple(range(10, 18)), cpu=False, grace_seconds=5.0)


def test_nodes_are_filled_with_the_large_runs_first() -> None:
    assert filled({0: 1, 1: 4, 2: 2, 3: 1, 4: 3, 5: 1}, 8) == [[1, 4, 0], [2, 3, 5]]
    assert filled(dict.fromkeys(range(9), 1), 8) == [list(range(8)), [8]]
    assert filled({}, 8) == []


def test_a_whole_node_is_asked_for() -> None:
    own = {
        "job_name": "a",
        "ntasks_per_node": 2,
        "cpus_per_task": 12,
        "srun_args": ["--kill-on-bad-exit=1", "--cpus-per-task=12", "--container-image=x"],
        "teardown": ["code=$?"],
        "additional_parameters": {"gpus-per-node": 2, "mem": "2048M", "requeue": True},
    }
    asked = whole_node(own, runs=4, gpus=8, cores_per_gpu=12)
    assert asked["additional_parameters"] == {"gpus-per-node": 8, "mem": "8192M", "requeue": True}
    assert (asked["ntasks_per_node"], asked["cpus_per_task"], asked["job_name"]) == (1, 96, "a+3")
    assert asked["srun_args"] == ["--cpus-per-task=96", "--kill-on-bad-exit=1", "--container-image=x"]
    assert asked["teardown"] == []


def test_a_node_hands_out_the_gpus_that_the_scheduler_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6")
    assert Node.here(2, cpu=False, grace_seconds=1.0).gpus == ("2", "3")
    assert Node.here(4, cpu=True, grace_seconds=1.0).gpus == ("0", "1", "2", "3")


def test_gpus_and_cores_are_cut_without_overlap() -> None:
    pack = Pack(NODE, [])
    assert [pack._cores([slot]) for slot in range(4)] == [[10, 11], [12, 13], [14, 15], [16, 17]]
    assert pack._cores([1, 2]) == [12, 13, 14, 15]
    few = Pack(Node(NODE.gpus, (3, 4), cpu=True, grace_seconds=1.0), [])
    assert [few._cores([slot]) for slot in range(4)] == [[3], [4], [3], [4]]


class Programs(Pack):
    """Each run is a line of Python; what it was given is kept."""

    lines: dict[str, str]
    given: dict[str, tuple[int, ...]]

    def _start(self, share: PackedRun, slots: Sequence[int]) -> "subprocess.Popen[bytes]":
        self.given[share.folder.name] = tuple(slots)
        return subprocess.Popen([sys.executable, "-c", self.lines[share.folder.name]])


def programs(folder: Path, lines: dict[str, str], worlds: dict[str, int]) -> Programs:
    for name in lines:
        (folder / name).mkdir()
    pack = Programs(NODE, [PackedRun(folder / name, "c", worlds.get(name, 1)) for name in lines])
    pack.lines, pack.given = lines, {}
    return pack


def never(_: PackedRun, code: int) -> bool:
    return False


def test_each_run_has_its_own_end_and_the_next_takes_its_place(tmp_path: Path) -> None:
    wait = f"import pathlib, time\nwhile not pathlib.Path('{tmp_path}/go').exists(): time.sleep(0.05)"
    lines = {"a": wait, "b": "raise SystemExit(3)", "c": f"open('{tmp_path}/go', 'w')"}
    pack = programs(tmp_path, lines, {"a": 2, "b": 2, "c": 2})
    told: list[str] = []
    codes = pack.run(told.append, never)
    assert {folder.name: code for folder, code in codes.items()} == {"a": 0, "b": 3, "c": 0}
    assert pack.given == {"a": (0, 1), "b": (2, 3), "c": (2, 3)}, "c waited for b, and a for c"
    assert told[:3] == ["a on GPUs 4,5", "b on GPUs 6,7", "b ended with code 3"]


def test_a_cancelled_run_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    wait = f"import pathlib, time\nwhile not pathlib.Path('{tmp_path}/go').exists(): time.sleep(0.05)"
    mark = f"import time\nopen('{tmp_path}/b/{CANCEL_FILE}', 'w')\n{wait}"
    pack = programs(tmp_path, {"a": mark, "b": "import time\ntime.sleep(600)"}, {})
    codes = pack.run(lambda line: (tmp_path / "go").touch() if line.startswith("b ended") else None, never)
    assert {folder.name: code for folder, code in codes.items()} == {"a": 0, "b": -15}


def test_a_stop_reaches_all_and_starts_nothing_more(tmp_path: Path) -> None:
    script = "import os, signal, time\nos.kill(os.getppid(), signal.SIGUSR2)\ntime.sleep(600)"
    pack = programs(tmp_path, {"a": script, "b": "import time\ntime.sleep(600)", "c": "pass"}, {"a": 2, "b": 2})
    codes = pack.run(lambda _: None, never)
    assert pack.stopped
    assert {folder.name: code for folder, code in codes.items()} == {"a": -15, "b": -15}
    assert [share.folder.name for share in pack.waiting] == ["c"]


def test_a_run_whose_rank_was_killed_waits_for_its_gpus_once_more(tmp_path: Path) -> None:
    mark = tmp_path / "once"
    killed = f"import os\nseen = os.path.exists('{mark}')\nopen('{mark}', 'w')\nraise SystemExit(0 if seen else 137)"
    lines = {"a": killed, "b": "raise SystemExit(3)"}
    pack, asked = programs(tmp_path, lines, {}), list[tuple[str, int]]()

    def again(share: PackedRun, code: int) -> bool:
        asked.append((share.folder.name, code))
        return code > 128

    codes = pack.run(lambda _: None, again)
    assert {folder.name: code for folder, code in codes.items()} == {"a": 0, "b": 3}
    assert sorted(asked) == [("a", 137), ("b", 3)]


def shared(folder: Path, name: str) -> PackedRun:
    (folder / name / "checkpoints").mkdir(parents=True)
    Lines(folder / name / SUBMISSIONS_FILE).append({"job": "7", "packed": True})
    return PackedRun(folder / name, "c", 1)


def test_a_killed_run_is_tried_as_often_as_a_job_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    share = shared(tmp_path, "a")
    job = PackedJob((share,), tmp_path, 8, True, 60.0, requeues=20)
    assert not job._again(share, 1), "an error of the code"
    assert [job._again(share, 137) for _ in range(3)] == [True, True, False], "no step forward"
    assert [each["kind"] for each in Lines(share.folder / "verdicts.jsonl").read()] == ["died"] * 3


def test_a_run_that_was_cancelled_while_it_waited_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    shares = [shared(tmp_path, name) for name in "ab"]
    (shares[0].folder / CANCEL_FILE).touch()
    assert [PackedJob._ours(share) for share in shares] == [False, True]
    assert not (shares[0].folder / CANCEL_FILE).exists()


def test_memory_and_a_limit_hold_back_what_would_fit_by_cores(tmp_path: Path) -> None:
    lines = dict.fromkeys("abc", "pass")
    pack = programs(tmp_path, lines, {})
    runs = [PackedRun(tmp_path / name, "c", 1, host_bytes=each) for name, each in zip("abc", (60, 50, 30), strict=True)]

    def most_alive(node: Node) -> int:
        pack.node, pack.waiting, pack.live, alive = node, list(runs), {}, list[int]()
        pack.run(lambda _: None, never, lambda: alive.append(len(pack.live)))
        return max(alive)

    assert most_alive(replace(NODE, cpu=True)) == 3
    assert most_alive(replace(NODE, cpu=True, host_bytes=100)) == 2  # b and c, once a has ended
    assert most_alive(replace(NODE, cpu=True, most=1)) == 1
    assert most_alive(replace(NODE, cpu=True, host_bytes=10)) == 1  # alone it may try


def test_a_run_that_shall_not_begin_any_more_is_passed_over(tmp_path: Path) -> None:
    pack = programs(tmp_path, {"a": "pass", "b": "pass"}, {})
    pack.begin = lambda run: run.folder.name != "a"
    assert {folder.name: code for folder, code in pack.run(lambda _: None, never).items()} == {"b": 0}


def test_a_second_stop_ends_what_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = f"import signal, time\nsignal.signal(15, signal.SIG_IGN)\nopen('{tmp_path}/deaf', 'w')\ntime.sleep(600)"
    pack, now = programs(tmp_path, {"a": deaf}, {}), 0.0
    monkeypatch.setattr("src.cluster.local.side_by_side.time.monotonic", lambda: now)

    def look() -> None:
        nonlocal now
        if (tmp_path / "deaf").exists():
            pack.stop()
            now += 0.8  # the second within a second of the first is the same

    assert list(pack.run(lambda _: None, never, look).values()) == [-9]


def test_the_table_shows_every_run(tmp_path: Path) -> None:
    pack = Pack(NODE, [])
    for name in "abc":
        (tmp_path / name).mkdir()
    Lines(tmp_path / "a" / "metrics.jsonl").append({"attempt": 1, "step": 7, "loss": 2.5})
    pack.live[tmp_path / "a"] = (None, None, (2, 3))  # type: ignore[assignment]
    pack.codes[tmp_path / "b"] = 3
    table = Board(pack, [tmp_path / name for name in "abc"]).table()
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert cells[1] == ["running", "code 3", "waiting"]
    assert [cells[3][0], cells[4][0], cells[5][0]] == ["7", "2.5000", "2,3"]


def test_what_a_machine_gives_to_the_points_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    local = Local(gpus=0, gpu_memory_gib=None, threads=None, grace_seconds=5.0, at_once=2, **NO_FACTS)
    node = local._node(LocalDevices("cpu", None, None, "CPU", host_gib=1.0), largest=1)
    assert (len(node.gpus), node.cpu, node.host_bytes, node.most) == (len(node.cores), True, 2**30, 2)
    assert len(local._node(LocalDevices("cpu", None, None, "CPU"), largest=1000).gpus) == 1000
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    here = Local(gpus=2, gpu_memory_gib=None, threads=None, grace_seconds=5.0, at_once="auto", **NO_FACTS)
    node = here._node(LocalDevices("cuda", 2, 80.0, "GPU"), largest=2)
    assert (node.gpus, node.cpu, node.host_bytes, node.most) == (("3", "5"), False, None, None)
    with pytest.raises(PlanError, match="4 ranks need a GPU each, but 2 are visible here"):
        here._node(LocalDevices("cuda", 2, 80.0, "GPU"), largest=4)
    assert [each.shared for each in (local, here, local.model_copy(update={"at_once": None}))] == [True, True, False]
