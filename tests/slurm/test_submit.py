"""What goes to sbatch, what comes back, and that nothing of the work tree matters afterwards."""

import json
import re
import subprocess
import sys

import pytest

from src.cluster.submission import all_submitted
from src.runs.folder import attempts
from src.runs.submissions import submissions
from tests.end_to_end.lives import series
from tests.slurm.points import prepared, slurm
from tests.slurm.runs import STEPS, Site, told_by, until


def test_a_run_is_submitted_from_a_frozen_folder(site: Site, straight: dict[int, float]) -> None:
    """Held at step 3, while both conf/ and src/ change under it, and requeued: it ends as it was asked to."""
    site.brake("frozen").write_text("3")
    run = site.submit("frozen", "checkpoint.every=2", warm=False)
    assert run.state() in ("PENDING", "CONFIGURING", "RUNNING"), "launch.py returned while the job was still to come"
    loop, defaults = site.repository / "src/train/loop.py", site.repository / "conf/task/pretrain.yaml"
    before = loop.read_text(), defaults.read_text()
    loop.write_text("raise SystemExit('this is not the code that was submitted')\n")
    defaults.write_text(before[1].replace("log_every", "logs_every"))
    try:
        run.until_held()
        site.cluster.run("scontrol", "requeue", run.job)
        run.until_restarted(2)
        run.loosen()  # not before: it could end before the signal comes
        assert run.until_ended().ended == "finished", run.story()
    finally:
        loop.write_text(before[0])
        defaults.write_text(before[1])
    assert run.losses() == straight
    log = run.log.read_text()
    first, second = run.fact("NodeList").replace("n[", "n").replace("]", "").replace("-", ",n").split(",")
    assert f"{first}: rank 0 on cpu\n{second}: rank 1 on cpu\n" in log
    again = site.launch("name=frozen", *site.site(), "checkpoint.every=2", check=False)
    assert "finished before" in again.stderr


@pytest.mark.slow
def test_a_queued_run_is_not_submitted_twice(site: Site) -> None:
    site.brake("twice").write_text("1")
    run = site.submit("twice")
    again = site.launch("name=twice", *site.site(), check=False)
    assert again.returncode == 2
    assert f"wait for it, or scancel {run.job}" in again.stderr, "whether it waits already or runs"
    site.cluster.run("scancel", run.job)
    run.until_gone()
    assert len(submissions(run.folder)) == 1


@pytest.mark.slow
def test_what_the_partition_cannot_give_is_refused_before_sbatch(site: Site) -> None:
    for dry in ("dry_run=true", "dry_run=false"):
        done = site.launch("cluster=slurm", "cluster.partition=lwo", "name=refused", dry, check=False)
        assert done.returncode == 2
        told = "cluster.partition=lwo: no such partition; did you mean low? there are: graced, high, low, pair"
        assert told in done.stderr
    wrong = (
        "cluster.partition=high",
        "cluster.minutes=9000",
        "cluster.cpus_per_gpu=60",
        "cluster.memory_gib_per_gpu=12",
    )
    done = site.launch("cluster=slurm", *wrong, "name=refused", check=False)
    assert done.returncode == 2
    for line in (
        "cluster.minutes=9000: partition high allows at most 60",
        "cluster.cpus_per_gpu=60 for 2 ranks per node: nodes of high have 64 cores; at most 32",
        "cluster.memory_gib_per_gpu=12 for 2 ranks per node: nodes of high have 19.5 GiB; at most 9.7",
    ):
        assert line in done.stderr
    done = site.launch("cluster=slurm", "cluster.minutes=9000", "name=refused", check=False)
    assert "cluster.minutes=9000: partition low allows at most 5760" in done.stderr, "SLURM's default partition"
    done = site.launch(*site.site(), "parallel=fsdp4", "name=refused", check=False)
    assert "parallel asks for 4 nodes of 1 GPUs: low has 3; choose a layout of at most 3 ranks" in done.stderr


@pytest.mark.parametrize("dry", ["dry_run=true", "dry_run=false"])
def test_sbatch_refuses_in_its_own_words_before_anything_is_made(site: Site, dry: str) -> None:
    done = site.launch(*site.site(), "cluster.sbatch={licenses: gold}", "name=refused", dry, check=False)
    assert done.returncode == 2
    assert "cluster=slurm: sbatch would refuse: " in done.stderr
    assert "Invalid license specification" in done.stderr
    assert list((site.folder / "runs").glob("refused-*")) == []


def test_our_flags_are_not_overridden(site: Site) -> None:
    done = site.launch(*site.site(), "cluster.sbatch={nodes: 3}", "cluster.grace_seconds=3600", check=False)
    assert done.returncode == 2
    assert "nodes follows from parallel and cluster; leave it out" in done.stderr


SCRIPT = """
import json, os, sys
from pathlib import Path
sys.argv[:] = ["launch.py", *json.loads(sys.argv[1])]
import launch
code = launch.main()
heavy = sorted(each for each in sys.modules if each in ("torch", "datasets", "transformers", "wandb"))
print("imported", heavy)
sys.exit(code)
"""


def test_submitting_imports_no_torch(site: Site) -> None:
    """On a login node seconds count, and there is no GPU."""
    site.launch("dry_run=true", *site.site())
    argv = json.dumps([*site.arguments, *site.site(), "name=light"])
    command = [sys.executable, "-c", SCRIPT, argv]
    done = subprocess.run(command, cwd=site.repository, env=site.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported []"
    (told,) = told_by(done.stderr)
    site.cluster.run("scancel", told.job)


@pytest.mark.slow
def test_two_shapes_are_two_jobs_of_their_own_size(
    site: Site, straight: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four points of two layouts: two arrays, each with its own nodes and tasks."""
    layouts = ("fsdp2", "single", "single", "fsdp2")
    points = [prepared(site, f"name=shape{number}", f"parallel={layout}") for number, layout in enumerate(layouts)]
    for key, value in site.environment().items():
        monkeypatch.setenv(key, value)
    submitted = all_submitted(slurm(array_parallelism=1).submit_many(points))
    assert [each.folder for each in submitted] == [point.folder.path for point in points]
    arrays = [each.job.partition("_") for each in submitted]
    assert [index for _, _, index in arrays] == ["0", "0", "1", "1"]
    assert arrays[0][0] == arrays[3][0] != arrays[1][0] == arrays[2][0]
    shown = [site.cluster.run("scontrol", "show", "job", each.job) for each in submitted]
    assert [re.search(r"NumTasks=(\d)", each)[1] for each in shown] == ["2", "1", "1", "2"]
    for each in submitted:
        (script,) = each.log.parent.glob("*_submission.sh")
        assert "#SBATCH --array=0-1%1\n" in script.read_text()
    until(lambda: all(tried and tried[-1].ended for tried in map(attempts, (each.folder for each in submitted))))
    assert [attempts(each.folder)[-1].ended for each in submitted] == ["finished"] * 4
    assert [len(re.findall(r"^n\d: rank", each.log.read_text(), re.MULTILINE)) for each in submitted] == [2, 1, 1, 2]
    assert series(submitted[0].folder) == series(submitted[3].folder) == straight
    assert list(series(submitted[1].folder)) == list(range(1, STEPS + 1))
