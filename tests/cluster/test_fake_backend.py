"""A backend of a test's own through launch.py and `python -m src.sweeps`: lock, ledger, status, verdict, requeue."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from src.cluster.backend import Backend, QueueBackend
from src.cluster.local.config import Local
from src.cluster.slurm.config import Slurm
from src.errors import FolderError
from src.planning.time.site import NO_FACTS
from src.runs.folder import attempts
from src.runs.lock import Lock
from src.runs.submissions import submissions
from tests.cluster.fake_backend import Fake, FakeScheduler
from tests.end_to_end.lives import HOME, TINY, write_text

PATIENCE_SECONDS = 300.0  # far beyond what a busy machine needs
CONF = """_target_: src.cluster.fake.config.Fake
gpu_memory_gib: null
gpus_per_node: 1
grace_seconds: 60
requeues: 3
wait: false
"""
WILD = ("optim.weight_decay=100", "schedule.warmup_steps=0", "optim.lr=3e-3,10.0")  # the second one diverges


@dataclass(frozen=True)
class Site:
    """A repository with cluster=fake, its queue and a root for runs."""

    folder: Path

    @property
    def queue(self) -> Path:
        return self.folder / "queue"

    def run(self, *command: str) -> tuple[int, str]:
        """Exit code and words of a command in the repository."""
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.folder / "repository",
            env=environment | {"FAKE_QUEUE": str(self.queue), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        return done.returncode, done.stdout + done.stderr

    def launch(self, *argv: str) -> tuple[int, str]:
        tiny = [each for each in TINY if not each.startswith(("cluster.", "name="))]
        return self.run("launch.py", *tiny, *write_text(self.folder), f"root={self.folder}", "cluster=fake", *argv)

    def sweeps(self, *argv: str) -> str:
        code, told = self.run("-m", "src.sweeps", *argv)
        assert code == 0, told
        return told

    def states(self, ledger: str) -> list[str]:
        return re.findall(r"^ +\d+ +(\w+) ", self.sweeps("status", ledger), re.MULTILINE)

    def set(self, mark: str, text: str = "") -> None:
        (self.queue / mark).write_text(text)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path)
    for part in ("src", "conf"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(HOME / part, tmp_path / "repository" / part, ignore=ignored)
    for part in ("launch.py", "pyproject.toml", "requirements.txt"):
        shutil.copy(HOME / part, tmp_path / "repository" / part)
    room = tmp_path / "repository/src/cluster/fake"
    room.mkdir()
    (room / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("fake_backend.py"), room / "config.py")
    (tmp_path / "repository/conf/cluster/fake.yaml").write_text(CONF)
    made.queue.mkdir()
    return made


def until(condition: Callable[[], object], site: Site) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        logs = "".join(log.read_text() for log in sorted(site.queue.glob("*/log")))
        assert time.monotonic() < end, f"waited in vain\n{logs}"
        time.sleep(0.1)


def test_a_sweep_on_a_backend_that_only_its_own_folder_knows(site: Site) -> None:
    site.set("hold")
    site.set("brake")
    site.set("broken", "1")
    command = ("name=grid", *WILD)
    code, told = site.launch("-m", *command)
    assert code == 0, told
    (ledger,) = re.findall(r"^ledger: (.+)$", told, re.MULTILINE)
    jobs = re.findall(r"^job (\d+): (.+)\nlog: .+\nwandb: .+\ntail -F .+\nfake-cancel \1$", told, re.MULTILINE)
    folders = [Path(folder) for _, folder in jobs]
    assert ([job for job, _ in jobs], site.states(ledger)) == (["1", "2"], ["queued", "queued"])
    code, told = site.launch("-m", *command)
    assert (code, "2 points queued" in told, "job " in told) == (0, True, False), told

    (site.queue / "hold").unlink()
    until(lambda: all(attempts(folder) for folder in folders), site)
    assert site.states(ledger) == ["running", "running"]
    code, told = site.launch("name=grid", *WILD[:2], "optim.lr=3e-3")
    assert (code, "job 1 runs it on" in told, "wait for it, or fake-cancel 1" in told) == (2, True, True), told

    (site.queue / "brake").unlink()
    until(lambda: {(site.queue / job / "state").read_text() for job, _ in jobs} == {"done"}, site)
    assert site.states(ledger) == ["finished", "diverged"]
    assert [attempt.ended for attempt in attempts(folders[0])] == ["failed", "finished"]
    assert {attempt.job for attempt in attempts(folders[0])} == {"1"}
    verdicts = [json.loads((folder / "verdicts.jsonl").read_text()) for folder in folders]
    assert [(each["kind"], each["action"], each["node"]) for each in verdicts] == [
        ("node", "requeue", "node1"),
        ("user", "stop", None),
    ]
    assert (folders[0] / "logs/job_1.0/rank_0.error.json").exists()

    site.set("hold")
    site.sweeps("retry", ledger)
    assert [len(submissions(folder)) for folder in folders] == [1, 2]
    assert site.sweeps("cancel", ledger).strip() == "2: cancelled"
    (site.queue / "hold").unlink()
    assert site.states(ledger) == ["finished", "cancelled"]
    assert len(attempts(folders[1])) == 1


def test_a_lock_asks_the_backend_whether_its_owner_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner on another machine: nobody can look at its process."""
    lock = Lock(tmp_path / "lock", FakeScheduler())
    owner = {"pid": 1, "host": "elsewhere", "job": "7", "since": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "lock").write_text(json.dumps(owner))
    monkeypatch.setenv("FAKE_QUEUE", str(tmp_path / "none"))
    with pytest.raises(FolderError, match=r"job 7 runs it on elsewhere .* fake-cancel 7"):
        lock.take()  # nobody answers
    (tmp_path / "7").mkdir()
    monkeypatch.setenv("FAKE_QUEUE", str(tmp_path))
    for state in ("waits", "runs"):
        (tmp_path / "7/state").write_text(state)
        assert lock.held()
        with pytest.raises(FolderError, match="job 7 runs it"):
            lock.take()
    (tmp_path / "7/state").write_text("cancelled")
    assert not lock.held()
    lock.take()
    lock.release()


def test_every_backend_has_the_whole_protocol() -> None:
    made = Fake(gpu_memory_gib=None, gpus_per_node=1, grace_seconds=60, requeues=3, wait=False)
    here = Local(gpus=0, gpu_memory_gib=None, threads=None, grace_seconds=60, at_once=None, **NO_FACTS)
    assert isinstance(made, QueueBackend)
    assert isinstance(here, Backend)
    assert not isinstance(here, QueueBackend)
    asked = {name for name in dir(FakeScheduler) if not name.startswith("_")} - {"queue", "submit"}
    assert asked <= set(dir(Slurm.scheduler)) & set(dir(Local.scheduler))


@pytest.mark.slow
def test_a_checkpoint_is_scored_by_a_job_of_its_own(site: Site) -> None:
    """Submitted by rank 0 of a job, to the same queue; its scores are at their step, once, before the run ends."""
    keys = ("evaluate.every=12", "evaluate.tasks=[short_texts]", "evaluate.cluster=fake", "evaluate.wait_seconds=300")
    code, told = site.launch("name=aside", *keys)
    assert code == 0, told
    (run,) = re.findall(r"^job 1: (.+)$", told, re.MULTILINE)
    until(lambda: (site.queue / "1/state").read_text() == "done", site)
    assert (site.queue / "2/state").read_text() == "done"
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "evaluate/short_texts/bits_per_byte" in line]
    assert [line["step"] for line in scored] == [12]
    (folder,) = (Path(run) / "evaluations").glob("step_*/")
    assert submissions(folder)[0]["job"] == "2"
    assert attempts(folder)[0].ended == "finished"
