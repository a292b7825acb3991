"""`stages=[...]` as it is typed, made into the list that config.yaml records (src/config/stages.py).

    stages: [{until: 100, global_batch: [4, 8, 16]}, {until_tokens: 1e9, data: c4, seq_len: 1024}, {schedule: decay}]

A stage says until when it lasts and, as on the command line, what changes with it: options of groups by their names,
single keys by their dots. Several values of one key are a ramp: as many short stages, of equally many steps, or tokens
where the end is given in tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from src.config.build import whole_numbers
from src.config.groups import SECTIONS, options
from src.config.presets import section_of
from src.config.stages import CHANGES, UNTIL, may_differ, put
from src.config.tree import Tree
from src.config.wording import nearest, shown, unknown
from src.errors import ConfigError

UNTIL_TOKENS = "until_tokens"
SHORT = {
    "seq_len": "task.seq_len",
    "global_batch": "task.global_batch",
    "micro_batch": "task.micro_batch",
    "lr": "optim.lr",
}
RAMPED = tuple(SHORT.values())
OFF = "off"  # an option that YAML reads as false
MISSING = "???"


def resolved(tree: Tree, typed: Mapping[str, str]) -> Tree:
    """The tree with its stages as they are recorded; of one stage alone, the plain config that it is. ConfigError.

    What is no list of stages at all stays, for `build` to refuse.
    """
    task = tree.get("task")
    listed = task.get("stages") if isinstance(task, dict) else None
    if not isinstance(listed, list) or not listed or not all(isinstance(each, dict) for each in listed):
        return tree
    walk = _Walk(tree)
    for number, entry in enumerate(listed, 1):
        walk.add(entry, last=number == len(listed))
    if walk.ended and typed.get("task.steps", str(walk.step)) != str(walk.step):
        walk.problems.append(
            f"task.steps={typed['task.steps']}: the last stage ends after step {walk.step}; leave one of the two out"
        )
    if walk.problems:
        raise ConfigError(walk.problems)
    first, *later = walk.found
    stages: list[Tree] = [{UNTIL: first.end}, *({UNTIL: each.end} | each.changes for each in later)]
    stages[-1][UNTIL] = None
    found = deepcopy(tree)
    for key, value in first.changes.items():
        put(found, key, value)
    found["task"] |= {"steps": walk.step, "stages": stages if later else None}
    return found


class _ListedStage:
    """Where it ends, and what is new in it."""

    def __init__(self, end: int, changes: Tree) -> None:
        self.end, self.changes = end, changes


class _Walk:
    """Goes through the list, and knows the config, the steps and the tokens that it has come to."""

    def __init__(self, tree: Tree) -> None:
        self.current = deepcopy(tree)
        self.current["task"]["stages"] = None
        self.steps = tree["task"].get("steps")  # where nothing else is said
        self.step, self.tokens = 0, 0
        self.ended = False  # by a stage's own word, not by task.steps
        self.found: list[_ListedStage] = []
        self.problems: list[str] = []

    def add(self, entry: Mapping[str, Any], *, last: bool) -> None:
        """One stage, or those of its ramp."""
        said = {SHORT.get(key, key): value for key, value in entry.items() if key not in (UNTIL, UNTIL_TOKENS)}
        if unfit := [self._said(_refused(str(key))) for key in said if not may_differ(str(key))]:
            self.problems += unfit
            return
        ramped = {key: value for key, value in said.items() if key in RAMPED and isinstance(value, list)}
        parts = {len(value) for value in ramped.values()} or {1}
        if len(parts) > 1 or 0 in parts:
            self.problems.append(self._said(f"ramps of one stage have equally many values: {_several(ramped)}"))
            return
        (count,) = parts
        whole = _whole(entry.get(UNTIL)), _whole(entry.get(UNTIL_TOKENS))
        if (problem := self._unfit_end(entry, *whole, last=last)) is not None:
            self.problems.append(self._said(problem))
            return
        self.ended = whole != (None, None)
        begun = self.step, self.tokens
        for part in range(1, count + 1):
            changed = said if part == 1 else {}
            changed = changed | {key: value[part - 1] for key, value in ramped.items()}
            self._take(changed, begun, whole, part / count)

    def _take(
        self, said: Mapping[str, Any], begun: tuple[int, int], whole: tuple[int | None, int | None], share: float
    ) -> None:
        """A stage that lasts until this share of the way from `begun` (step, tokens) to the end of `whole`."""
        try:
            changes = self._changed(said)
        except ConfigError as error:
            self.problems += [self._said(each) for each in error.problems]
            return
        size = self._tokens_of_a_step()
        until, until_tokens = whole
        if until_tokens is not None and size:
            wanted = begun[1] + share * (until_tokens - begun[1])
            end = self.step + max(1, round((wanted - self.tokens) / size))
        else:
            last = self.steps if until is None else until
            end = begun[0] + round(share * (last - begun[0])) if isinstance(last, int) else self.step + 1
        if end <= self.step:
            self.problems.append(self._said(f"has no step: it would begin and end after step {self.step}"))
            return
        self.found.append(_ListedStage(end, changes))
        self.tokens += (end - self.step) * size
        self.step = end

    def _unfit_end(self, entry: Mapping[str, Any], until: Any, until_tokens: Any, *, last: bool) -> str | None:
        """What is wrong with where it ends."""
        given = {key: entry[key] for key in (UNTIL, UNTIL_TOKENS) if entry.get(key) is not None}
        if len(given) > 1:
            return f"{UNTIL} and {UNTIL_TOKENS} are both given; leave one out"
        if any(type(value) is not int or value < 1 for value in (until, until_tokens) if value is not None):
            (key,) = given
            return f"{key}={shown(given[key])} is not a whole number of at least 1"
        if not given:
            if not last:
                return f"does not say where it ends; pass {UNTIL}: <optimizer step>, or {UNTIL_TOKENS}: <tokens>"
            if isinstance(self.steps, int) and self.steps <= self.step:
                return f"begins after step {self.step}, and task.steps={self.steps}; pass at least {self.step + 1}"
            return None
        begun = self.step if until is not None else self.tokens
        (key,), end = given, until_tokens if until is None else until
        if end is not None and end <= begun:
            return f"{key}={end:,} is no more than the {begun:,} after which it begins"
        return None

    def _changed(self, said: Mapping[str, Any]) -> Tree:
        """What the stage changes, as it is recorded; the config goes on with it. ConfigError."""
        groups = {key: _section(key, value) for key, value in said.items() if key in SECTIONS}
        for key, section in groups.items():
            self.current[key] = section
        for key, value in said.items():
            if key not in groups:
                put(self.current, key, deepcopy(value))
        if missing := [f"{group}.{key}" for group in groups for key in _missing(self.current[group])]:
            raise ConfigError([f"{each}: missing; pass it in this stage" for each in missing])
        self.current = whole_numbers(self.current)
        kept = [key for key in said if key in groups or key.partition(".")[0] not in groups]
        return {key: deepcopy(_value(self.current, key)) for key in kept}

    def _tokens_of_a_step(self) -> int:
        task = self.current["task"]
        sizes = task.get("seq_len"), task.get("global_batch")
        return sizes[0] * sizes[1] if all(type(each) is int for each in sizes) else 0

    def _said(self, text: str) -> str:
        return f"stage {len(self.found) + 1}: {text}"


def _refused(key: str) -> str:
    near = nearest(key, [*SHORT, UNTIL, UNTIL_TOKENS, *CHANGES])
    meant = f"; did you mean {near}?" if near else "; from=<run> begins a new run with anything changed"
    return f"{key}: a stage changes only {', '.join(CHANGES)}{meant}"


def _section(group: str, value: Any) -> Tree:
    """A whole section: the option that is named, or what is written out with its class. ConfigError."""
    if isinstance(value, Mapping) and "_target_" in value:
        return deepcopy(dict(value))
    name = OFF if value is False and OFF in options(group) else value
    if name not in options(group):
        raise ConfigError(f"{group}={shown(value)}: {unknown(str(name), options(group), 'option')}")
    section = section_of(group, name)
    if "_target_" not in section or str(section["_target_"]).endswith(".AutoLayout"):
        raise ConfigError(f"{group}={name}: is no option that a stage can have; name one of a fixed layout")
    return section


def _missing(section: Any, above: str = "") -> Iterator[str]:
    for key, value in section.items() if isinstance(section, Mapping) else ():
        if value == MISSING:
            yield f"{above}{key}"
        yield from _missing(value, f"{above}{key}.")


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else None if value is None else value


def _several(ramps: Mapping[str, Sequence[Any]]) -> str:
    return ", ".join(f"{key} has {len(value)}" for key, value in ramps.items())
