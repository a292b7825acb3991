"""How much of the spread of a result goes with each swept key: epsilon squared (Kelley 1935), of one key at a time."""

from collections.abc import Mapping, Sequence

BINS = 4  # of a key with a value of its own in nearly every point, as a search draws them
FEWEST = 4  # points; of fewer nothing can be said


def importance(points: Sequence[Mapping[str, str]], results: Sequence[float]) -> dict[str, float]:
    """Share of the variance of `results` between points of equal value of a key, in [0, 1], by key.

    `points`: the value of every key, as typed. Corrected for what chance puts between so many groups; keys do not add
    up to 1, since noise and their interplay belong to none. Empty where there are too few points. A numeric key with
    more values than half the points is cut into BINS of equally many.
    """
    if len(results) < FEWEST:
        return {}
    mean = sum(results) / len(results)
    total = sum((each - mean) ** 2 for each in results)
    keys = points[0].keys()
    return {key: _share([point[key] for point in points], results, mean, total) for key in keys}


def _share(values: Sequence[str], results: Sequence[float], mean: float, total: float) -> float:
    groups: dict[object, list[float]] = {}
    for label, result in zip(_labels(values), results, strict=True):
        groups.setdefault(label, []).append(result)
    free = len(results) - len(groups)
    if total <= 0 or free <= 0 or len(groups) < 2:
        return 0.0
    between = sum(len(group) * (sum(group) / len(group) - mean) ** 2 for group in groups.values())
    by_chance = (len(groups) - 1) * (total - between) / free
    return max(0.0, (between - by_chance) / total)


def _labels(values: Sequence[str]) -> Sequence[object]:
    """The values, or the bins of a number that hardly any two points share."""
    try:
        numbers = [float(each) for each in values]
    except ValueError:
        return values
    if len(set(numbers)) <= len(numbers) / 2:
        return values
    ranked = sorted(set(numbers))
    return [ranked.index(each) * BINS // len(ranked) for each in numbers]
