"""What a project does beyond one run: data that a job of their own prepares, and stages."""

import re
from pathlib import Path

import pytest

from src.runs.folder import attempts
from tests.end_to_end.lives import series
from tests.slurm.runs import STEPS, Held, Site, until
from tests.slurm.test_preemption import first_steps, intrude

pytestmark = pytest.mark.slow
OTHER = "data.validation_fraction=0.2"  # than that of all other runs: these data nobody has prepared yet


def test_a_run_is_submitted_behind_the_job_that_prepares_its_data(site: Site) -> None:
    """The command that waits is typed by a job of its own, once the data are there."""
    gate = site.folder / "gate"
    gate.touch()
    closed = f"cluster.setup=['while [ -e {gate} ]; do sleep 0.2; done']"
    preparing = site.told("prepared", site.type("task=prepare", "name=prepared", *site.data, OTHER, *site.site(),
                                                closed).stderr)  # fmt: skip
    behind = ("name=behind", OTHER, f"cluster.after=['{preparing.folder}']", *site.site(), "task.steps=2")
    told = site.launch(*behind).stderr
    found = re.search(rf"job (\S+) starts this command when {preparing.job} ended well, .*; log: (\S+)", told)
    assert found is not None, told
    starter, log = found[1], Path(found[2])
    assert site.cluster.run("squeue", "--noheader", f"--jobs={starter}", "--format=%T %r").split() == [
        "PENDING",
        "Dependency",
    ]
    assert not [*(site.folder / "runs").glob("behind-*")], "nothing is made, and nothing tokenised, before its time"
    gate.unlink()
    preparing.until_gone()
    until(lambda: log.exists() and "log: " in log.read_text(), preparing.story)
    run = site.told("behind", log.read_text())
    assert "from the cache" in log.read_text(), "the other job has tokenised it"
    assert run.until_ended().ended == "finished", run.story()
    assert list(run.losses()) == [1, 2]


STAGES = f"stages=[{{until:{STEPS // 2},global_batch:2}},{{global_batch:4,lr:1e-3,seq_len:16}}]"


def test_a_run_that_is_preempted_in_its_second_stage_goes_on_in_it(site: Site) -> None:
    site.launch("name=straight_stages", STAGES, "cluster.gpus=0")
    (alone,) = (site.folder / "runs").glob("straight_stages-*")
    run = held_in_second(site)
    intruder = intrude(site)
    until(lambda: run.state() == "PENDING", run.story)
    site.cluster.run("scancel", intruder)
    run.until_restarted(2)
    run.loosen()
    assert run.until_ended().ended == "finished", run.story()
    assert run.losses() == series(alone)
    assert series(run.folder, "stage") == {step: 1.0 + (step > STEPS // 2) for step in range(1, STEPS + 1)}
    assert [attempt.ended for attempt in attempts(run.folder)] == ["stopped", "finished"], run.story()
    assert first_steps(run) == [1, 15]


def held_in_second(site: Site) -> Held:
    """After step 13, with a checkpoint of step 10, where its first stage has ended."""
    site.brake("stages").write_text("13")
    run = site.submit("stages", STAGES, "checkpoint.every=5")
    run.until_held()
    return run
