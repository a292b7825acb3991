"""The learning rate's factor at each step: linear warm-up, a stable stretch, a decay."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from src.config.base import Config
from src.config.bounds import Fraction, Steps, StepsOrNever


class Schedule(Config):
    """Every familiar schedule is one of these: `decay_ratio` null is cosine or linear decay, 0 is constant."""

    shape: Literal["linear", "sqrt", "cosine"]
    """Decay from 1 to min_factor; sqrt: 1 - sqrt(progress)."""
    warmup_steps: StepsOrNever
    """Optimizer steps of the linear rise from 1/warmup_steps to 1; cut to total_steps; 0: none."""
    decay_ratio: Fraction | None
    """Last share of total_steps, which decays; null: all after the warm-up; 0: no decay."""
    min_factor: Fraction
    """Factor at the end of the decay."""
    total_steps: Steps | None
    """Optimizer step where the decay ends; null: task.steps."""

    def place(self, step: int, steps: int) -> tuple[float, float]:
        """How far a task of `steps` steps is before the step with this number, counted from 0, and how far it goes."""
        return step, steps

    def multiplier(self, step: float, steps: float) -> float:
        """Factor on the peak learning rate of the step with this number, counted from 0, in a task of `steps` steps."""
        warmup, decay, total = self._lengths(steps)
        # One virtual step follows the last, so that the last real one is still above the minimum.
        stable = total + 1 - warmup - decay
        if step < warmup:
            return (step + 1) / warmup
        if step < warmup + stable or decay == 0:
            return 1.0
        progress = min((step + 1 - warmup - stable) / decay, 1.0)
        return self.min_factor + (1.0 - self.min_factor) * self._fall(progress)

    def decayed(self, step: int, steps: int) -> bool:
        """Whether the decay has begun by the step with this number."""
        _, decay, total = self._lengths(steps)
        return decay > 0 and step >= total + 1 - decay

    def rises_again(self, done: int, steps: int, last: float, following: float) -> bool:
        """Whether a rate that this one has lowered to `last` by step `done` of `steps` is higher in the next; 1 % is
        none.
        """
        return self.decayed(done - 1, steps) and following > 1.01 * last

    def decay_span(self, steps: int) -> tuple[int, int] | None:
        """The first step of the decay and the last one, counted from 1; None without a decay."""
        _, decay, total = self._lengths(steps)
        return (round(total + 1 - decay), round(total)) if decay > 0 else None

    def rests(self, steps: int) -> bool:
        """Whether steps behind the decay have a learning rate of 0."""
        _, decay, total = self._lengths(steps)
        return total < steps and decay > 0 and self.min_factor == 0.0

    def warnings(self, steps: float) -> list[str]:
        """Keys whose values were cut to fit into the total."""
        total = self.total_steps or steps
        warmup, decay, _ = self._lengths(steps)
        found = []
        if warmup < self.warmup_steps:
            found.append(f"schedule.warmup_steps={self.warmup_steps} is cut to the {round(total)} steps there are")
        if self.decay_ratio is not None and decay < round(total * self.decay_ratio):
            found.append(
                f"schedule.decay_ratio={self.decay_ratio} asks for {round(total * self.decay_ratio)} of "
                f"{round(total)} steps; the warm-up of {round(warmup)} leaves {round(decay)}"
            )
        if total < steps and decay > 0:
            found.append(
                f"schedule.total_steps={total} ends before task.steps={steps}: from there on it is "
                f"schedule.min_factor={self.min_factor:g} of the peak"
            )
        return found

    def _lengths(self, steps: float) -> tuple[float, float, float]:
        """Steps of warm-up, of decay, and in total."""
        total = self.total_steps or steps
        warmup: float = min(self.warmup_steps, total)
        decay = total - warmup
        if self.decay_ratio is not None:
            decay = min(decay, round(total * self.decay_ratio))
        return warmup, decay, total

    def _fall(self, progress: float) -> float:
        """From 1 to 0 as the decay goes from 0 to 1."""
        if self.shape == "linear":
            return 1.0 - progress
        if self.shape == "sqrt":
            return 1.0 - math.sqrt(progress)
        return (1.0 + math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True)
class Span:
    """Stages that follow each other, in tokens: how many come before one of them, and how many there are in all.

    `unit`: of a step of the first of them.
    """

    before: int
    total: int
    unit: int

    def place(self, tokens: int) -> tuple[float, float]:
        """After so many tokens of the stage: where that is and how far the span goes, in steps of its first stage."""
        return (self.before + tokens) / self.unit, self.total / self.unit


@dataclass(frozen=True)
class StagedSchedule:
    """The schedule in one stage of a run.

    It goes by tokens: a stage of larger steps moves it on faster, and however batches and lengths grow, a decay ends
    with the last stage of its span. A step of the schedule is one of the first stage of its span.
    """

    schedule: Schedule
    first: int  # optimizer steps of the run before the stage
    size: int  # tokens of a step
    span: Span  # the stages from the one that names this schedule to the next that names one
    run: Span  # all stages

    def multiplier(self, step: int, _steps: int) -> float:
        """Factor on the peak learning rate of the run's step with this number, counted from 0."""
        return self.schedule.multiplier(*self.span.place((step - self.first) * self.size))

    def place(self, step: int, _steps: int) -> tuple[float, float]:
        """How far the run is before this step, and how far it goes, in steps of its first stage."""
        return self.run.place((step - self.first) * self.size)

    def warnings(self) -> list[str]:
        """Keys of the schedule whose values were cut to fit into its span."""
        found = self.schedule.warnings(self.span.total / self.span.unit)
        return [f"{line} (steps of {self.span.unit:,} tokens, of all its stages)" for line in found]


def in_stages(
    schedules: Sequence[Schedule], begins: Sequence[bool], steps: Sequence[int], sizes: Sequence[int]
) -> list[StagedSchedule]:
    """The schedule of each stage. `begins`: whether it names its schedule; `steps`: how many it has; `sizes`: tokens
    of each of them.
    """
    tokens = [count * size for count, size in zip(steps, sizes, strict=True)]
    starts = [number for number, named in enumerate(begins) if named or number == 0]
    found = []
    for number, schedule in enumerate(schedules):
        start = max(each for each in starts if each <= number)
        end = min((each for each in starts if each > number), default=len(tokens))
        span = Span(sum(tokens[start:number]), sum(tokens[start:end]), sizes[start])
        run = Span(sum(tokens[:number]), sum(tokens), sizes[0])
        found.append(StagedSchedule(schedule, sum(steps[:number]), sizes[number], span, run))
    return found
