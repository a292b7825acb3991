"""The stages of a run as its ranks go through them: what each is built of, where it begins in its samples, and when.

A run without stages is one of them. All go the same way: a stage ends with a checkpoint, and the next one is built anew
and begins with that, whether the process that made it still lives or another comes after it.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from src.data.corpus import read_recipe
from src.data.order import Interleave
from src.optim.schedule import Schedule, StagedSchedule
from src.planning.plan import Plan
from src.planning.recompute_choice import resolve_auto_recompute
from src.run import Run
from src.train.border import StageBorder


@dataclass(frozen=True)
class RunStage:
    """One of `count` stages; `number` from 1."""

    number: int
    count: int
    run: Run
    plan: Plan  # its steps: those of the whole run when the stage ends
    schedule: Schedule | StagedSchedule
    border: StageBorder | None  # None: there is no stage before
    samples_since: int = 0  # step after which samples are numbered as in this stage
    read_before: tuple[int, ...] = ()  # samples of each source, in the orders before

    @property
    def last(self) -> bool:
        """Whether the run ends with it."""
        return self.number == self.count

    @property
    def begins(self) -> int:
        """Steps of the run before it."""
        return 0 if self.border is None else self.border.step

    def opening(self) -> str:
        """A line for a person."""
        plan, task = self.plan, self.run.task
        return (
            f"stage {self.number} of {self.count}: steps {self.begins + 1:,} to {plan.steps:,}, "
            f"{plan.sequences_per_step:,} x {task.seq_len:,} tokens a step"
        )


def stages_of(run: Run, folder: Path) -> list[RunStage]:
    """All stages of the run in this folder, in order."""
    planned = Plan.read(folder)
    if not run.stages:
        return [RunStage(1, 1, resolve_auto_recompute(run, folder), planned, run.schedule, None)]
    places = reading([StageData.of(stage, read_recipe(folder, number)) for number, stage in enumerate(run.stages, 1)])
    found: list[RunStage] = []
    for index, (stage, plan) in enumerate(zip(run.stages, planned.training_stages, strict=True)):
        begins = found[-1].plan.steps if found else 0
        border = StageBorder(begins, None if places[index].goes_on else 0) if found else None
        since = found[-1].samples_since if places[index].goes_on else begins
        made = replace(stage, recompute=plan.recompute) if stage.recompute.mode == "auto" else stage
        schedule = run.stage_schedules()[index]
        before = places[index].read_before
        found.append(RunStage(index + 1, len(run.stages), made, plan, schedule, border, since, before))
    return found


def begun(stages: Sequence[RunStage], step: int) -> int:
    """Index of the stage that a run goes on with after this step: one that has ended hands over itself."""
    return next(number for number, stage in enumerate(stages) if step <= stage.plan.steps or stage.last)


@dataclass(frozen=True)
class StageData:
    """What a stage reads: its tokens, and of each source the weight, and the name of its shards and their rows."""

    fingerprint: str
    weights: tuple[float, ...]
    shards: tuple[str, ...]
    seq_len: int
    samples: int

    @classmethod
    def of(cls, stage: Run, recipe: Mapping[str, Any]) -> Self:
        parts, task, rules = recipe["parts"], stage.task, json.dumps(recipe.get("rows"), sort_keys=True)
        return cls(
            recipe["fingerprint"],
            tuple(weight for _, weight, _ in parts),
            tuple(f"{folder} {rules}" for _, _, folder in parts),
            task.seq_len,
            task.steps * task.global_batch,
        )


class Place(NamedTuple):
    """Where a stage is in its data.

    `goes_on`: it reads on in the order of the stage before; else it begins one, behind the samples of each source that
    earlier orders have used up, so that none comes again before its source has been read to the end.
    """

    goes_on: bool
    read_before: tuple[int, ...]


def reading(stages: Sequence[StageData]) -> list[Place]:
    """The place of each stage, which follows from the config alone. Samples of other lengths are other samples."""
    used: Counter[tuple[str, int]] = Counter()
    found: list[Place] = []
    taken = 0  # samples of the newest order, of which `used` knows nothing yet
    for index, stage in enumerate(stages):
        before = stages[index - 1] if index else None
        goes_on = before is not None and (before.fingerprint, before.seq_len) == (stage.fingerprint, stage.seq_len)
        if before is not None and not goes_on:
            counts = Interleave(before.weights).counts(taken)
            used.update({(name, before.seq_len): count for name, count in zip(before.shards, counts, strict=True)})
            taken = 0
        taken += stage.samples
        behind = tuple(used[name, stage.seq_len] for name in stage.shards)
        found.append(Place(goes_on, found[-1].read_before if goes_on else behind))
    return found
