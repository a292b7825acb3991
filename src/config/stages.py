"""A run in stages, as its config records it: `task.stages` is a list of ends, with what changes from there on.

    stages:
    - until: 100
    - until: 300
      task.seq_len: 64
      data: {_target_: src.data.config.Text, ...}
    - until: null
      schedule.decay_ratio: 1.0

The first stage is the config itself. Each later one has what it names, by dotted keys or as a whole section, and is
otherwise like the stage before it. The last one ends with task.steps. What a person types becomes this form in
src/config/composition/stages.py.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from src.config.upgrades import Tree

UNTIL = "until"
# What a stage may change: a section, or a key with those below it. None of them shapes a weight or a moment.
CHANGES = (
    *("data", "schedule", "parallel", "recompute", "compile"),
    *("task.seq_len", "task.global_batch", "task.micro_batch", "optim.lr"),
    *("model.rope_theta", "model.rope_scaling", "model.max_seq_len", "model.attention", "model.mask"),
)


def may_differ(key: str) -> bool:
    """Whether a stage may change this dotted key."""
    return any(key == each or key.startswith(f"{each}.") for each in CHANGES)


def entries(tree: Mapping[str, Any]) -> list[Tree]:
    """The recorded stages; none of a run that has one stage alone."""
    task = tree.get("task")
    found = task.get("stages") if isinstance(task, Mapping) else None
    return list(found) if isinstance(found, list) else []


def stage_trees(tree: Mapping[str, Any]) -> list[Tree]:
    """Each stage as the config of a run of its own, whose task.steps are those of the stage; none of other runs."""
    listed = entries(tree)
    if not listed:
        return []
    found, done = [], 0
    current: Tree = dict(tree) | {"task": tree["task"] | {"stages": None}}
    for entry in listed:
        current = deepcopy(current)
        for key, value in changes(entry):
            put(current, key, deepcopy(value))
        end = tree["task"]["steps"] if entry[UNTIL] is None else entry[UNTIL]
        current["task"]["steps"] = end - done
        found.append(current)
        done = end
    return found


def stage_at(tree: Mapping[str, Any], step: int) -> Tree:
    """The config of the stage that has taken this step, as a run of its own; the config itself of a run without
    stages.
    """
    ends = [each[UNTIL] for each in entries(tree)]
    number = next((number for number, end in enumerate(ends) if end is None or step <= end), None)
    return dict(tree) if number is None else stage_trees(tree)[number]


def changes(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a stage."""
    return ((key, value) for key, value in entry.items() if key != UNTIL)


def restarts_schedule(entry: Mapping[str, Any]) -> bool:
    """Whether a stage names its schedule, which then begins with it."""
    return any(key.partition(".")[0] == "schedule" for key, _ in changes(entry))


def put(tree: Tree, key: str, value: Any) -> None:
    """Set a dotted key; what lies on the way and is no dict becomes one."""
    *path, last = key.split(".")
    for part in path:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[last] = value
