"""`extend`: a run gets more steps, and its schedule's consequences are said; with --yes its config is changed.

The folder stays the same run: `python launch.py folder=<run>` then goes on from its newest checkpoint, or from that of
an earlier step (`<run>@<step>`), such as the last before the decay: newer ones are set aside.
"""

import shlex
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from src.checkpoint.folder import SET_ASIDE, complete, step_of
from src.cluster.batch_system import batch_system
from src.config import tree as trees
from src.config.build import build, whole_numbers
from src.config.presets import section_of
from src.config.stages import entries
from src.errors import CheckpointError, ConfigError, FolderError
from src.optim.schedule import Schedule
from src.runs.commands.listing import print_json
from src.runs.folder import reopen
from src.runs.lock import Lock

UNCHANGED = "nothing is changed yet; --yes does it"
STEPS = ("steps", "task.steps")


def extend(folder: Path, step: int | None, words: Sequence[str], *, yes: bool, as_json: bool) -> int:
    """`words`: steps=2000, and keys of the schedule. ConfigError, CheckpointError, FolderError."""
    before = trees.read(folder / "config.yaml")
    if entries(before):
        raise ConfigError(
            f"{folder}: has stages, whose schedules know how many steps there are; python launch.py from={folder} "
            "task.steps=... begins a run with its weights"
        )
    after = changed(before, words)
    build(after)
    old, new = int(before["task"]["steps"]), int(after["task"]["steps"])
    start, newer = _start(folder, step, complete(folder / "checkpoints"))
    if new <= max(start, old if step is None else start):
        raise ConfigError(f"steps={new}: the run has {old} steps and goes on after step {start}; pass more")
    differences, said = trees.difference(before, after, steering=True), consequences(before, after, start, folder)
    if yes:
        _change(folder, after, newer, f"finished {old} steps; extended to {new}")
    if as_json:
        facts = {"differences": differences, "consequences": said, "set_aside": newer, "changed": yes}
        print_json(facts | {"command": ["python", "launch.py", f"folder={folder}"]})
    else:
        lines = [*(f"{folder.name}: {line}" for line in differences), *said]
        print(*lines, *(f"{each.name} is set aside, as {each.name}{SET_ASIDE}" for each in newer), sep="\n")
        print(f"to go on: python launch.py folder={shlex.quote(str(folder))}" if yes else UNCHANGED)
    return 0


def _change(folder: Path, after: trees.Tree, newer: Sequence[Path], why: str) -> None:
    lock = Lock(folder / "lock", batch_system())
    lock.take()
    try:
        for each in newer:
            each.rename(each.with_name(each.name + SET_ASIDE))
        trees.write(folder / "config.yaml", after)
        reopen(folder, why)
    finally:
        lock.release()


def changed(tree: trees.Tree, words: Sequence[str]) -> trees.Tree:
    """The config with the typed keys. ConfigError for one that an extension may not change."""
    found, problems = deepcopy(tree), []
    for word in words:
        key, equals, text = word.partition("=")
        if key == "schedule" and equals:
            found["schedule"] = section_of("schedule", text)
        elif key in STEPS and equals:
            found["task"]["steps"] = _value(text)
        elif key.startswith("schedule.") and equals:
            found["schedule"][key.removeprefix("schedule.")] = _value(text)
        else:
            problems.append(
                f"{word}: an extension changes steps= and schedule keys; any other key makes another run: "
                "python -m src.runs fork"
            )
    if not any(word.partition("=")[0] in STEPS for word in words):
        problems.append(f"steps: missing; pass steps=..., more than {tree['task']['steps']}")
    if problems:
        raise ConfigError(problems)
    return whole_numbers(found)


def _value(text: str) -> Any:
    """As YAML has it, and 1e3 as a number."""
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _start(folder: Path, step: int | None, there: Sequence[Path]) -> tuple[int, list[Path]]:
    """The step after which it will go on, and the checkpoints that are newer."""
    steps = {step_of(path) or 0: path for path in there}
    if step is None:
        return max(steps, default=0), []
    if step not in steps:
        raise CheckpointError(f"{folder}@{step}: no complete checkpoint of that step; it has {sorted(steps)}")
    return step, [path for number, path in steps.items() if number > step]


def consequences(before: trees.Tree, after: trees.Tree, start: int, folder: Path) -> list[str]:
    """What becomes of the learning rate, in lines for a person."""
    (old, old_steps, peak), (new, new_steps, _) = _schedule(before), _schedule(after)
    last, following = peak * old.multiplier(max(start - 1, 0), old_steps), peak * new.multiplier(start, new_steps)
    found = [f"learning rate: {last:.3g} at step {start}, {following:.3g} at the next"]
    if (decay := new.decay_span(new_steps)) is not None:
        found.append(f"decay: from step {decay[0]} to step {decay[1]} of {new_steps}")
    if start and old.rises_again(start, old_steps, last, following):
        times = f", {following / last:.3g} times as high" if last else ""
        found.append(f"the rate had decayed and rises again{times}")
        steps = [step_of(path) or 0 for path in complete(folder / "checkpoints")]
        earlier = [step for step in steps if not old.decayed(step - 1, old_steps)]
        if earlier:
            found.append(f"  from before the decay: extend {folder}@{max(earlier)} ...")
        if old.min_factor > 0:
            found.append(f"  without a rise: schedule.total_steps={old.total_steps or old_steps}")
    if new.rests(new_steps):
        raise ConfigError(
            f"schedule.total_steps={new.total_steps}: the learning rate is 0 from there to step {new_steps}; pass "
            "more, or schedule.min_factor above 0"
        )
    taken = range(0, start, max(1, start // 100))
    rates = [(new.multiplier(step, new_steps), old.multiplier(step, old_steps)) for step in taken]
    ratios = [now / then for now, then in rates if then]
    if start and (most := max(ratios, default=1.0)) > 1.01:
        found.append(f"a run of {new_steps} steps from the start would have had up to {most:.3g} times the rate so far")
    return found


def _schedule(tree: Mapping[str, Any]) -> tuple[Schedule, int, float]:
    """With steps and peak learning rate."""
    section = {key: value for key, value in tree["schedule"].items() if key != "_target_"}
    if "steps" not in tree["task"] or "lr" not in tree["optim"]:
        raise FolderError(f"{tree['name']}: its task has no steps to extend")
    return Schedule(**section), int(tree["task"]["steps"]), float(tree["optim"]["lr"])
