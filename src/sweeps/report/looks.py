"""Colours and dashes of runs on a page, by the values of the keys in which they differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# From cold to warm with rising values, legible on white and on black; and colours that the colour-blind tell apart.
RAMP = ("#6b4fc3", "#3f78c8", "#1f97a6", "#22a884", "#5cb85c", "#b5b827")
DISTINCT = ("#3366cc", "#e07b39", "#2a9d6f", "#c94f7c", "#8a63d2", "#b8930a", "#3fa7d6", "#7f7f7f")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MOST = 12  # values of a key that a legend lists, to be switched on and off; of more it shows the ends


@dataclass(frozen=True)
class Look:
    colour: str  # "#rrggbb"
    dash: str  # one of DASHES


@dataclass(frozen=True)
class LegendEntry:
    """One value of a key; `look` says what of it is meant: its colour, its dash, both, or nothing."""

    value: str
    look: Look
    shows: str


def looks(runs: Sequence[Mapping[str, str]], keys: Sequence[str]) -> list[Look]:
    """Of each run: the first key colours it, the second one dashes it. With one key alone, values beyond the colours
    have the same colours with another dash; with none, runs are told apart by their place.

    Args:
        runs: the value of every key, as typed.
        keys: in which the runs differ, the most telling first.
    """
    colours = _of_values(runs, keys[0]) if keys else _in_turn([str(number) for number in range(len(runs))])
    if len(keys) < 2:
        return [colours[run[keys[0]] if keys else str(number)] for number, run in enumerate(runs)]
    values = ordered([run[keys[1]] for run in runs])
    dashes = {value: DASHES[place % len(DASHES)] for place, value in enumerate(values)}
    return [Look(colours[run[keys[0]]].colour, dashes[run[keys[1]]]) for run in runs]


def legend(
    runs: Sequence[Mapping[str, str]], keys: Sequence[str], drawn: Sequence[Look]
) -> dict[str, list[LegendEntry]]:
    """Entries of each key, values in order. `drawn`: what `looks` made of the same runs."""
    found = {}
    for place, key in enumerate(keys):
        by_value = {run[key]: look for run, look in zip(runs, drawn, strict=True)}
        shows = ("both" if len(keys) == 1 else "colour", "dash", "")[min(place, 2)]
        found[key] = [LegendEntry(value, by_value[value], shows) for value in ordered(list(by_value))]
    return found


def _of_values(runs: Sequence[Mapping[str, str]], key: str) -> dict[str, Look]:
    values = ordered([run[key] for run in runs])
    if numeric(values) is None:
        return _in_turn(values)
    return {value: Look(ramp(place / max(1, len(values) - 1)), "solid") for place, value in enumerate(values)}


def _in_turn(values: Sequence[str]) -> dict[str, Look]:
    rounds = [Look(colour, dash) for dash in DASHES for colour in DISTINCT]
    return {value: rounds[place % len(rounds)] for place, value in enumerate(values)}


def ramp(share: float) -> str:
    """The colour at 0 to 1 of the ramp, between its two nearest anchors."""
    place = share * (len(RAMP) - 1)
    first = min(int(place), len(RAMP) - 2)
    low, high = ([int(RAMP[each][at : at + 2], 16) for at in (1, 3, 5)] for each in (first, first + 1))
    mixed = (round(a + (b - a) * (place - first)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{each:02x}" for each in mixed)


def ordered(texts: Sequence[str]) -> list[str]:
    """Each value once: numbers by size, words as they come."""
    values = list(dict.fromkeys(texts))
    numbers = numeric(values)
    return values if numbers is None else [text for _, text in sorted(zip(numbers, values, strict=True))]


def numeric(texts: Sequence[str]) -> list[float] | None:
    """The numbers that all of them are; None where one is a word."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None
