"""How long SLURM's side of a run takes, on the real test cluster of this machine (root, slurm-wlm and munge).

python -m benchmarks.slurm          writes records/slurm.json: seconds of

submit      one run, and a sweep of fifty points, from the command to the prompt
interrupted from the last step before a preemption, a requeue by hand and a dead node to the first step after it
start       of a compiled run: its first attempt, and the next one, which finds its kernels in the shared cache

SLURM itself would hold a requeued job back for two minutes; here it is told to start at once, as an idle site would.
"""

import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from src.runs.folder import attempts
from src.storage.json_lines import METRICS_FILE, Lines
from tests.slurm.cluster import cluster, missing
from tests.slurm.runs import Held, Site, told_by, until

RECORD = Path(__file__).parent / "records" / "slurm.json"
FIFTY = "seed=" + ",".join(map(str, range(50)))


def submitted(site: Site, *argv: str) -> tuple[float, list[str]]:
    """Seconds of the command, and the jobs, which are cancelled."""
    began = time.monotonic()
    told = site.launch(*site.site(), "parallel=single", *argv).stderr
    passed = time.monotonic() - began
    jobs = [each.job for each in told_by(told)]
    site.cluster.run("scancel", *sorted({job.partition("_")[0] for job in jobs}))
    return round(passed, 1), jobs


def interrupted(run: Held) -> list[float]:
    """Seconds from the last word of an attempt to the first step of the next, as its metrics say."""
    lines = Lines(run.folder / METRICS_FILE).read()
    return [round(line["goodput/interruption_seconds"], 1) for line in lines if "goodput/interruption_seconds" in line]


def ended(run: Held, attempt: int) -> Held:
    run.until_restarted(attempt)
    run.loosen()
    assert run.until_ended().ended == "finished", run.story()
    return run


def held(site: Site, name: str) -> Held:
    site.brake(name).write_text("7")
    run = site.submit(name, "checkpoint.every=5")
    run.until_held()
    return run


def preempted(site: Site) -> list[float]:
    run = held(site, "preempted")
    rival = site.cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive", "--wrap=sleep 600"
    ).strip()
    until(lambda: run.state() == "PENDING", run.story)
    site.cluster.run("scancel", rival)
    return interrupted(ended(run, 2))


def requeued(site: Site) -> list[float]:
    run = held(site, "requeued")
    site.cluster.run("scontrol", "requeue", run.job)
    return interrupted(ended(run, 2))


def killed(site: Site) -> list[float]:
    run = held(site, "killed")
    rank = run.until_held()[1]
    os.kill(int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    return interrupted(ended(run, 2))


def started(site: Site) -> dict[str, dict[str, float]]:
    """The waterfall of a cold and of a warm start with compiled blocks and a compiled loss."""
    site.brake("compiled").write_text("7")
    run = site.submit("compiled", "checkpoint.every=5", "compile=blocks", "compile.loss=true")
    run.until_held()
    site.cluster.run("scontrol", "requeue", run.job)
    ended(run, 2)
    assert len(attempts(run.folder)) == 2
    lines = [line for line in Lines(run.folder / METRICS_FILE).read() if "startup/total_seconds" in line]
    parts = [{key: round(value, 1) for key, value in line.items() if key.startswith("startup/")} for line in lines]
    return dict(zip(("cold", "warm"), parts, strict=True))


def main() -> int:
    if (reason := missing()) is not None:
        sys.exit(reason)
    found: dict[str, Any] = {"cores": os.cpu_count()}
    with cluster() as running, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        site = Site(running, Path(folder))
        site.launch("dry_run=true", *site.site())  # the text is tokenised, Python's files are read
        found["submit_one_seconds"], _ = submitted(site, "name=one")
        found["submit_fifty_seconds"], jobs = submitted(site, "-m", "name=fifty", FIFTY)
        assert len(jobs) == 50
        for what, measure in (("preempted", preempted), ("requeued", requeued), ("node_killed", killed)):
            found[f"{what}_to_next_step_seconds"] = measure(site)
            print(what, found[f"{what}_to_next_step_seconds"], flush=True)
        found["start"] = started(site)
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
    print(re.sub(r"[{}\",]", "", json.dumps(found, indent=1)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
