"""Whatever ends a job early, the run goes on from its newest checkpoint, with the losses of a run left alone."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from src.runs.folder import attempts
from tests.slurm.runs import STEPS, Held, Site, until

pytestmark = pytest.mark.slow


def records(run: Held) -> list[dict[str, object]]:
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def first_steps(run: Held) -> list[int]:
    """Where each attempt began."""
    firsts: dict[int, int] = {}
    for line in records(run):
        firsts.setdefault(int(str(line["attempt"])), int(str(line["step"])))
    return list(firsts.values())


def seconds_between(run: Held) -> list[float]:
    """From the last step of an attempt to the first one of the next: what an interruption costs."""
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for line in records(run):
        first.setdefault(str(line["attempt"]), float(str(line["time"])))
        last[str(line["attempt"])] = float(str(line["time"]))
    return [round(begin - end, 1) for end, begin in zip(last.values(), list(first.values())[1:], strict=False)]


def assert_whole(run: Held, straight: dict[int, float]) -> None:
    assert run.until_ended().ended == "finished", run.story()
    print(f"{run.folder.name}: from step to step over an interruption {seconds_between(run)} s")  # pytest -rP
    assert run.losses() == straight
    assert list(run.losses()) == list(range(1, STEPS + 1))
    assert {attempt.job for attempt in attempts(run.folder)} == {run.job}, "one job for ever"


def held(site: Site, name: str, *argv: str, fault: str = "", warm: bool = True) -> Held:
    """A run that waits after step 7, with a checkpoint of step 5."""
    site.brake(name).write_text("7")
    run = site.submit(name, "checkpoint.every=5", *argv, fault=fault, warm=warm)
    run.until_held()
    return run


def test_a_time_limit(site: Site, straight: dict[int, float]) -> None:
    run = held(site, "limit", "cluster.minutes=60", "cluster.grace_seconds=3000")
    site.cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=50")  # 50 minutes are within the grace
    run.until_restarted(2)
    site.cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=60")  # or it is soon within the grace again
    run.loosen()
    assert_whole(run, straight)
    assert attempts(run.folder)[0].ended == "stopped"
    assert first_steps(run)[:2] == [1, 9], "the step in which the signal was agreed on is saved"
    assert "this job is" in run.log.read_text(), "submitit's handler had the last word"


def test_a_save_that_does_not_fit_before_the_time_limit(site: Site, straight: dict[int, float]) -> None:
    """It is given up in time, instead of the whole run; tests/cluster/test_deadline.py has when it is not."""
    run = held(site, "slow", "cluster.grace_seconds=3000", fault="slow")
    limit(run)
    run.hold(9)
    until(run.verdicts, run.story)
    site.cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=60")
    run.until_restarted(2)
    run.loosen()
    assert_whole(run, straight)
    (verdict,) = run.verdicts()
    assert (verdict["kind"], verdict["action"], verdict["checkpoint"]) == ("late", "requeue", "step_00000005")
    assert [attempt.ended for attempt in attempts(run.folder)] == ["killed", "finished"], run.story()
    assert first_steps(run) == [1, 6]


def limit(run: Held) -> None:
    """A time limit 40 to 100 s from now, which is within the grace; SLURM counts in minutes."""
    hours, minutes, seconds = map(int, run.fact("RunTime").split(":"))
    run.cluster.run("scontrol", "update", f"JobId={run.job}", f"TimeLimit={60 * hours + minutes + 1 + (seconds > 20)}")


def intrude(site: Site) -> str:
    """The job of somebody with a higher priority, on every node."""
    job = ("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    return site.cluster.run("sbatch", "--parsable", *job).strip()


def test_preemption_and_two_requeues(site: Site, straight: dict[int, float]) -> None:
    """Without grace time; then requeued by hand."""
    run = held(site, "preempted")
    intruder = intrude(site)
    until(lambda: run.state() == "PENDING", run.story)
    run.hold(13)
    site.cluster.run("scancel", intruder)
    run.until_restarted(2)
    run.until_held()
    site.cluster.run("scontrol", "requeue", run.job)
    run.until_restarted(3)
    run.loosen()  # not before: the ranks would go on until the signal comes
    assert_whole(run, straight)
    assert [attempt.ended for attempt in attempts(run.folder)] == ["stopped", "stopped", "finished"], run.story()
    assert first_steps(run) == [1, 9, 15]


def test_preemption_with_grace_frees_the_nodes_as_soon_as_it_has_saved(site: Site, straight: dict[int, float]) -> None:
    run = held(site, "graced", "cluster.partition=graced")
    intruder = intrude(site)
    until(lambda: attempts(run.folder)[0].ended is not None, run.story)
    # At once: nobody needs its nodes any more, and still it has not done all of its steps.
    site.cluster.run("scancel", intruder)
    run.until_restarted(2)
    run.loosen()
    assert_whole(run, straight)
    assert first_steps(run) == [1, 9]


def test_a_signal_sent_by_hand(site: Site, straight: dict[int, float]) -> None:
    """To the ranks alone, then to the batch script and srun, too."""
    run = held(site, "signalled")
    site.cluster.run("scancel", "--signal=USR2", run.job)
    until(lambda: attempts(run.folder)[0].ended is not None, run.story)  # before the brake lets go by itself
    run.hold(13)
    run.until_restarted(2)
    run.until_held()
    site.cluster.run("scancel", "--full", "--signal=USR2", run.job)
    run.until_restarted(3)
    run.loosen()
    assert_whole(run, straight)
    assert [attempt.ended for attempt in attempts(run.folder)] == ["stopped", "stopped", "finished"], run.story()
    assert first_steps(run) == [1, 9, 15]


def test_a_dead_node_is_left_out(site: Site, straight: dict[int, float]) -> None:
    run = held(site, "killed", warm=False)  # so that a rank's parent is its step daemon
    nodes = re.findall(r"n\d", site.cluster.run("scontrol", "show", "hostnames", run.fact("NodeList")))
    rank = run.until_held()[1]
    daemon = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(daemon, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{rank}").exists(), "a rank outlived its step daemon")
    run.loosen()
    run.until_restarted(2)
    assert run.fact("ExcNodeList") == nodes[1], run.story()
    assert_whole(run, straight)
    assert first_steps(run) == [1, 6], "nothing was saved after the last checkpoint"
    (verdict,) = run.verdicts()
    assert (verdict["action"], verdict["node"]) == ("requeue", nodes[1])


def test_a_cancelled_run_has_saved_and_stays_down(site: Site, straight: dict[int, float]) -> None:
    run = held(site, "cancelled")
    site.cluster.run("scancel", run.job)
    assert run.until_ended().ended == "stopped"
    assert run.state() in ("CANCELLED", "")
    run.loosen()
    again = site.submit("cancelled", "checkpoint.every=5")
    assert again.folder == run.folder
    assert again.until_ended().ended == "finished"
    assert again.losses() == straight
