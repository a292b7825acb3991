"""How often to save: the interval between checkpoints that loses the least time to saves, repeated work and restarts.

J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer
Systems 22 (2006), doi 10.1016/j.future.2004.11.016. Failures come at random with a constant rate, also in a save or
a restart.
"""

from math import exp, expm1, sqrt

HOPELESS = 500.0  # failures in one interval and a restart: of e^500 of them none is over


def best_interval(save: float, mtbf: float) -> float:
    """Seconds of work between two saves. `save`: seconds that one stops training for; `mtbf`: mean seconds between
    failures of the whole run.
    """
    if save >= 2.0 * mtbf:
        return mtbf
    ratio = save / (2.0 * mtbf)
    return sqrt(2.0 * save * mtbf) * (1.0 + sqrt(ratio) / 3.0 + ratio / 9.0) - save


def goodput(interval: float, save: float, restart: float, mtbf: float) -> float:
    """Share of all time that is work which is kept, 0 to 1. `restart`: seconds from a failure to the next step."""
    if (interval + save + restart) / mtbf > HOPELESS:
        return 0.0
    lost = mtbf * exp(restart / mtbf) * expm1((interval + save) / mtbf)
    return interval / lost
