"""Whose weights a task reads: `run=` names the folder of an earlier run and `step=` one of its checkpoints.

On the launcher `completed` puts that run's sections in the place of conf's defaults, so that ranks see a plain config;
on the ranks `load` fills a network.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from src.checkpoint.folder import complete, is_complete, step_folder, step_of
from src.config.tree import Tree, read
from src.errors import CheckpointError

if TYPE_CHECKING:
    from src.distributed.network import Network
    from src.train.run import Run

# Sections that say what the weights are and what they were trained on.
INHERITED = ("model", "tokenizer", "data", "precision", "seed")


class Reads(Protocol):
    """A task with these keys starts from the weights that they name; `source` is called `run` in conf and commands."""

    @property
    def source(self) -> str: ...
    @property
    def step(self) -> int | None: ...


def completed(tree: Tree, typed: Mapping[str, str]) -> Tree:
    """The tree with what `run=` stands for; what was typed wins. CheckpointError when it names nothing to read."""
    task = tree.get("task")
    if not isinstance(task, dict) or not isinstance(task.get("run"), str):
        return tree
    folder = Path(task["run"]).expanduser().absolute()
    checkpoint = find(folder, task.get("step"))
    _check_trust(folder, tree)
    earlier = read(folder / "config.yaml")
    sections = {key: _overlaid(key, earlier[key], tree, typed) for key in INHERITED if key not in typed}
    found = tree | sections | {"task": task | {"run": str(folder), "step": step_of(checkpoint)}}
    if "name" not in typed:
        found["name"] = f"{str(task['_target_']).rpartition('.')[2].lower()}-{folder.name}"
    return found


def find(folder: Path, step: object) -> Path:
    """The checkpoint of a step, or the newest one, in a run folder."""
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"task.run={folder}: no run folder, it has no config.yaml")
    there = complete(folder / "checkpoints")
    if not there:
        raise CheckpointError(f"task.run={folder}: has no complete checkpoint")
    if step is None:
        return there[-1]
    if not isinstance(step, int) or not is_complete(wanted := step_folder(folder / "checkpoints", step)):
        steps = ", ".join(str(step_of(path)) for path in there)
        raise CheckpointError(f"task.step={step}: {folder} has no complete checkpoint of that step; it has {steps}")
    return wanted


def load(task: Reads, run: "Run", network: "Network", folder: Path) -> Path:
    """Collective. Fill the network with the weights that the task names; `folder`: of this run. Returns the checkpoint.

    The launcher has settled the step and whether to trust it.
    """
    from src.checkpoint.store import Store

    path = find(Path(task.source), task.step)
    store = Store(folder / "checkpoints", run.checkpoint.model_copy(update={"trusted": True}))
    store.load(path, {"model": network.tensors()})
    return path


def _check_trust(folder: Path, tree: Tree) -> None:
    if not tree["checkpoint"]["trusted"] and not folder.resolve().is_relative_to(Path(tree["root"]).resolve()):
        raise CheckpointError(
            f"task.run={folder}: outside of root={tree['root']}. A checkpoint's metadata is pickle, which can run any "
            "code: if you know who wrote it, set checkpoint.trusted=true"
        )


def _overlaid(section: str, earlier: Any, tree: Tree, typed: Mapping[str, str]) -> Any:
    """The earlier run's section, with the single keys of it that were typed."""
    merged = deepcopy(earlier)
    for key in typed:
        head, *path = key.split(".")
        if head != section or not path:
            continue
        here, there = tree[section], merged
        for part in path[:-1]:
            here, there = here[part], there.setdefault(part, {})
        there[path[-1]] = here[path[-1]]
    return merged
