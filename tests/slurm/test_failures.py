"""A broken machine is left behind, a broken program is not started again."""

import re

import pytest

from src.runs.folder import attempts
from tests.slurm.runs import Site, until

pytestmark = pytest.mark.slow


def test_an_error_of_the_code_stops_and_the_waiting_launcher_says_so(site: Site) -> None:
    argv = (*site.named("code", fault="code 1 7"), "checkpoint.every=5", "cluster.wait=true")
    done = site.launch(*argv, check=False)
    run = site.told("code", done.stderr)
    assert done.returncode == 1, run.story()
    (attempt,) = attempts(run.folder)
    assert (attempt.ended, "rank 1" in attempt.detail) == ("failed", True)
    (verdict,) = run.verdicts()
    assert (verdict["kind"], verdict["action"], verdict["node"]) == ("code", "stop", None)
    log = run.log.read_text()
    assert "KeyError: 'a key that nobody set'" in log
    assert log.rstrip().endswith("stop"), "the verdict is the last word of the log"
    assert run.state() == "FAILED"


def test_a_node_whose_ranks_never_arrive_is_named_and_left_out(site: Site, straight: dict[int, float]) -> None:
    run = site.submit("late", "cluster.preflight_seconds=10", fault="late n2")
    run.until_restarted(2)
    assert run.fact("ExcNodeList") == "n2", run.story()
    assert "no word for 30 s of 1 ranks; rank 1 on n2" in run.log.read_text()
    assert run.until_ended().ended == "finished", run.story()
    assert run.losses() == straight


def test_a_death_without_a_word_is_tried_elsewhere_but_not_for_ever(site: Site) -> None:
    run = site.submit("dies", "checkpoint.every=5", "cluster.requeues=1", fault="kill 1 7")
    second = run.until_restarted(2)
    assert second.number == 2
    assert run.until_ended().ended == "failed", run.story()
    first, last = run.verdicts()
    assert (first["kind"], first["action"], first["node"]) == ("died", "requeue", "n2")
    assert last["action"] == "stop"
    assert "cluster.requeues=1 are used up" in last["words"]
    assert len(attempts(run.folder)) == 2


def test_a_node_without_which_the_job_could_not_start_is_tried_again(site: Site, straight: dict[int, float]) -> None:
    """Two nodes, and the run takes both."""
    run = site.submit("pair", "cluster.partition=pair", "checkpoint.every=5", fault="once 1 7")
    run.until_restarted(2)
    assert run.fact("ExcNodeList") == "(null)", run.story()
    (verdict,) = run.verdicts()
    assert (verdict["kind"], verdict["action"], verdict["node"]) == ("died", "requeue", "n2")
    log = run.log.read_text()
    assert "requeue, without node n2 if enough others are there" in log
    assert "node n2 is not left out: without n2 too few nodes are left for this job" in log
    assert run.until_ended().ended == "finished", run.story()
    assert run.losses() == straight


def test_a_collective_that_one_rank_never_enters(site: Site, straight: dict[int, float]) -> None:
    """gloo's timeout, the dumps of both ranks, and a start without the node of the one that kept the other waiting."""
    run = site.submit("hangs", "checkpoint.every=5", fault="hang n2 7")
    run.until_restarted(2)
    (verdict,) = run.verdicts()
    assert (verdict["kind"], verdict["action"], verdict["node"]) == ("hang", "requeue", "n2"), run.story()
    assert re.search(r"rank 1 \(node n2\) never entered \w+ #\d+ of group \w+; it was at ", verdict["words"])
    assert verdict["words"].endswith(" in forget_the_others")
    assert verdict["words"] in run.log.read_text()
    kept = [file.name for file in (run.folder / "logs" / f"job_{run.job}.0").glob("rank_?")]
    assert sorted(kept) == ["rank_0", "rank_1"]
    assert run.until_ended().ended == "finished", run.story()
    assert run.losses() == straight


def test_the_batch_script_requeues_where_ranks_have_no_scontrol(site: Site, straight: dict[int, float]) -> None:
    """As in a container."""
    site.brake("deaf").write_text("7")
    run = site.submit("deaf", "checkpoint.every=5", fault="deaf")
    run.until_held()
    site.cluster.run("scancel", "--signal=USR2", run.job)
    until(lambda: run.verdicts(), run.story)
    run.until_restarted(2)
    run.loosen()
    assert run.until_ended().ended == "finished", run.story()
    assert [(each["kind"], each["action"]) for each in run.verdicts()] == [("saved", "requeue")]
    assert run.losses() == straight
