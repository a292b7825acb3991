"""A score over documents and drawings of examples, with its standard error. Arithmetic only."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

# Of one document: what is added up, and what it is divided by.
Share = tuple[float, float]


@dataclass(frozen=True)
class TaskScore:
    """`value`: over all documents, the mean of all drawings."""

    value: float
    stderr: float | None  # over documents; None of a single one
    spread: float | None = None  # standard deviation over drawings; None of a single one

    @property
    def text(self) -> str:
        """0.412 ± 0.031 (spread 0.010)."""
        error = "" if self.stderr is None else f" ± {self.stderr:.3f}"
        return f"{self.value:.3f}{error}" + ("" if self.spread is None else f" (spread {self.spread:.3f})")


def mean_score(drawings: Sequence[Sequence[float]]) -> TaskScore:
    """Of one number a document, in each drawing: the standard error is that of the documents' means over drawings."""
    documents = [fmean(each) for each in zip(*drawings, strict=True)]
    return TaskScore(fmean(documents), _stderr(documents), _spread([fmean(each) for each in drawings]))


def ratio_score(
    drawings: Sequence[Sequence[Share]], of_ratio: Callable[[float], float], slope: Callable[[float], float]
) -> TaskScore:
    """`of_ratio` of sum over sum; its standard error is that of a ratio estimator, times `slope` there (the delta
    method: Casella & Berger, Statistical Inference, section 5.5.4).
    """
    parts = [
        (fmean(amount for amount, _ in each), fmean(weight for _, weight in each))
        for each in zip(*drawings, strict=True)
    ]
    ratio, error = _ratio(parts)
    by_drawing = [of_ratio(_ratio(each)[0]) for each in drawings]
    return TaskScore(of_ratio(ratio), None if error is None else abs(slope(ratio)) * error, _spread(by_drawing))


def _ratio(parts: Sequence[Share]) -> tuple[float, float | None]:
    """Sum over sum, and its standard error."""
    count, weight = len(parts), math.fsum(weight for _, weight in parts)
    ratio = math.fsum(amount for amount, _ in parts) / weight
    if count < 2:
        return ratio, None
    squares = math.fsum((amount - ratio * each) ** 2 for amount, each in parts)
    return ratio, math.sqrt(squares * count / (count - 1)) / weight


def _stderr(values: Sequence[float]) -> float | None:
    return None if len(values) < 2 else stdev(values) / math.sqrt(len(values))


def _spread(values: Sequence[float]) -> float | None:
    return None if len(values) < 2 else stdev(values)


# Of nats and what they are divided by. The harness has the same three.
LN2 = math.log(2)


def bits(drawings: Sequence[Sequence[Share]]) -> TaskScore:
    """Bits per unit, of nats and units of each document."""
    return ratio_score(drawings, lambda ratio: ratio / LN2, lambda _: 1.0 / LN2)


def perplexity(drawings: Sequence[Sequence[Share]]) -> TaskScore:
    """Its exponential; infinite where a float ends."""
    return ratio_score(drawings, exp, exp)


def exp(nats: float) -> float:
    """Infinite where a float ends."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
