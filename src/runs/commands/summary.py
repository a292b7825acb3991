"""What a run is and how it stands, from a few small reads of its folder: a thousand folders take less than a second.

Nothing in a folder is executed, and nothing is written.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from src.cluster.backend import JobState
from src.cluster.batch_system import batch_system
from src.config.tree import Tree, read, read_section
from src.runs.folder import Attempt, attempts
from src.runs.lock import Lock
from src.runs.records import PLAN_FILE, SUBMISSIONS_FILE
from src.runs.submissions import submissions
from src.storage.json_lines import METRICS_FILE, Lines, facts_in
from src.sweeps.status import LIVE, State, Submission, job_states, state_of

NUMBERS = ("step", "time", "loss", "validation_loss", "tokens_per_second", "tokens", "goodput/share")
AXES = {"pipeline": "pp", "context": "cp", "tensor": "tp", "replicate": "ddp", "shard": "fsdp"}  # of conf/parallel


@dataclass(frozen=True)
class Summary:
    """One run. Numbers are the newest that its log has; None where it has none."""

    folder: Path
    state: State
    detail: str  # what is known of the state: a cause, a scheduler's word
    step: int | None
    steps: int | None  # of the plan
    loss: float | None  # of the last step that was logged, nats per token
    validation_loss: float | None
    tokens_per_second: float | None  # of one device
    goodput: float | None  # share of the wall time, 0 to 1
    tokens: float | None
    parameters: int | None
    world: int | None  # ranks, of one replica group
    layout: str  # such as tp2_fsdp4
    where: str  # the host, and the job if it is in one
    job: str | None  # the newest that was submitted
    attempts: int
    active: float | None  # when it last said something, in seconds since 1970

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name

    @property
    def age(self) -> float | None:
        """Seconds since it last said something."""
        return None if self.active is None else max(0.0, time.time() - self.active)

    @property
    def live(self) -> bool:
        """Whether it waits or runs."""
        return self.state in LIVE

    @cached_property
    def config(self) -> Tree:
        """The whole config. ConfigError."""
        return read(self.folder / "config.yaml")

    def section(self, name: str) -> Any:
        """One section of the config, without parsing the rest. ConfigError."""
        return read_section(self.folder / "config.yaml", name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return {"name": self.name} | asdict(self) | {"folder": str(self.folder), "age": self.age}


def summaries(folders: Iterable[Path]) -> list[Summary]:
    """Of each run folder, in order; the scheduler is asked once for all jobs."""
    scheduler = batch_system()
    handed = [Submission(folder, scheduler, submitted=None, refused=None, cancelled=False) for folder in folders]
    jobs = job_states(each for each in handed if (each.folder / SUBMISSIONS_FILE).exists())
    return [_summary(each, jobs.get(each.folder)) for each in handed]


def _summary(point: Submission, newest: JobState | None) -> Summary:
    folder, tried = point.folder, attempts(point.folder)
    state, detail = state_of(point, tried, newest)
    handed = submissions(folder)
    told = Lines(folder / METRICS_FILE).newest(*NUMBERS)
    plan = read_plan(folder)
    return Summary(
        folder=folder,
        state=state,
        detail=detail,
        step=told.get("step"),
        steps=plan.get("steps"),
        loss=told.get("loss"),
        validation_loss=told.get("validation_loss"),
        tokens_per_second=told.get("tokens_per_second"),
        goodput=told.get("goodput/share"),
        tokens=told.get("tokens"),
        parameters=plan.get("parameters"),
        world=plan.get("world"),
        layout=layout(plan),
        where=_where(folder, state, tried, handed[-1]["job"] if handed else None),
        job=handed[-1]["job"] if handed else None,
        attempts=len(tried),
        active=told.get("time", _modified(folder)),
    )


def read_plan(folder: Path) -> Mapping[str, Any]:
    """plan.json of any version."""
    return facts_in(folder / PLAN_FILE)


def layout(plan: Mapping[str, Any]) -> str:
    """The axes above 1 in the words of conf/parallel: tp2_fsdp4, hsdp2x4, single; of several groups: 2 x fsdp2."""
    if not plan:
        return ""
    axes, experts = plan.get("axes") or {}, plan.get("expert_axes") or {}
    parts = [f"{short}{axes[axis]}" for axis, short in AXES.items() if axes.get(axis, 1) > 1]
    if {"replicate", "shard"} <= axes.keys():
        parts = [*parts[:-2], f"hsdp{axes['replicate']}x{axes['shard']}"]
    parts += [f"ep{experts['expert']}"] if "expert" in experts else []
    groups = plan.get("groups", 1)
    return (f"{groups} x " if groups > 1 else "") + ("_".join(parts) or "single")


def _where(folder: Path, state: State, tried: list[Attempt], job: str | None) -> str:
    if state == "queued":
        return f"job {job}"
    if not tried:
        return ""
    owner = (Lock(folder / "lock").owner() if state == "running" else None) or {}
    host, inside = owner.get("host", tried[-1].host), owner.get("job", tried[-1].job)
    return f"{host} (job {inside})" if inside else str(host)


def _modified(folder: Path) -> float | None:
    try:
        return (folder / "config.yaml").stat().st_mtime
    except OSError:
        return None
