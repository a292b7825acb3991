"""Sweeps on a real SLURM: handed over once, each point with its own resources, told and acted on through the ledger."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from src.runs.folder import attempts
from src.runs.submissions import submissions
from src.sweeps.ledger import Ledger
from tests.slurm.runs import STEPS, Site, until

pytestmark = pytest.mark.slow

WILD = "10.0"  # a learning rate after which no loss is finite, with
DECAY = "optim.weight_decay=100"


def ledger(site: Site, *argv: str) -> str:
    """What a command says to a person on the login node."""
    done = subprocess.run(
        [sys.executable, "-m", "src.sweeps", *argv],
        cwd=site.repository,
        env=site.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def until_ended(folders: list[Path], count: int = 1) -> None:
    until(lambda: all(len(tried := attempts(each)) >= count and tried[-1].ended for each in folders))


def states(site: Site, path: str) -> list[str]:
    return re.findall(r"^ +\d+ +(\w+) ", ledger(site, "status", path), re.MULTILINE)


def test_a_sweep_is_handed_over_once_and_acted_on_by_point(site: Site) -> None:
    command = ("-m", "name=grid", *site.site(), "parallel=single,fsdp2", DECAY, f"optim.lr=3e-3,{WILD}")
    told = site.launch(*command).stderr
    found = re.search(r"^ledger: (.+)$", told, re.MULTILINE)
    assert found is not None, told
    path, book = found[1], Ledger(Path(found[1]))
    points = book.points()
    assert [point.overrides["parallel"] for point in points] == ["single", "fsdp2", "single", "fsdp2"]
    assert [point.overrides["optim.lr"] == WILD for point in points] == [False, False, True, True]
    jobs = [submissions(point.folder)[-1]["job"].partition("_") for point in points]
    assert jobs[0][0] == jobs[2][0] != jobs[1][0] == jobs[3][0], "one array per shape"
    again = site.launch(*command).stderr
    assert "job " not in again, "what is queued, running or done is left alone"
    until_ended([point.folder for point in points])
    until(lambda: states(site, path) == ["finished", "finished", "diverged", "diverged"])
    told = site.launch(*command).stderr
    assert "2 points finished" in told
    assert "2 points diverged: not started again; see status, then retry" in told
    ledger(site, "table", path)
    with (Path(path) / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows[:2]] == [str(STEPS)] * 2
    assert all(float(row["queue_seconds"]) > 0 and float(row["useful_seconds"]) > 0 for row in rows[:2])
    assert ledger(site, "report", path).strip().endswith("report.html")
    ledger(site, "retry", path)
    assert [len(submissions(point.folder)) for point in points] == [1, 1, 2, 2]
    ledger(site, "cancel", path, "4")
    until(lambda: states(site, path)[3] == "cancelled")
    until_ended([points[2].folder], 2)
    assert states(site, path)[:2] == ["finished", "finished"]


def test_a_search_runs_its_batches_side_by_side_and_survives_a_point_that_diverges(site: Site) -> None:
    command = ("name=search", *site.site(), "parallel=single", "cluster.minutes=30")
    search = (
        "sweep=optuna",
        "sweep.trials=3",
        "sweep.batch=2",
        "sweep.first_random=2",
        "sweep.sampler=random",
        "sweep.seed=4",
    )
    told = site.launch("-m", *command, *search, DECAY, f"optim.lr=1e-3,3e-3,{WILD}", "seed=0,1").stderr
    path = re.findall(r"^ledger: (.+)$", told, re.MULTILINE)[0]
    rows = Ledger(Path(path)).points()
    assert len(rows) == 3
    jobs = [submissions(point.folder)[-1]["job"].partition("_")[0] for point in rows]
    assert jobs[0] == jobs[1] != jobs[2], "a batch is one array"
    assert [point.overrides["optim.lr"] for point in rows] == [WILD, "0.003", "0.001"]
    assert states(site, path) == ["diverged", "finished", "finished"]
    assert re.search(r"^best: optim.lr=0.00[13] seed=1$", told, re.MULTILINE)


def test_packed_runs_share_a_node_and_nothing_else(site: Site) -> None:
    """Four runs on a node of eight pretend GPUs, two of them of two ranks; two diverge, and one of these is retried."""
    facts = ("cluster.pack=true", "cluster.gpus_per_node=8", "name=packed")
    command = ("-m", *site.site(), *facts, "parallel=single,fsdp2", DECAY, f"optim.lr=3e-3,{WILD}")
    told = site.launch(*command).stderr
    path = re.findall(r"^ledger: (.+)$", told, re.MULTILINE)[0]
    points = Ledger(Path(path)).points()
    jobs = {submissions(point.folder)[-1]["job"] for point in points}
    assert len(jobs) == 1
    shown = site.cluster.run("scontrol", "show", "job", *jobs)
    assert "NumNodes=1" in shown
    assert re.search(r"TresPerNode=gres[:/]gpu[:=]8\b", shown)
    until_ended([point.folder for point in points])
    until(lambda: states(site, path) == ["finished", "finished", "diverged", "diverged"])
    files = [point.folder / "pack.json" for point in points]
    until(lambda: all("exit_code" in file.read_text() for file in files))
    shares = [json.loads(file.read_text()) for file in files]
    gpus = [gpu for share in shares for gpu in share["gpus"].split(",")]
    assert sorted(gpus) == sorted(set(gpus))
    assert [len(share["gpus"].split(",")) for share in shares] == [1, 2, 1, 2]
    assert [share["exit_code"] == 0 for share in shares] == [True, True, False, False]
    assert all(list((point.folder / "logs/attempt_1").glob("rank_0.log")) for point in points)
    ledger(site, "retry", path, "3")
    assert [len(submissions(point.folder)) for point in points] == [1, 1, 2, 1]
    until_ended([points[2].folder], 2)
