"""Whole lives of tiny runs: what launch.py does before ranks start, then every rank's life on the gloo workers."""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from hydra.core.global_hydra import GlobalHydra

from src.cluster.rank import RankJob, run_rank
from src.config import tree as trees
from src.config.composition.requests import asked
from src.distributed.model_stages import SingleStage
from src.errors import UserError
from src.hugging_face.load import note
from src.launch.start import Shared, checked, feed, fetched, record, wanted
from src.planning.plan import plan
from src.runs.folder import RunFolder
from src.tasks.source import completed
from src.train.step.stepper import Stepper

HOME = Path(__file__).parents[2]
WORLDS = {"single": 1, "ddp2": 2, "fsdp2": 2, "tp2": 2, "hsdp2x2": 4, "tp2_fsdp2": 4}
TINY = (
    *("model.n_layers=2", "model.dim=32", "model.n_heads=4", "model.n_kv_heads=2", "model.multiple_of=32"),
    *("model.vocab_size=258", "task.steps=12", "task.seq_len=32", "task.global_batch=4", "task.micro_batch=1"),
    *("task.log_every=1", "task.validate_every=0", "task.gc_every=0", "schedule.warmup_steps=2", "optim.lr=3e-3"),
    *("checkpoint.every=6", "checkpoint.asynchronous=false", "data.processes=1", "cluster.gpus=0", "name=tiny"),
)


def write_text(folder: Path, documents: int = 400, words: int = 30) -> tuple[str, ...]:
    """Documents of several lengths, a jsonl row each; the arguments that train on them."""
    chance, file = random.Random(0), folder / "text.jsonl"
    nouns = [f"{a}{b}" for a in ("ka", "lo", "mi", "tu") for b in ("ra", "se", "ti")]
    rows = (" ".join(chance.choices(nouns, k=1 + chance.randrange(2 * words))) for _ in range(documents))
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return ("data=text", f"data.files={file}", "data.validation_fraction=0.1")


def opened(*argv: str) -> Path:
    """The run folder of this command line, ready for its ranks."""
    before = list(sys.argv)
    GlobalHydra.instance().clear()
    try:
        ((tree, run, _),) = checked(asked(list(argv), completed).trees)
    finally:
        sys.argv[:] = before
    source, corpus = wanted(tree, run), feed(run, Shared())
    facts = plan(run, corpus, run.cluster.devices()).to_dict()
    identity = trees.identity(tree)
    with RunFolder.open(tree, facts, root=run.root, name=run.name, identity=identity, folder=run.folder) as folder:
        if corpus is not None:
            record(corpus, folder.path)
        if source is not None:
            note(folder.path, fetched(source, run))
        folder.begin(run.parallel.world)
        return folder.path


PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Shot:
    """A signal that one rank gets at a chosen moment of its life."""

    where: Literal["start", "step", "validation", "evaluation"]
    number: int = signal.SIGTERM
    at: int = 1  # which step, which batch of validation or of an evaluation
    rank: int = 0
    saved: int | None = None  # not before the checkpoint of this step is complete: it is written beside the steps
    told: int | None = None  # not before rank 0 has recorded this step

    def _wait(self, folder: Path) -> None:
        """A busy machine may be late with both."""
        marker = folder / f"checkpoints/step_{self.saved or 0:08}/COMPLETE.json"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if (self.saved is None or marker.exists()) and (self.told is None or self.told in series(folder)):
                return
            time.sleep(0.05)

    @contextlib.contextmanager
    def aimed(self, folder: Path) -> Iterator[None]:
        """While this is open, the signal comes; on other ranks nothing does."""
        if int(os.environ["RANK"]) != self.rank:
            yield
            return
        target = {
            "start": "src.tasks.pretrain.rank.resume",
            "step": "src.train.step.Stepper.__call__",
            "validation": "src.distributed.model_stages.SingleStage.loss",
            "evaluation": "src.distributed.model_stages.SingleStage.row_losses",
        }[self.where]
        calls = 0

        def hit(original: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.at:
                self._wait(folder)
                os.kill(os.getpid(), self.number)
            return original(*args, **kwargs)

        module, _, name = target.rpartition(".")
        owner = {"Stepper": Stepper, "SingleStage": SingleStage}.get(module.rpartition(".")[2]) or sys.modules[module]
        original = getattr(owner, name)
        # A plain function, so that it binds like the method it stands for.
        with patch.object(owner, name, lambda *args, **kwargs: hit(original, *args, **kwargs)):
            yield


def live(folder: Path, shot: Shot | None = None) -> bool | tuple[str, ...]:
    """A rank's life: whether it came to the end of its task; the problems, where the user is told some."""
    import src.tasks.pretrain.rank  # noqa: F401  (aimed at by name)

    with contextlib.nullcontext() if shot is None else shot.aimed(folder):
        try:
            return run_rank(RankJob(folder, None))
        except UserError as error:
            return error.problems


def records(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl that hold numbers."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "event" not in line]


def series(folder: Path, name: str = "loss") -> dict[int, float]:
    """By step, at full precision; a later attempt's word stands."""
    return {line["step"]: line[name] for line in records(folder) if name in line}


def values(folder: Path, step: int) -> dict[str, Any]:
    """The small values of a checkpoint."""
    found: dict[str, Any] = json.loads((folder / f"checkpoints/step_{step:08d}/values.json").read_text())
    return found


def contents(folder: Path, step: int) -> dict[str, Any]:
    """Size and checksum of every file of a checkpoint that holds tensors or values."""
    marker = json.loads((folder / f"checkpoints/step_{step:08d}/COMPLETE.json").read_text())
    return {name: file for name, file in marker["files"].items() if name != ".metadata"}
