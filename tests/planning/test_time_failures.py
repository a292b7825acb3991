"""Daly's interval and goodput against a simulation of 10,000 failures."""

from random import Random

import pytest

from src.planning.time.failures import best_interval, goodput

FAILURES = 10_000


def simulated(interval: float, save: float, restart: float, mtbf: float) -> float:
    """Goodput of a run that fails 10,000 times: work counts once it is saved, and a restart that fails begins again."""
    random, clock, kept = Random(1), 0.0, 0.0
    for _ in range(FAILURES):
        left = random.expovariate(1.0 / mtbf)
        clock += left
        left -= restart
        if left > 0.0:
            kept += interval * (left // (interval + save))
    return kept / clock


@pytest.mark.parametrize(
    ("save", "restart", "mtbf"),
    [(30.0, 300.0, 4 * 3600.0), (120.0, 900.0, 3600.0), (5.0, 60.0, 48 * 3600.0), (600.0, 1200.0, 3600.0)],
)
def test_the_best_interval_is_the_best(save: float, restart: float, mtbf: float) -> None:
    best = best_interval(save, mtbf)
    assert goodput(best, save, restart, mtbf) == pytest.approx(simulated(best, save, restart, mtbf), rel=0.05)
    for factor in (0.25, 4.0):
        assert simulated(factor * best, save, restart, mtbf) < simulated(best, save, restart, mtbf)
        assert goodput(factor * best, save, restart, mtbf) < goodput(best, save, restart, mtbf)


def test_by_hand() -> None:
    """Young's sqrt(2 x save x mtbf) where saves are short; never more than the mean time between failures."""
    assert best_interval(1.0, 1e6) == pytest.approx(2e6**0.5, rel=0.002)
    assert best_interval(7200.0, 3600.0) == 3600.0
    assert goodput(1000.0, 0.0, 0.0, 1e9) == pytest.approx(1.0, rel=1e-5)
    assert goodput(1e12, 1.0, 300.0, 0.2) == goodput(1.0, 1.0, 300.0, 0.2) == 0.0
