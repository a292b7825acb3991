"""The learning rate's factor at each step: linear warm-up, a stable stretch, a decay."""

import math
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

    def multiplier(self, step: int, steps: int) -> float:
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
        return (total + 1 - decay, total) if decay > 0 else None

    def rests(self, steps: int) -> bool:
        """Whether steps behind the decay have a learning rate of 0."""
        _, decay, total = self._lengths(steps)
        return total < steps and decay > 0 and self.min_factor == 0.0

    def warnings(self, steps: int) -> list[str]:
        """Keys whose values were cut to fit into the total."""
        total = self.total_steps or steps
        warmup, decay, _ = self._lengths(steps)
        found = []
        if warmup < self.warmup_steps:
            found.append(f"schedule.warmup_steps={self.warmup_steps} is cut to the {total} steps there are")
        if self.decay_ratio is not None and decay < round(total * self.decay_ratio):
            found.append(
                f"schedule.decay_ratio={self.decay_ratio} asks for {round(total * self.decay_ratio)} of {total} steps; "
                f"the warm-up of {warmup} leaves {decay}"
            )
        if total < steps and decay > 0:
            found.append(
                f"schedule.total_steps={total} ends before task.steps={steps}: from there on it is "
                f"schedule.min_factor={self.min_factor:g} of the peak"
            )
        return found

    def _lengths(self, steps: int) -> tuple[int, int, int]:
        """Steps of warm-up, of decay, and in total."""
        total = self.total_steps or steps
        warmup = min(self.warmup_steps, total)
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
