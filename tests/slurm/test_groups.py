"""Replica groups as jobs of their own: one is killed, then taken away, comes back and leaves no trace in the losses."""

import os
import signal
from pathlib import Path

import pytest

from src.runs.folder import attempts
from src.runs.lock import Lock
from tests.end_to_end.lives import series
from tests.slurm.runs import Held, Site, told_by, until

pytestmark = pytest.mark.slow

ARGV = (
    *("fault_tolerance=torchft", "fault_tolerance.heartbeat_seconds=2.0", "fault_tolerance.join_seconds=2.0"),
    *("parallel=single", "task.steps=30"),
)


def test_a_group_that_dies_or_is_requeued_comes_back_and_the_lighthouse_outlives_it(site: Site) -> None:
    site.brake("groups").write_text("7")
    told = told_by(site.launch(*site.named("groups"), *ARGV).stderr)
    first, second, lighthouse = (Held(site.cluster, each, site.brake("groups")) for each in told)
    assert [first.job.partition("_")[0], first.job.partition("_")[2], second.job.partition("_")[2]] == [
        second.job.partition("_")[0],
        "0",
        "1",
    ]
    mark = Path(f"{site.brake('groups')}.rank_0")
    until(mark.exists, first.story)  # one of them, and the other is on its way
    until(lambda: attempts(second.folder), second.story)
    owner = Lock(second.folder / "lock").owner()
    assert owner is not None
    os.kill(owner["pid"], signal.SIGKILL)
    second.until_restarted(2)
    (verdict,) = second.verdicts()
    assert (verdict["kind"], verdict["action"]) == ("died", "requeue"), second.story()
    site.cluster.run("scontrol", "requeue", second.job)
    second.until_restarted(3)
    first.loosen()
    for group in (first, second):
        assert group.until_ended().ended == "finished", group.story()
    run = first.folder.parents[1]
    site.launch("name=whole", "cluster.gpus=0", "parallel=single", "task.steps=30")
    (whole,) = Path(site.folder / "runs").glob("whole-*")
    assert series(run) == pytest.approx(series(whole), rel=1e-4)
    assert len(attempts(first.folder)) == 1, "the other one's ends are nothing to it"
    until(lambda: lighthouse.state() in ("COMPLETED", ""), lighthouse.story)
    assert [attempt.ended for attempt in attempts(run)] == ["finished"]
