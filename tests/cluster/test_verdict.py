"""Which failures start again, without which node, and which never do."""

import errno
from datetime import datetime
from pathlib import Path

import pytest
import torch

from src.cluster.diagnosis.hang import Hang, compare
from src.cluster.diagnosis.rank_failure import Kind, RankFailure, classify
from src.cluster.diagnosis.verdict import Evidence, Headway, capped, judge
from src.cluster.slurm.job_log import findings
from src.cluster.slurm.payload import renewed
from src.distributed.process.preflight import PreflightError
from src.errors import DataError, DiskFaultError, DiskFullError, SampleError
from src.runs.records import ATTEMPTS_FILE
from src.storage.json_lines import METRICS_FILE, Lines

NODES = ("a", "a", "b", "b")


LOST = """srun: error: Aborting, io error and missing step on node 1
srun: Job step aborted: Waiting up to 12 seconds for job step to finish.
srun: error: a: task 0: Killed
"""


def failure(rank: int, kind: Kind, time_ns: int, bad_node: str | None = None) -> RankFailure:
    return RankFailure(rank, NODES[rank], time_ns, kind, f"{kind} of rank {rank}", "", bad_node)


def evidence(*found: RankFailure, log: str = "", hang: Hang | None = None, saved: bool = False) -> Evidence:
    return Evidence(sorted(found, key=lambda each: each.time_ns), findings(log, NODES), hang, NODES, saved)


def after(error: Exception, cause: OSError) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory"),
        (MemoryError(), "memory"),
        (DataError("shard 3 is cut off"), "user"),
        (PreflightError("no word of rank 3 on b", "b"), "node"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "node"),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), "peer"),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), "peer"),
        (ConnectionResetError(), "peer"),
        (OSError(errno.EIO, "Input/output error"), "disk"),
        (OSError(errno.ESTALE, "Stale file handle"), "disk"),
        (DiskFaultError.at(None, errno.EAGAIN, 301.0), "disk"),
        (DiskFullError.at(Path("/shared"), errno.ENOSPC, 0, 1), "user"),
        (PermissionError(errno.EACCES, "Permission denied"), "code"),
        (after(DataError("shard 3 cannot be read"), OSError(errno.EIO, "Input/output error")), "disk"),
        (after(DataError("shard 3 cannot be read"), FileNotFoundError(errno.ENOENT, "No such file")), "user"),
        (after(RuntimeError("Connection closed by peer"), ConnectionResetError(errno.ECONNRESET, "reset")), "peer"),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 7"), "code"),
        (KeyError("socket"), "code"),
        (SampleError("step 1 is of samples 0 to 3, checksum ecc0d; the ranks took 0"), "code"),
    ],
)
def test_an_error_is_known_by_its_type_or_its_words(error: Exception, kind: str) -> None:
    assert classify(error) == kind


@pytest.mark.parametrize("kind", ["memory", "user", "code"])
def test_what_would_fail_again_is_not_started_again(kind: Kind) -> None:
    """Also when peers noticed, and wrote, first."""
    verdict = judge(evidence(failure(0, "peer", 1), failure(3, kind, 2), log="srun: error: b: task 3: Killed"))
    assert (verdict.kind, verdict.action, verdict.node) == (kind, "stop", None)
    assert f"rank 3 (node b): {kind} of rank 3" in verdict.words


@pytest.mark.parametrize(
    ("given", "kind", "node"),
    [
        (evidence(failure(0, "peer", 1), failure(2, "node", 2, "b")), "node", "b"),
        (evidence(failure(0, "peer", 1), failure(2, "disk", 2), hang=Hang(3, "rank 3 never entered it")), "disk", None),
        (evidence(failure(0, "peer", 1), log="srun: error: Node failure on b\n"), "node", "b"),
        (evidence(failure(0, "peer", 1), log="srun: error: b: task 2: Killed\nsrun: error: a: task 0: x"), "died", "b"),
        (evidence(failure(0, "peer", 1), log=LOST), "node", "b"),
        (
            evidence(log="srun: error: Task launch for StepId=7.0: aborting, io error with slurmstepd on node 0"),
            "node",
            "a",
        ),
        (evidence(failure(0, "peer", 1), log=LOST.partition("\n")[2]), "peer", "b"),
        (evidence(log=LOST.partition("\n")[2]), "peer", None),
        (evidence(failure(0, "peer", 1), hang=Hang(3, "rank 3 (node b) never entered all_gather #9")), "hang", "b"),
        (evidence(failure(0, "peer", 1), hang=Hang(3, "rank 3 left no dump", silent=True)), "hang", "b"),
        (evidence(log="srun: error: a: task 0: Killed", hang=Hang(3, "rank 3 left no dump", silent=True)), "died", "a"),
        (evidence(failure(0, "peer", 1), failure(1, "peer", 2)), "peer", "b"),
        (evidence(failure(0, "peer", 1), failure(2, "peer", 2)), "peer", None),
        (evidence(), "peer", None),
        (evidence(saved=True), "saved", None),
    ],
)
def test_the_infrastructure_is_given_another_chance_elsewhere(given: Evidence, kind: str, node: str | None) -> None:
    verdict = judge(given)
    assert (verdict.kind, verdict.action, verdict.node) == (kind, "requeue", node)


def test_host_memory_is_the_users() -> None:
    log = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0.\nsrun: error: b: task 2: Killed"
    verdict = judge(evidence(failure(0, "peer", 1), log=log))
    assert (verdict.kind, verdict.action) == ("memory", "stop")
    assert "cluster.memory_gib_per_gpu" in verdict.words


def test_no_requeue_for_ever() -> None:
    verdict = judge(evidence())
    before = [{"action": "requeue", "checkpoint": step, "step": 7} for step in ("step_1", "step_2", "step_2")]
    assert capped(verdict, before[:2], Headway("step_2", 7), 3).action == "requeue"
    assert "3rd failure in a row at step 7, without" in capped(verdict, before, Headway("step_2", 7), 4).words
    assert capped(verdict, before, Headway("step_2", 8), 4).action == "requeue", "failures come at any step"
    assert "cluster.requeues=2 are used up since step_2" in capped(verdict, before, Headway("step_2", 8), 2).words
    assert capped(verdict, [], Headway(None), 0).action == "stop"
    older = [{"action": "requeue", "checkpoint": "step_2"}] * 2  # as 0.2.0 wrote them
    assert "before its first step" in capped(verdict, older, Headway("step_2"), 4).words


def test_requeues_count_since_the_newest_checkpoint() -> None:
    """A week of a failure in three hours: 56 with a step forward after each, where 20 ended the run."""
    verdict, before = judge(evidence()), list[dict[str, object]]()
    for number in range(56):
        now = Headway(f"step_{number}", number)
        assert capped(verdict, before, now, requeues=1).action == "requeue"
        before.append({"action": "requeue", "checkpoint": now.checkpoint, "step": now.step})
    assert capped(verdict, before, Headway("step_55", 56), requeues=1).action == "stop"


def dump(*collectives: tuple[str, str, int], inner: str = "[2, 3]") -> dict[str, object]:
    entries = [
        {
            "process_group": (group, "tensor" if group == "1" else "default_pg"),
            "collective_seq_id": sequence,
            "profiling_name": f"nccl:{name}",
            "time_created_ns": 1000 * sequence,
            "is_p2p": False,
        }
        for group, name, sequence in collectives
    ]
    return {"entries": entries, "pg_config": {"0": {"ranks": "[0, 1, 2, 3]"}, "1": {"ranks": inner}}}


def test_the_rank_that_never_came_is_named_with_node_and_collective() -> None:
    whole = (("0", "all_reduce", 1), ("0", "all_gather", 2))
    dumps = {rank: dump(*whole) for rank in range(4)}
    assert compare(dumps, NODES) is None
    found = compare(dumps | {1: dump(*whole[:1])}, NODES)
    assert found == Hang(1, "rank 1 (node a) never entered all_gather #2 of group default_pg")
    inner = {2: dump(*whole[:1], ("1", "reduce_scatter", 1)), 3: dump(*whole[:1])}
    found = compare(dumps | inner, NODES)
    assert found == Hang(3, "rank 3 (node b) never entered reduce_scatter #1 of group tensor"), (
        "the earliest is the cause"
    )
    pairs = {rank: dump(("1", "all_gather", 1 + rank // 2), inner=("[0, 1]", "[2, 3]")[rank // 2]) for rank in range(4)}
    assert compare(pairs, NODES) is None, "two groups of one name"
    del dumps[3]
    words = "rank 3 (node b) left no dump: it was dead or stuck before the timeout"
    assert compare(dumps, NODES) == Hang(3, words, silent=True)


def test_a_disk_that_fails_start_after_start_is_tried_as_often_as_requeues_say() -> None:
    verdict = judge(evidence(failure(2, "disk", 2)))
    before: list[dict[str, object]] = [{"action": "requeue", "checkpoint": None, "step": None, "kind": "disk"}] * 6
    assert capped(verdict, before, Headway(None), 7).action == "requeue"
    assert capped(verdict, before, Headway(None), 6).action == "stop"
    node = judge(evidence(failure(2, "node", 2, "b")))
    before = [{"action": "requeue", "checkpoint": None, "step": None, "kind": "node"}] * 3
    assert capped(node, before, Headway(None), 4).action == "requeue", "other nodes fail as well"
    at_a_step = [each | {"step": 7} for each in before]
    assert capped(node, at_a_step, Headway(None, 7), 4).action == "stop", "it may be the code"


def test_progress_is_that_of_the_newest_attempt_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000005" / "COMPLETE.json").write_text("{}")
    log, started = Lines(tmp_path / METRICS_FILE), "2026-11-30T12:00:00+00:00"
    Lines(tmp_path / ATTEMPTS_FILE).append(
        {"number": 1, "started": started, "host": "a", "world": 1, "code": "c", "sha": None, "job": "7", "changed": []}
    )
    begun = datetime.fromisoformat(started).timestamp()
    log.append({"step": 9, "time": begun - 1.0})
    assert Headway.of(tmp_path) == Headway("step_00000005", None), "it has ended before its first step"
    log.append({"step": 8, "time": begun + 2.0})
    log.append({"step": 5, "time": begun + 3.0})  # what a save has cost, told late
    log.append({"event": "finish", "time": begun + 4.0})
    assert Headway.of(tmp_path) == Headway("step_00000005", 8)


def test_time_limits_before_a_step_forward_do_not_count(tmp_path: Path) -> None:
    """submitit counts them down in what it starts next."""
    from submitit.core.utils import DelayedSubmission

    for allowed, left in ((0, 2), (20, 20)):
        made = renewed(print, allowed)
        made.set_timeout(60, 2)
        made.dump(tmp_path / "job.pkl")
        loaded = DelayedSubmission.load(tmp_path / "job.pkl")
        assert (loaded.function, loaded._timeout_min, loaded._timeout_countdown) == (print, 60, left)
