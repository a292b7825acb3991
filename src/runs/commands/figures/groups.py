"""Which runs are one line of a figure and one row of a table: those whose configs differ in nothing but their seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from src.config.tree import leaves, steers
from src.config.wording import bare
from src.errors import FolderError
from src.runs.commands.compare import differing
from src.runs.commands.filters import Condition, conditions
from src.runs.commands.summary import Summary

SEED, NAME = "seed", "name"
# How often a checkpoint is kept explains no curve, but would be told before the keys that do.
UNTOLD = frozenset({"checkpoint", SEED})


@dataclass(frozen=True)
class Group:
    """Runs of one config, and what tells it from the others: values as one would type them, by key."""

    runs: tuple[Summary, ...]
    values: Mapping[str, str]

    @property
    def label(self) -> str:
        """Its values behind their keys, without the sections of keys where no two end alike; else the run's name."""
        return " ".join(f"{short_key(key, self.values)}={text}" for key, text in self.values.items()) or (
            self.runs[0].name
        )


def grouped(runs: Sequence[Summary], told: Sequence[str] = ()) -> list[Group]:
    """In the order of the runs.

    Args:
        runs: at least one.
        told: keys for the labels; none: the fewest in which the configs differ. With `seed` among them each seed
            stands alone.

    FolderError where there is no run, ConfigError of a key that no run has.
    """
    if not runs:
        raise FolderError("no such run; name runs, a sweep or conditions such as model=llama3_8b")
    wanted, _ = conditions([f"{key}=" for key in told])
    found: dict[tuple[tuple[str, str], ...], list[Summary]] = {}
    for run in runs:
        found.setdefault(_science(run, apart=SEED in told), []).append(run)
    groups = [tuple(each) for each in found.values()]
    columns = _asked(groups, wanted) if told else _telling([each[0] for each in groups])
    values = [{key: cells[place] for key, cells in columns.items()} for place in range(len(groups))]
    return [Group(each, own) for each, own in zip(groups, values, strict=True)]


def short_key(key: str, beside: Mapping[str, str] | Sequence[str]) -> str:
    """`lr` of optim.lr, unless another key ends alike."""
    last = key.rpartition(".")[2]
    return last if sum(each.rpartition(".")[2] == last for each in beside) == 1 else key


def _science(run: Summary, *, apart: bool) -> tuple[tuple[str, str], ...]:
    """What decides the numbers of a run, but for its seed."""
    every = leaves(run.config)
    return tuple(
        sorted(
            (key, value) for key, value in every.items() if key != NAME and (apart or key != SEED) and not steers(key)
        )
    )


def _telling(runs: Sequence[Summary]) -> dict[str, list[str]]:
    """Of the keys in which configs differ the first ones that tell all of them apart: a preset of a model changes a
    dozen keys of its recipe, and its name says them all.
    """
    columns = {key: [_text(cell) for cell in cells] for key, cells in differing(runs).items()}
    found: dict[str, list[str]] = {}
    kinds = 1
    for key, cells in columns.items():
        if key in UNTOLD or steers(key):
            continue
        parts = len(set(zip(*found.values(), cells, strict=True)))
        if parts > kinds:
            found[key], kinds = cells, parts
    return found


def _asked(groups: Sequence[tuple[Summary, ...]], wanted: Sequence[Condition]) -> dict[str, list[str]]:
    columns = {each.key: [each.value(group[0]) for group in groups] for each in wanted}
    absent = [key for key, cells in columns.items() if all(cell is None for cell in cells)]
    if absent:
        raise FolderError([f"label={key}: none of these runs has it" for key in absent])
    return {key: ["" if cell is None else _plain(cell) for cell in cells] for key, cells in columns.items()}


def _text(cell: str) -> str:
    """Out of JSON, where it is some: a group's cell is the name of an option."""
    try:
        return _plain(json.loads(cell))
    except json.JSONDecodeError:
        return cell


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else bare(value)
