"""Conditions on runs, as typed: `state=running`, `model=llama3_8b`, `optim.lr<3e-4`, `age>2d`, `name=llama3*`."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from src.config.groups import SECTIONS
from src.config.presets import nearest_option
from src.config.wording import bare, nearest
from src.errors import ConfigError
from src.runs.commands.summary import Summary

_CONDITION = re.compile(r"(?P<key>[A-Za-z_][\w./]*)(?P<sign><=|>=|!=|<|>|=)(?P<text>.*)", re.DOTALL)
_DURATION = re.compile(r"(?P<count>\d+(?:\.\d+)?)(?P<unit>[smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_ORDERS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
}  # fmt: skip
# What a summary knows without its config.
FACTS = ("name", "age", *(each.name for each in fields(Summary) if each.name != "folder"))


@dataclass(frozen=True)
class Condition:
    """`key sign text`; several texts after = are alternatives: state=failed,lost."""

    key: str
    sign: str
    text: str

    def holds(self, run: Summary) -> bool:
        """A run that lacks the key fulfils != alone."""
        value = self.value(run)
        if self.sign in _ORDERS:
            wanted, found = _number(self.text), _number(value)
            return wanted is not None and found is not None and _ORDERS[self.sign](found, wanted)
        return any(_same(value, text) for text in self.text.split(",")) == (self.sign == "=")

    def value(self, run: Summary) -> Any:
        """What the run has there; of a group the option of conf/ that its section is nearest to."""
        if self.key in FACTS:
            return getattr(run, self.key)
        head, *rest = self.key.split(".")
        value = run.section(head)
        if not rest:
            known = head in SECTIONS and isinstance(value, Mapping)
            return nearest_option(head, value)[0] if known else value
        for part in rest:
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


def conditions(given: Sequence[str]) -> tuple[list[Condition], list[str]]:
    """The conditions among the arguments, and the others: names of runs. ConfigError."""
    matches = [(each, _CONDITION.fullmatch(each)) for each in given]
    found = [Condition(**match.groupdict()) for _, match in matches if match is not None]
    problems = [problem for each in found for problem in _problems(each)]
    if problems:
        raise ConfigError(problems)
    return found, [each for each, match in matches if match is None]


def chosen(runs: Sequence[Summary], wanted: Sequence[Condition]) -> list[Summary]:
    """Those that fulfil all conditions."""
    return [run for run in runs if all(each.holds(run) for each in wanted)]


def _problems(each: Condition) -> list[str]:
    head, found = each.key.partition(".")[0], []
    if each.key not in FACTS and head not in (*SECTIONS, "seed", "root"):
        meant = nearest(each.key, [*FACTS, *SECTIONS])
        found.append(f"{each.key}: no such key of a run" + (f"; did you mean {meant}?" if meant else ""))
    if each.sign in _ORDERS and _number(each.text) is None:
        found.append(f"{each.key}{each.sign}{each.text}: {each.text!r} is no number, nor a time such as 2d")
    return found


def _same(value: Any, text: str) -> bool:
    numbers = _number(value), _number(text)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return fnmatchcase(bare(value), text)


def _number(value: Any) -> float | None:
    """3e-4, 1_000, and times in seconds: 30m, 2d."""
    if isinstance(value, bool) or value is None:
        return None
    if match := _DURATION.fullmatch(str(value)):
        return float(match["count"]) * _SECONDS[match["unit"]]
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
