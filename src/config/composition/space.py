"""The ranges of a search, out of Hydra's grammar: interval(1e-5,1e-2), tag(log,interval(...)), range(1,9), a,b,c."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import HydraException

from src.errors import ConfigError

MOST_CHOICES = 10_000  # of one key; an interval has any number of values
ADVICE = "no range; write a,b,c or interval(low,high) or tag(log,interval(low,high))"


@dataclass(frozen=True)
class Interval:
    """From low to high, both included; `whole`: of whole numbers."""

    low: float
    high: float
    log: bool
    whole: bool

    @property
    def ends(self) -> tuple[str, str]:
        """As one would type them."""
        return self.text(self.low), self.text(self.high)

    def text(self, value: float) -> str:
        """Four digits of it are enough for a person and for a search."""
        return str(int(value)) if self.whole else f"{min(max(float(f'{value:.4g}'), self.low), self.high)!r}"


@dataclass(frozen=True)
class Choices:
    """One of these, as typed."""

    texts: tuple[str, ...]

    @property
    def ends(self) -> tuple[str, str]:
        """The first and the last."""
        return self.texts[0], self.texts[-1]


def ranges(space: Mapping[str, str]) -> dict[str, Interval | Choices]:
    """ConfigError for what cannot be drawn from, all at once."""
    found: dict[str, Interval | Choices] = {}
    problems: list[str] = []
    for key, text in space.items():
        try:
            parsed = OverridesParser.create().parse_override(f"{key}={text}")
            value = parsed.value()
        except HydraException:
            problems.append(f"{key}={text}: {ADVICE}")
            continue
        if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
            log, whole = "log" in value.tags, isinstance(value.start, int) and isinstance(value.end, int)
            found[key] = Interval(value.start, value.end, log, whole)
            if value.start >= value.end or (log and value.start <= 0):
                problems.append(f"{key}={text}: an interval needs low < high{', both above 0' if log else ''}")
        elif parsed.is_sweep_override() and parsed.is_discrete_sweep() and not text.startswith("glob("):
            texts = tuple(itertools.islice(parsed.sweep_string_iterator(), MOST_CHOICES))
            found[key] = Choices(texts)
            if not texts:
                problems.append(f"{key}={text}: holds no value; write a,b,c or range(1,9)")
        else:
            problems.append(f"{key}={text}: {ADVICE}")
    if problems:
        raise ConfigError(problems)
    return found
