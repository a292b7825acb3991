"""`from=<run>[@step]`: a new run with another's weights, moments and, but for what is typed, config.

On the launcher it becomes plain config: the run's sections, `checkpoint.initial` with the step's folder, and
`checkpoint.progress`, which says whether the samples go on where the run had come to.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from src.checkpoint.fetched import fetch
from src.checkpoint.folder import complete, step_of
from src.config.groups import FROM, RECIPE, SHORT
from src.config.stages import stage_at
from src.config.tree import SITE, Tree, identity, read
from src.errors import CheckpointError, ConfigError
from src.storage.remote import is_url
from src.tasks.inherit import find, kept_tokenizer, meant, overlaid

PRETRAIN = "src.tasks.pretrain.config.Pretrain"
ORDER = ("data", "seed")  # with the tokenizer and task.seq_len they decide which samples are the first ones


def begun_from(tree: Tree, typed: Mapping[str, str]) -> Tree:
    """The tree with what `from=` stands for; what was typed wins. CheckpointError where there is no such checkpoint."""
    ours = {key: value for key, value in tree.items() if key != FROM}
    text = tree[FROM]
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{FROM}={text}: names no run; pass {FROM}=<run folder>[@step]")
    _check(ours, typed, text)
    step = _step(text, ours)
    folder = step.parents[1]
    theirs = stage_at(read(folder / "config.yaml"), step_of(step) or 0)
    if theirs["task"].get("_target_") != PRETRAIN:
        raise CheckpointError(
            f"{FROM}={text}: {folder} is no run of task=pretrain, and has no optimizer to go on with; its weights "
            f"start a run by checkpoint.initial={step} checkpoint.progress=none"
        )
    keys = _spelt(typed)
    found = ours | {key: _chosen(key, theirs, ours, keys) for key in ours if key in theirs and key not in SITE}
    if "tokenizer" not in keys and (kept := kept_tokenizer(folder, theirs)) is not None:
        found["tokenizer"] = kept  # weights know no other ids than those of the run's tokenizer, however it was trained
    progress = {} if "checkpoint.progress" in keys else {"progress": _progress(found, theirs, keys)}
    found["checkpoint"] = found["checkpoint"] | {"initial": str(step)} | progress
    if "name" not in keys:
        found["name"] = f"{re.sub(r'(-from[0-9]+)+$', '', theirs['name'])}-from{step_of(step)}"
    return found


def _check(ours: Tree, typed: Mapping[str, str], text: str) -> None:
    """ConfigError for what contradicts `from=`."""
    if ours["task"].get("_target_") != PRETRAIN:
        raise ConfigError(f"{FROM}={text}: begins a run of task=pretrain; other tasks take run=")
    for key in ("checkpoint.initial", RECIPE, "model"):
        if key in typed:
            why = "the run has values of its own" if key == RECIPE else "the run has it"
            raise ConfigError(f"{key} with {FROM}={text}: {why}; leave it out, or pass single keys")


def _step(text: str, ours: Tree) -> Path:
    """The folder of the checkpoint: of a step folder, a run folder, or a run's name in the root."""
    where, mark, number = text.rpartition("@")
    if not mark or not number.isdigit():
        where, number = text, ""
    if is_url(where):
        return fetch(where, Path(ours["root"]).absolute() / "cache", FROM, int(number) if number else None)
    place = Path(where).expanduser().absolute()
    if not number and step_of(place) is not None and place in complete(place.parent):
        return place
    folders = (place, Path(ours["root"]).absolute() / where)
    folder = next((each for each in folders if (each / "config.yaml").is_file()), None)
    if folder is None:
        raise CheckpointError(f"{FROM}={text}: no run folder, it has no config.yaml{meant(place, ours)}")
    return find(folder, int(number) if number else None, keys=(FROM, "step"))


def _chosen(key: str, theirs: Tree, ours: Tree, typed: Mapping[str, str]) -> object:
    """A section of the run with the single keys that were typed; ours, where an option of it was chosen."""
    if key in typed and key != "task":
        return ours[key]
    return overlaid(key, theirs[key], ours, typed)


def _progress(found: Tree, theirs: Tree, typed: Mapping[str, str]) -> str:
    """The place in the samples is kept where the samples are the run's."""
    same = identity({key: found[key] for key in ORDER}) == identity({key: theirs[key] for key in ORDER})
    same = same and not any(key.partition(".")[0] == "tokenizer" for key in typed)
    return "samples" if same and found["task"]["seq_len"] == theirs["task"]["seq_len"] else "none"


def _spelt(typed: Mapping[str, str]) -> dict[str, str]:
    """With `seq_len=` as `task.seq_len=` too."""
    return dict(typed) | {f"task.{key}": text for key, text in typed.items() if key in SHORT}
