"""Whose weights a task reads: `run=` names the folder of an earlier run and `step=` one of its checkpoints.

On the launcher `completed` puts that run's sections in the place of conf's defaults, so that ranks see a plain config;
on the ranks `load` fills a network. `run=hf:<folder or hub id>` names weights in Hugging Face layout instead, which
become the `checkpoint.initial` of the task's own run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from src.checkpoint.config import FOREIGN
from src.checkpoint.fetched import fetch as fetch_run
from src.checkpoint.folder import step_of
from src.config.base import path_text
from src.config.composition.stages import resolved
from src.config.groups import CONF, FROM, LADDER, SCALE
from src.config.tree import Tree, read
from src.errors import CheckpointError
from src.hugging_face.hub import fetch, is_local
from src.hugging_face.load import model_section, noted
from src.storage.remote import is_url
from src.storage.streams import to_stderr
from src.tasks.fitted import AUTO, BYTES, fitted, with_vocabulary
from src.tasks.from_run import begun_from
from src.tasks.inherit import check_typed, find, meant, overlaid, sections
from src.tasks.ladder import scaled

if TYPE_CHECKING:
    from src.distributed.model_stages import ModelStages
    from src.run import Run

# Sections that say what the weights are and what they were trained on.
INHERITED = ("model", "tokenizer", "data", "precision", "optim", "schedule", "seed")
AVERAGES = "ema.weights."  # in a checkpoint
TOKENIZER = "src.data.tokenizer.File"
PREPARE = "src.tasks.prepare.config.Prepare"
MERGE = "src.tasks.merge.config.Merge"


class Reads(Protocol):
    """Interface of a task that starts from the weights of a run; `source` is called `run` in conf and on the command
    line.
    """

    @property
    def source(self) -> str: ...
    @property
    def step(self) -> int | None: ...


def completed(tree: Tree, typed: Mapping[str, str]) -> Tree:
    """The tree with what `run=`, `from=`, model=auto, null sizes and stages stand for; what was typed wins.

    CheckpointError, ConfigError or DataError when that is nothing.
    """
    return resolved(_completed(tree, typed), typed)


def _completed(tree: Tree, typed: Mapping[str, str]) -> Tree:
    if FROM in tree:
        return with_vocabulary(begun_from(tree, typed))
    if SCALE in tree or LADDER in tree:
        return scaled(with_vocabulary(tree), typed)
    tree = fitted(tree, typed)
    task = tree.get("task")
    if isinstance(task, dict) and task.get("_target_") == MERGE and "runs" in task:
        return with_vocabulary(_of_runs(tree, typed))
    if isinstance(task, dict) and isinstance(task.get("run"), str):
        check_typed(typed)
        try:
            path_text(task["run"])
        except ValueError as error:
            raise CheckpointError(f"task.run: {error}") from error
        foreign = task["run"].startswith(FOREIGN)
        tree = _of_elsewhere(tree, typed) if foreign else _of_run(tree, typed)
        if "name" not in typed:
            kind, source = str(task["_target_"]).rpartition(".")[2].lower(), tree["task"]["run"].rstrip("/")
            tree["name"] = f"{kind}-{source.rpartition('/')[2].partition('@')[0]}"
    if isinstance(task, dict) and task.get("_target_") == PREPARE and "name" not in typed:
        tree = tree | {"name": f"prepare-{_kind(tree.get('data'))}"}
    model = tree.get("model")
    auto = isinstance(model, dict) and model.get("_target_") == AUTO
    return with_vocabulary(_with_model(tree, typed) if auto else tree)


def _kind(data: object) -> str:
    """A word for the data: what it is, not how its files are called."""
    return str(data.get("_target_", "")).rpartition(".")[2].lower() if isinstance(data, dict) else "data"


def _of_runs(tree: Tree, typed: Mapping[str, str]) -> Tree:
    """With the sections of the first of several runs or exports, and a source and a step for each checkpoint."""
    check_typed(typed)
    sources, steps = tree["task"]["runs"], tree["task"].get("steps")
    sources = [sources] if isinstance(sources, str) else sources
    if not isinstance(sources, list) or not all(isinstance(each, str) for each in sources):
        return tree  # the task's class says what is wrong
    steps = steps if isinstance(steps, list) else [steps] * len(sources)
    sources = sources * len(steps) if len(sources) == 1 else sources
    if not steps or len(sources) != len(steps):
        return tree
    each = [_one_of_runs(tree, typed, *pair) for pair in zip(sources, steps, strict=True)]
    first = each[0]
    auto = isinstance(first["model"], dict) and first["model"].get("_target_") == AUTO
    found = _with_model(first, typed) if auto else first
    pairs = {"runs": [one["task"]["run"] for one in each], "steps": [one["task"]["step"] for one in each]}
    kept = {key: value for key, value in found["task"].items() if key not in ("run", "step")}
    name = {} if "name" in typed else {"name": f"merge-{pairs['runs'][0].rstrip('/').rpartition('/')[2]}"}
    return found | {"checkpoint": tree["checkpoint"], "task": kept | pairs} | name


def _one_of_runs(tree: Tree, typed: Mapping[str, str], source: str, step: object) -> Tree:
    """The tree as if this run or export were the only one."""
    try:
        path_text(source)
    except ValueError as error:
        raise CheckpointError(f"task.runs: {error}") from error
    if not source.startswith(FOREIGN):
        return _of_run(
            tree | {"task": tree["task"] | {"run": source, "step": step}}, typed, ("task.runs", "task.steps")
        )
    if not is_local(folder := source.removeprefix(FOREIGN)):
        raise CheckpointError(f"task.runs={source}: is no folder here; download it, and pass {FOREIGN}<folder>")
    if step is not None:
        raise CheckpointError(f"task.steps={step}: {source} has no steps; pass null in its place")
    source = f"{FOREIGN}{Path(folder).expanduser().absolute()}"
    return _of_elsewhere(tree | {"task": tree["task"] | {"run": source, "step": None}}, typed)


def _of_run(tree: Tree, typed: Mapping[str, str], keys: tuple[str, str] = ("task.run", "task.step")) -> Tree:
    """With the sections of an earlier run, and its newest step where none is given. `keys`: that name the two."""
    task = tree["task"]
    folder = Path(task["run"]).expanduser().absolute()
    if is_url(url := task["run"]):
        if task.get("to", "") is None:
            raise CheckpointError(f"task.to=null: {url} is no run folder to write into; pass to=<folder>")
        step = task.get("step") if isinstance(task.get("step"), int) else None
        found = fetch_run(url, Path(tree["root"]).absolute() / "cache", keys[0], step)
        folder, task = found.parents[1], task | {"step": step_of(found)}
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{keys[0]}={folder}: no run folder, it has no config.yaml{meant(folder, tree)}")
    checkpoint = find(folder, task.get("step"), keys)
    if task.get("ema"):
        _check_average(folder, checkpoint)
    earlier = sections(folder, step_of(checkpoint) or 0)
    inherited = {key: overlaid(key, earlier[key], tree, typed) for key in INHERITED if key not in typed}
    given = {"run": str(folder), "step": step_of(checkpoint)}
    if "seq_len" in task and not {"seq_len", "task.seq_len"} & typed.keys():
        given["seq_len"] = earlier["task"]["seq_len"]
    return tree | inherited | {"task": task | given}


def _check_average(folder: Path, checkpoint: Path) -> None:
    """CheckpointError where the run kept none."""
    from src.checkpoint.stored import shapes

    if not any(name.startswith(AVERAGES) for name in shapes(checkpoint)):
        raise CheckpointError(
            f"task.ema=true: {folder} kept no average of its weights (task.ema_decay=null); pass task.ema=false"
        )


def _of_elsewhere(tree: Tree, typed: Mapping[str, str]) -> Tree:
    """With the model and the tokenizer of a folder or hub id in Hugging Face layout."""
    task = tree["task"]
    if task.get("ema"):
        raise CheckpointError(f"task.ema=true: {task['run']} has no average of its weights; pass task.ema=false")
    if task.get("step") is not None:
        raise CheckpointError(f"task.step={task['step']}: {task['run']} has no steps; leave it out")
    folder = fetch(task["run"].removeprefix(FOREIGN), weights=False).folder
    found = tree | {"checkpoint": tree["checkpoint"] | {"initial": task["run"]}}
    if "model" not in typed:
        found["model"] = overlaid("model", read(CONF / "model" / "auto.yaml"), tree, typed)
    if "tokenizer" not in typed:
        found["tokenizer"] = _tokenizer(Path(folder))
    return found


def _with_model(tree: Tree, typed: Mapping[str, str]) -> Tree:
    """With the model that config.json says in the place of model=auto."""
    initial = tree["checkpoint"]["initial"]
    if not str(initial).startswith(FOREIGN):
        shown = "null" if initial is None else initial
        raise CheckpointError(
            f"model=auto reads config.json of checkpoint.initial=hf:<folder or hub id>, which is {shown}, or the "
            "amount of text of data=text"
        )
    folder = Path(fetch(str(initial).removeprefix(FOREIGN), weights=False).folder)
    there, unread = model_section(folder)
    ours = tree["model"]
    merged = ours | there | {"max_seq_len": ours["max_seq_len"] or there["max_seq_len"]}
    for group in ("moe", "mtp"):
        if isinstance(said := there.get(group), dict):
            merged[group] = ours[group] | said
        elif group not in there:
            merged.pop(group)  # a family without it has no such key; a dense model of one with experts may say null
    model = overlaid("model", merged, tree, typed)
    size = ", ".join(f"{key}={model[key]}" for key in ("n_layers", "dim", "vocab_size") if key in model)
    told = [f"model=auto: {folder / 'config.json'}: {model['_target_'].rpartition('.')[2]} of {size}"]
    if unread:
        told.append(f"  keys of it that say nothing here: {', '.join(unread)}")
    to_stderr(told)
    found = tree | {"model": model}
    if "tokenizer" not in typed and tree["tokenizer"]["_target_"] == BYTES:
        # A folder without one that is read here is refused: embeddings of other tokens are not trained on bytes.
        to_stderr([f"tokenizer: of {folder}"])
        found["tokenizer"] = _tokenizer(folder)
    return found


def _tokenizer(folder: Path) -> Tree:
    """tokenizer=file, of these weights."""
    return {"_target_": TOKENIZER, "path": str(folder), "bos": None, "eos": None}


def load(task: Reads, run: "Run", network: "ModelStages", folder: Path, *, rounds: bool) -> Path:
    """Collective. Fill the network with the weights that the task names; `folder`: of this run. Returns where they lie.

    `rounds`: weights that a run saved in another dtype than the network's are rounded to it, as those in Hugging Face
    layout always are. The launcher has settled the step, and where a hub id lies on this machine.
    """
    import torch

    from src.checkpoint.store import Store
    from src.checkpoint.stored import shapes
    from src.train.resume import adopt

    if task.source.startswith(FOREIGN):
        path = noted(folder)
        assert path is not None, "the launcher notes it before a rank starts"
        adopt(network, path)
        return path
    path = find(Path(task.source), task.step)
    store = Store(folder / "checkpoints", run.checkpoint)
    if not getattr(task, "ema", False):
        store.load(path, {"model": network.tensors()}, rounds=rounds)
        return path
    weights = network.tensors()
    kept = {name: dtype for name, (_, dtype) in shapes(path).items() if name.startswith(AVERAGES)}
    averages = {
        name: torch.empty_like(each, dtype=getattr(torch, kept[AVERAGES + name])) for name, each in weights.items()
    }
    store.load(path, {"ema": {"decay": 0.0, "weights": averages}})
    with torch.no_grad():
        for name, each in averages.items():
            weights[name].copy_(each)
    return path
