"""Scaling laws through final losses of runs: L(N, D) = E + A / N^alpha + B / D^beta, and parabolas of equal compute.

As Hoffmann et al. 2022 fit them (arXiv 2203.15556, approaches 2 and 3): the Huber loss of differences of logarithms,
and for each amount of compute a parabola in the logarithm of the size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

HUBER = 1e-3  # differences of log loss from which outliers count less
EXPONENTS = (0.15, 0.35, 0.7)  # where a search begins
FLOORS = (0.0, 0.5, 0.8, 0.95)  # of the lowest loss
STEEPEST = 1.0  # exponent; those that were published are below 0.6
ITERATIONS = 80
FEWEST = 6  # runs: one more than the law has numbers
NEAR = 1.15  # times the compute of a neighbour: still one isoFLOP curve
FEWEST_SIZES = 3  # of a parabola
INTERVAL = (2.5, 97.5)  # percentiles: 95 %


@dataclass(frozen=True)
class Observation:
    """A finished run: parameters that a token meets, tokens, floating-point operations, final loss in nats."""

    number: int
    label: str
    parameters: float
    tokens: float
    flops: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """E + A / N^alpha + B / D^beta."""

    floor: float
    size: float
    data: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """In nats."""
        return float(self.floor + self.size / parameters**self.alpha + self.data / tokens**self.beta)

    @property
    def exponent(self) -> float:
        """Of compute, with which the best size grows."""
        return self.beta / (self.alpha + self.beta)


@dataclass(frozen=True)
class Parabola:
    """Loss over the logarithm of the size at one amount of compute: c0 + c1 x + c2 x^2."""

    flops: float
    coefficients: tuple[float, float, float]
    smallest: float  # size
    largest: float
    numbers: tuple[int, ...]  # of the runs

    @property
    def best_size(self) -> float | None:
        """Where the loss is lowest; None where that is at none of the sizes between the smallest and the largest."""
        _, slope, bend = self.coefficients
        if bend <= 0:
            return None
        best = float(np.exp(-slope / (2 * bend)))
        return best if self.smallest <= best <= self.largest else None

    def loss(self, size: float) -> float:
        """In nats."""
        x = float(np.log(size))
        constant, slope, bend = self.coefficients
        return constant + slope * x + bend * x * x


@dataclass(frozen=True)
class FittedLaw:
    """A law, its numbers' intervals from resampled runs, and what it foretells."""

    law: ScalingLaw
    samples: tuple[ScalingLaw, ...]  # of resampled runs
    residuals: tuple[float, ...]  # of log loss, as wide as those of runs that were not fitted

    def interval(self, name: str) -> tuple[float, float]:
        """95 % of an attribute of the law."""
        return _interval([float(getattr(each, name)) for each in self.samples])

    def foretold(self, parameters: float, tokens: float) -> tuple[float, float, float]:
        """Loss of a run that was not fitted, and the bounds of its 95 %: the law's own doubt and the runs' scatter."""
        logs = np.log([each.loss(parameters, tokens) for each in self.samples])
        spread = (logs[:, None] + np.array(self.residuals)[None, :]).ravel()
        low, high = _interval(np.exp(spread))
        return self.law.loss(parameters, tokens), low, high


def _interval(values: Sequence[float] | Vector) -> tuple[float, float]:
    low, high = np.percentile(values, INTERVAL)
    return float(low), float(high)


def fit(runs: Sequence[Observation], resampled: int = 200, seed: int = 0) -> FittedLaw:
    """At least FEWEST runs. The intervals come from `resampled` draws of as many runs with replacement."""
    assert len(runs) >= FEWEST, "the caller says what is missing"
    table = np.array([[each.parameters, each.tokens, each.loss] for each in runs])
    best = _best(table, [])
    chance = np.random.default_rng(seed)
    samples: list[ScalingLaw] = []
    while len(samples) < resampled:
        drawn = chance.integers(len(table), size=len(table))
        if len(np.unique(table[drawn], axis=0)) >= min(FEWEST, len(table)):
            samples.append(_law(_best(table[drawn], [best], few=True)))
    law = _law(best)
    residuals = np.log(table[:, 2]) - np.log([law.loss(size, tokens) for size, tokens, _ in table])
    # Five numbers were chosen to make them small.
    wider = np.sqrt(len(table) / max(len(table) - 5, 1))
    return FittedLaw(law, tuple(samples), tuple((wider * residuals).tolist()))


def parabolas(runs: Sequence[Observation]) -> list[Parabola]:
    """One for each amount of compute that runs of at least three sizes have spent, smallest first."""
    groups: list[list[Observation]] = []
    for each in sorted(runs, key=lambda run: run.flops):
        if groups and each.flops <= NEAR * groups[-1][0].flops:
            groups[-1].append(each)
        else:
            groups.append([each])
    found = []
    for group in groups:
        sizes = np.array([each.parameters for each in group])
        if len(set(sizes.tolist())) < FEWEST_SIZES:
            continue
        bend, slope, constant = np.polyfit(np.log(sizes), [each.loss for each in group], 2)
        flops = float(np.exp(np.mean(np.log([each.flops for each in group]))))
        numbers = tuple(each.number for each in group)
        curve = (float(constant), float(slope), float(bend))
        found.append(Parabola(flops, curve, float(sizes.min()), float(sizes.max()), numbers))
    return found


def growth(curves: Sequence[Parabola]) -> float | None:
    """Exponent of compute with which the best sizes of the parabolas grow; None of fewer than two."""
    best = [(each.flops, each.best_size) for each in curves if each.best_size is not None]
    if len(best) < 2:
        return None
    slope, _ = np.polyfit(np.log([flops for flops, _ in best]), np.log([size for _, size in best]), 1)
    return float(slope)


def _law(numbers: Vector) -> ScalingLaw:
    size, data, floor, alpha, beta = numbers
    return ScalingLaw(float(np.exp(floor)), float(np.exp(size)), float(np.exp(data)), float(alpha), float(beta))


def _best(table: Vector, known: Sequence[Vector], *, few: bool = False) -> Vector:
    """log A, log B, log E, alpha and beta of the lowest Huber loss, from several beginnings."""
    starts = [*known, *_starts(table, few=few)]
    ends = [_descend(table, start) for start in starts]
    return min(ends, key=lambda numbers: _cost(table, numbers))


def _starts(table: Vector, *, few: bool) -> list[Vector]:
    """For given exponents and floor, A and B are those of least squares."""
    size, tokens, loss = table.T
    found = []
    exponents = EXPONENTS[1:2] if few else EXPONENTS
    for alpha in exponents:
        for beta in exponents:
            for share in FLOORS[1:3] if few else FLOORS:
                floor = max(share * loss.min(), 1e-3)
                columns = np.stack([size**-alpha, tokens**-beta], axis=1)
                scale = columns.max(axis=0)
                weights, *_ = np.linalg.lstsq(columns / scale, loss - floor, rcond=None)
                a, b = np.log(np.maximum(weights / scale, 1e-3 * loss.min() / scale))
                found.append(np.array([a, b, np.log(floor), alpha, beta]))
    return found


def _predicted(table: Vector, numbers: Vector) -> tuple[Vector, Vector]:
    """Log loss of each run, and its derivative by each number."""
    a, b, e, alpha, beta = numbers
    n, d = np.log(table[:, 0]), np.log(table[:, 1])
    terms = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
    highest = terms.max(axis=0)
    total = highest + np.log(np.exp(terms - highest).sum(axis=0))
    shares = np.exp(terms - total)
    return total, np.stack([shares[0], shares[1], shares[2], -n * shares[0], -d * shares[1]], axis=1)


def _cost(table: Vector, numbers: Vector) -> float:
    far = np.abs(_predicted(table, numbers)[0] - np.log(table[:, 2]))
    return float(np.where(far <= HUBER, 0.5 * far**2, HUBER * (far - 0.5 * HUBER)).sum())


def _descend(table: Vector, numbers: Vector) -> Vector:
    """Levenberg and Marquardt's steps; outliers count less in each, as Huber's loss says."""
    damping, cost = 1e-2, _cost(table, numbers)
    for _ in range(ITERATIONS):
        total, slopes = _predicted(table, numbers)
        off = total - np.log(table[:, 2])
        weights = np.minimum(1.0, HUBER / np.maximum(np.abs(off), 1e-12))
        square = slopes.T @ (weights[:, None] * slopes)
        step = np.linalg.solve(square + damping * np.diag(np.diag(square) + 1e-12), -slopes.T @ (weights * off))
        tried = numbers + step
        tried[3:] = np.clip(tried[3:], 1e-3, STEEPEST)
        new = _cost(table, tried)
        if new < cost:
            small = cost - new < 1e-10 * cost
            numbers, cost, damping = tried, new, max(damping / 3, 1e-9)
            if small:
                break
        elif damping > 1e6:
            break
        else:
            damping *= 4
    return numbers
