"""A small repository whose only task is told by its config what to do, so that launching is tested without training."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from src.config.tree import identity
from src.planning.time.site import NO_FACTS

HERE = Path(__file__).resolve().parents[2]

BUILD = """
import importlib
def target_class(tree, section):
    raise NotImplementedError
def build(tree):
    module, _, name = tree["task"]["_target_"].rpartition(".")
    return {"task": getattr(importlib.import_module(module), name)(tree["task"])}
"""
RUN = """
from types import SimpleNamespace
class Run:
    @classmethod
    def from_sections(cls, sections):
        return SimpleNamespace(**sections)
"""
TASK = """
import os, signal, sys, time
from pathlib import Path
import src
from src.distributed.process.rank_context import LauncherEnv, RankContext
from src.errors import CheckpointError, VerdictError
from src.train.stop import Stop


class Fake:
    def __init__(self, options):
        self.options = options

    def run(self, run, folder):
        world = self.options["world"]
        if self.options["do"] == "sum":
            import torch, torch.distributed as dist
            ranks = RankContext.join("cpu", world, timeout_seconds=60)
            value = torch.tensor([float(ranks.rank + 1)])
            dist.all_reduce(value)
            print(f"rank {ranks.rank} of {ranks.world}: sum {value.item():g}")
            print(f"threads {os.environ['OMP_NUM_THREADS']} in {os.getcwd()}")
            print(f"code {Path(src.__file__).parents[1]}")
            print("a warning", file=sys.stderr)
            os.write(2, b"words of a library in C\\n")
            ranks.leave()
            ranks.leave()
            return True
        rank = LauncherEnv.read().rank
        if self.options["do"] == "crash":
            if rank == 1:
                raise ValueError("the weights of rank 1 are bad")
            time.sleep(600)
        if self.options["do"] == "spoil":
            if rank == 1:
                (folder / "attempts.jsonl").unlink()
                (folder / "attempts.jsonl").mkdir()
                raise ValueError("the weights of rank 1 are bad")
            time.sleep(600)
        if self.options["do"] == "full":
            os.environ.pop("TORCHELASTIC_ERROR_FILE")
            raise OSError(28, os.strerror(28))
        if self.options["do"] == "segfault":
            if rank == 1:
                (folder / "dying").touch()
                os.kill(os.getpid(), signal.SIGSEGV)
            while not (folder / "dying").exists():
                time.sleep(0.01)
            raise RuntimeError("connection closed by peer")
        if self.options["do"] == "early":
            (folder / f"alive_{rank}").write_text(str(os.getpid()))
            time.sleep(600)
        if self.options["do"] == "refuse":
            raise CheckpointError(["step_00000010/a.distcp: crc32 differs", "checkpoint.initial: try step_00000005"])
        if self.options["do"] == "judge":
            raise VerdictError("3 of 9 figures differ")
        with Stop() as stop:
            (folder / f"alive_{rank}").write_text(str(os.getpid()))
            print(f"rank {rank} waits", flush=True)
            while stop.seen is None or self.options["do"] == "stubborn":
                time.sleep(0.02)
            (folder / f"seen_{rank}").write_text(stop.seen)
        return False
"""
LAUNCH = """
import json, sys
from pathlib import Path
from src.runs.folder import RunFolder
from src.cluster.local.config import Local
from src.config.tree import identity
from src.cluster.rank_log import open_closed_streams
open_closed_streams()
tree, root, repository, grace = json.loads(sys.argv[1])
cluster = Local(gpus=0, gpu_memory_gib=None, threads=None, grace_seconds=float(grace), at_once=None, **NO_FACTS)
with RunFolder.open(tree, {"world": tree["task"]["world"]}, root=Path(root), name=tree["name"],
                    identity=identity(tree), repository=Path(repository)) as folder:
    outcome = cluster.submit(folder, tree["task"]["world"])
print("outcome", outcome.status)
sys.exit(outcome.exit_code)
""".replace("**NO_FACTS", f"**{NO_FACTS!r}")


def repository(into: Path) -> Path:
    """A copy of the rooms under test, with stand-ins for those above and beside them."""
    named = ("__init__.py", "errors.py", "entry.py", "version.py", "config/tree.py", "config/upgrades.py")
    for name in (*named, "train/stop.py"):
        (into / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "src" / name, into / "src" / name)
    for room in ("cluster", "distributed/process", "runs", "storage"):
        shutil.copytree(HERE / "src" / room, into / "src" / room, ignore=shutil.ignore_patterns("__pycache__"))
    written = {"config/build.py": BUILD, "run.py": RUN, "tasks/fake.py": TASK}
    for name, text in written.items():
        (into / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (into / "src" / name).write_text(text)
    for folder in ("config", "distributed", "train", "tasks"):
        (into / "src" / folder / "__init__.py").write_text("")
    (into / "launch.py").write_text(LAUNCH)
    (into / "conf").mkdir()
    (into / "conf/config.yaml").write_text("seed: 0\n")
    return into


def tree(do: str, world: int) -> dict[str, Any]:
    return {"name": do, "seed": 0, "task": {"_target_": "src.tasks.fake.Fake", "do": do, "world": world}}


def place(root: Path, do: str, world: int) -> Path:
    return root / f"{do}-{identity(tree(do, world))}"


def launch(
    root: Path,
    code: Path,
    do: str,
    world: int,
    grace_seconds: float = 60,
    closed: tuple[int, ...] = (),
    warm: bool = True,
) -> "subprocess.Popen[str]":
    """A launcher in a process and session of its own; its working directory is `root`, where no `src` is. `warm`: it
    and its ranks need not import torch (tests/warm).
    """
    import json

    root.mkdir(exist_ok=True)
    given = json.dumps([tree(do, world), str(root), str(code), grace_seconds])
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not warm:
        del environment["WARM"]
    # The launcher is of this checkout, its ranks are of the code that it freezes.
    environment |= {"PYTHONPATH": f"{HERE}{os.pathsep}{environment['PYTHONPATH']}", "OMP_NUM_THREADS": "1"}

    def enter() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        for descriptor in closed:  # as >&- does
            os.close(descriptor)

    return subprocess.Popen(
        [sys.executable, "-P", str(code / "launch.py"), given],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=enter,
    )


def until_heard(launcher: "subprocess.Popen[str]", name: str) -> None:
    """Until it says that this signal came: two that come at once count once."""
    assert launcher.stderr is not None
    while f"{name}: the ranks save and stop" not in (line := launcher.stderr.readline()):
        assert line, f"the launcher ended without saying that it heard {name}"
