"""What a new run takes over from another's checkpoint (checkpoint.progress), for a person, before anything starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.checkpoint.stored import shapes
from src.config.stages import stage_at
from src.config.tree import Tree, difference, read
from src.launch.initial import initial_of, read_values

if TYPE_CHECKING:
    from src.run import Run

Shapes = Mapping[str, tuple[tuple[int, ...], str]]  # shape and dtype of each tensor of a checkpoint
UNTOLD = ("name", "checkpoint", "tokenizer")  # a tokenizer is that of the run, by the place where it is kept
MOST = 12  # differences that are told


def taken(tree: Tree, run: "Run", folder: Path) -> list[str]:
    """Lines: the checkpoint, what differs from its run, and what is kept; none for a run that goes on with one."""
    path = initial_of(run, folder)
    if path is None or run.checkpoint.progress == "all":
        return []
    values, config = read_values(path), path.parents[1] / "config.yaml"
    lines = [f"from {path}: {values['step']:,} steps, {values['position']:,} samples"]
    if config.is_file():
        changed = [
            line for line in difference(stage_at(read(config), values["step"]), tree, steering=True) if _told(line)
        ]
        lines += [f"  {line}" for line in changed[:MOST]]
        lines += [f"  and {len(changed) - MOST} more keys differ"] if len(changed) > MOST else []
    place = f"go on at {values['position']:,}" if run.checkpoint.progress == "samples" else "begin at 0"
    return [*lines, f"  {_kept(run, path)}; steps begin at 0, samples {place}"]


def _told(line: str) -> bool:
    return line.partition(":")[0].partition(".")[0] not in UNTOLD


def _kept(run: "Run", path: Path) -> str:
    """What becomes of weights and moments."""
    if run.checkpoint.trusted:  # torch reads the metadata, on the ranks
        return "weights are kept, and moments where they fit"
    there, storage = shapes(path), run.precision.storage
    dtypes = {dtype for name, (_, dtype) in there.items() if name.startswith("model.")}
    return f"weights are kept{'' if storage in dtypes else f' as {storage}'}; {_moments(run, there)}"


def _moments(run: "Run", there: Shapes) -> str:
    """Of how many parameters the optimizer's state is there, and what is in its place."""
    wanted = {each.name: run.optim.state(each.name, each.shape) for each in run.model.weights()}
    fit = sum(_fits(there, name, state) for name, state in wanted.items())
    ours = {f"optimizer.{name}.{key}": kept.dtype for name, state in wanted.items() for key, kept in state.items()}
    names = ", ".join(sorted({each.rpartition(".")[2] for each in ours}))
    if fit == len(wanted):
        changed = sorted({dtype for name, dtype in ours.items() if there[name][1] != dtype})
        return f"moments ({names}) are kept{f' as {changed[0]}' if changed else ''}"
    has = sorted({name.rpartition(".")[2] for name in there if name.startswith("optimizer.")} - {"step"})
    what = f"this run's are {names}, the checkpoint's {', '.join(has) or 'none'}"
    return f"moments of {fit} of {len(wanted)} parameters are kept, the others begin at 0: {what}"


def _fits(there: Shapes, name: str, state: Mapping[str, Any]) -> bool:
    found = ((there.get(f"optimizer.{name}.{key}"), kept) for key, kept in state.items())
    return all(each is not None and tuple(each[0]) == tuple(kept.shape) for each, kept in found)
