"""Which failures start again, without which node, and which never do."""

import pytest
import torch

from src.cluster.diagnosis.hang import Hang, compare
from src.cluster.diagnosis.rank_failure import Kind, RankFailure, classify
from src.cluster.diagnosis.verdict import Evidence, capped, judge
from src.cluster.slurm.job_log import findings
from src.distributed.process.preflight import PreflightError
from src.errors import DataError, SampleError

NODES = ("a", "a", "b", "b")


LOST = """srun: error: Aborting, io error and missing step on node 1
srun: Job step aborted: Waiting up to 12 seconds for job step to finish.
srun: error: a: task 0: Killed
"""


def failure(rank: int, kind: Kind, time_ns: int, bad_node: str | None = None) -> RankFailure:
    return RankFailure(rank, NODES[rank], time_ns, kind, f"{kind} of rank {rank}", "", bad_node)


def evidence(*found: RankFailure, log: str = "", hang: Hang | None = None, saved: bool = False) -> Evidence:
    return Evidence(sorted(found, key=lambda each: each.time_ns), findings(log, NODES), hang, NODES, saved)


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
    before = [{"action": "requeue", "checkpoint": step} for step in ("step_1", "step_2", "step_2")]
    assert capped(verdict, before[:2], "step_2", 3).action == "requeue"
    assert "without a new checkpoint" in capped(verdict, before, "step_2", 4).words
    assert capped(verdict, before, "step_3", 4).action == "requeue"
    assert "cluster.requeues=3 are used up" in capped(verdict, before, "step_3", 3).words
    assert capped(verdict, [], None, 0).action == "stop"


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
