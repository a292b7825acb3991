"""The config section `evaluate`: what a run is scored on while it trains, and how often."""

from typing import Annotated

from pydantic import AfterValidator, Field

from src.config.base import Config, Line, Names, printable
from src.config.bounds import Count, SecondsOrNone, StepsOrNever

# The held-out text of the run itself, in bits per byte, by source.
BITS_PER_BYTE = "bits_per_byte"

Examples = Annotated[int, Field(ge=0, le=1024)]  # before one question
Drawings = Annotated[int, Field(ge=1, le=1024)]


def _named(tasks: tuple[str, ...]) -> tuple[str, ...]:
    for each in tasks:
        if not each.strip():
            raise ValueError(f"{each!r} is empty; it must name a task")
        printable(each)
    if twice := [each for each in dict.fromkeys(tasks) if tasks.count(each) > 1]:
        raise ValueError(f"{', '.join(twice)} stands there twice; leave one out")
    return tasks


class Evaluation(Config):
    every: StepsOrNever
    """Optimizer steps between two evaluations, with one after the last step; 0: none."""
    tasks: Annotated[Names, AfterValidator(_named)]
    """Names of tasks, or files in the form of lm-evaluation-harness."""
    samples: Count | None
    """Documents of each task, the first ones; null: all."""
    fewshot: Examples | None
    """Worked examples before each question; null: as many as the task says."""
    seeds: Drawings
    """Drawings of these examples, whose mean is the score."""
    ema: bool
    """True: the moving average of task.ema_decay is scored instead of the weights."""

    cluster: Line | None
    """Option of the group cluster on which a command scores each checkpoint; null: the ranks that train do."""
    arguments: Names
    """Further words of that command, such as "parallel=fsdp4"."""
    wait_seconds: SecondsOrNone
    """Seconds that a run waits at its end for the scores of such commands."""

    @property
    def wanted(self) -> bool:
        """Whether anything is evaluated while training."""
        return self.every > 0 and bool(self.tasks)

    def due(self, step: int, steps: int) -> bool:
        """Whether the weights after this step, of `steps`, are evaluated."""
        return self.wanted and step > 0 and (step % self.every == 0 or step == steps)
