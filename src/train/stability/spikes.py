"""Spikes: steps whose loss or gradient norm stands out from those before, which are noted, skipped or trained around.

A step's score is by how many deviations its loss or gradient norm, whichever is more, lies above the median of a window
of steps before it. A deviation is 1.4826 times the median absolute one, which is a normal distribution's, and at least
1 % of the median. The step just before is left out: the host learns what a GPU did one step late.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

OnSpike = Literal["note", "skip_batch", "rewind"]

DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations
LEAST = 0.01  # deviation, in medians: losses that hardly differ have no spikes
FEWEST = 8  # steps that a median is of
MOST_REWINDS = 8  # to one checkpoint


@dataclass(frozen=True)
class Usual:
    """Median and deviation of losses and gradient norms."""

    medians: tuple[float, float]
    deviations: tuple[float, float]

    def score(self, loss: float, grad_norm: float) -> float:
        values = zip((loss, grad_norm), self.medians, self.deviations, strict=True)
        return max((value - median) / deviation for value, median, deviation in values)

    def limits(self, score: float) -> tuple[float, float]:
        """The loss and the gradient norm of that score."""
        low, high = (m + score * d for m, d in zip(self.medians, self.deviations, strict=True))
        return low, high


class SpikeWatch:
    """What steps were like, and which samples shall change nothing. All of it is in checkpoints."""

    def __init__(self, threshold: float, window: int, choice: OnSpike) -> None:
        """A step is a spike from a score of `threshold` on, among the `window` steps before it."""
        self.threshold, self.choice = threshold, choice
        self.score = 0.0  # of the newest step whose outcome is known
        self._seen: deque[tuple[int, float, float]] = deque(maxlen=window + 1)  # step, loss, gradient norm
        self._skipped: set[tuple[int, int]] = set()  # first sample, and that behind the last
        self._rewinds: Counter[str] = Counter()  # by checkpoint

    def limits(self, step: int, samples: range) -> tuple[float, float]:
        """Loss and gradient norm above which the device does not update in this step, of these samples."""
        if self.skips(samples):
            return -math.inf, -math.inf
        usual = self._usual(step) if self.choice == "skip_batch" else None
        return (math.inf, math.inf) if usual is None else usual.limits(self.threshold)

    def decide(self, step: int, loss: float, grad_norm: float, samples: range) -> OnSpike | None:
        """What follows from a finite step; None: it is no spike, or one whose samples are skipped since long. Later
        steps are compared with it too, so that one that only begins a new level is soon no spike any more.
        """
        usual = self._usual(step)
        self.score = 0.0 if usual is None else usual.score(loss, grad_norm)
        self._seen.append((step, loss, grad_norm))
        if usual is None or self.skips(samples):
            return None
        limits = usual.limits(self.threshold)  # by the numbers that the device has compared
        return self.choice if loss > limits[0] or grad_norm > limits[1] else None

    def skip(self, samples: Iterable[Sequence[int]]) -> None:
        """From now on steps with any of these samples, each given by its first and the one behind its last, change
        nothing.
        """
        self._skipped.update((first, stop) for first, stop in samples)

    def begin_anew(self, *, forget: bool) -> None:
        """Steps from here on are like none before: other data, lengths or batches. `forget`: which samples to skip,
        too, for their numbers now mean others.
        """
        self._seen.clear()
        if forget:
            self._skipped.clear()

    def skips(self, samples: range) -> bool:
        return any(first < samples.stop and samples.start < stop for first, stop in self._skipped)

    def may_rewind(self, checkpoint: str) -> bool:
        """Whether to go back to a checkpoint once more; counts it."""
        self._rewinds[checkpoint] += 1
        return self._rewinds[checkpoint] <= MOST_REWINDS

    def tree(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"seen": [list(each) for each in self._seen], "skipped": [list(each) for each in sorted(self._skipped)]}

    def adopt(self, tree: Mapping[str, Any]) -> None:
        """Take over a checkpoint's; samples that are skipped by now stay so."""
        self._seen.clear()
        self._seen.extend((step, loss, norm) for step, loss, norm in tree["seen"])
        self.skip(tree["skipped"])

    def _usual(self, step: int) -> Usual | None:
        """Of the window that this step is compared with; None while too few steps are known."""
        known = np.array([values for number, *values in self._seen if number < step - 1][-self._window :])
        if len(known) < FEWEST:
            return None
        medians = np.median(known, axis=0)
        spread = DEVIATION * np.median(np.abs(known - medians), axis=0)
        deviations = np.maximum(spread, LEAST * np.abs(medians) + np.finfo(np.float64).tiny)
        (loss, norm), (of_loss, of_norm) = medians.tolist(), deviations.tolist()
        return Usual((loss, norm), (of_loss, of_norm))

    @property
    def _window(self) -> int:
        return (self._seen.maxlen or 1) - 1
