"""checkpoint.initial, looked at by the launcher: what ranks would refuse, in seconds and before a folder is made."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.checkpoint.fetched import fetch
from src.checkpoint.folder import VALUES, complete, fault, read_initial, read_marker, step_of
from src.checkpoint.remote import HOME, MIRROR
from src.checkpoint.stored import shapes
from src.config.stages import entries
from src.config.tree import Tree, read
from src.errors import CheckpointError, UserError, some
from src.optim.schedule import Schedule
from src.run import Validates
from src.storage.remote import RemoteFolder, is_url

if TYPE_CHECKING:
    from src.data.corpus import Corpus
    from src.run import Run

DIGEST_SAMPLES = 10**8  # so many are hashed in some seconds; of more the ranks say whether they are the same


def initial_of(run: "Run", folder: Path) -> Path | None:
    """The step folder that the run in `folder` still has to start from, if any; CheckpointError where it is none."""
    initial = run.checkpoint.initial
    if initial is None or run.checkpoint.foreign is not None or not isinstance(run.task, Validates):
        return None
    return None if complete(folder / "checkpoints") else read_initial(Path(initial).expanduser())


def check_initial(tree: Tree, run: "Run", folder: Path) -> None:
    """CheckpointError with all that its files, its metadata and its values say against starting from it. What a URL
    names is fetched first. RemoteError where a URL cannot be read.
    """
    if (mirror := run.checkpoint.mirror) is not None:
        if not isinstance(run.task, Validates):
            raise CheckpointError(f"{MIRROR}={mirror}: this task saves no checkpoints as it goes; leave it out")
        RemoteFolder(mirror, MIRROR)
    url = tree["checkpoint"]["initial"]
    if isinstance(url, str) and is_url(url) and isinstance(run.task, Validates) and not complete(folder / HOME):
        fetch(url, run.cache, "checkpoint.initial")
    path = initial_of(run, folder)
    if path is None:
        return
    marker = read_marker(path)
    faults = [fault(path / name, each, "size") for name, each in marker.files.items()]
    fits = _tensors if run.checkpoint.progress == "all" else _weights
    problems = [each for each in faults if each is not None] or [*_values(run, path), *fits(run, path)]
    if problems:
        raise CheckpointError(f"checkpoint.initial={each}" for each in problems)


def reach_mirror(run: "Run") -> None:
    """RemoteError unless checkpoint.mirror answers: a wrong word in it is told before anything starts."""
    if (mirror := run.checkpoint.mirror) is not None:
        RemoteFolder(mirror, MIRROR).reach()


def rewarming(run: "Run", folder: Path) -> str | None:
    """What to tell where the checkpoint's run had lowered its learning rate and this one raises it again, as a decay
    that is continued past its end does.
    """
    path = initial_of(run, folder)
    before = None if path is None else _former(path.parents[1] / "config.yaml")
    if path is None or before is None:
        return None
    schedule, peak, steps = before
    done = read_values(path)["step"]
    last = peak * schedule.multiplier(done - 1, steps)
    here = done if run.checkpoint.progress == "all" else 0
    following = run.optim.lr * run.schedule.multiplier(here, run.task.steps)
    if not schedule.rises_again(done, steps, last, following):
        return None
    earlier = [each for each in complete(path.parent) if not schedule.decayed((step_of(each) or 0) - 1, steps)]
    way_out = f"; {earlier[-1].name} beside it is from before the decay" if earlier else ""
    return (
        f"checkpoint.initial={path}: its run had lowered the learning rate to {last:.3g} by step {done}, and this one "
        f"goes on with {following:.3g}{way_out}"
    )


def _former(config: Path) -> tuple[Schedule, float, int] | None:
    """Schedule, peak learning rate and steps of the run whose folder this is; None where nothing readable says so."""
    try:
        tree = read(config)
        if entries(tree):  # its rate is that of a span of stages
            return None
        schedule = {key: value for key, value in tree["schedule"].items() if key != "_target_"}
        return Schedule.model_validate(schedule), float(tree["optim"]["lr"]), int(tree["task"]["steps"])
    except (UserError, ValueError, TypeError, LookupError, AttributeError):
        return None


def check_samples(run: "Run", folder: Path, corpus: "Corpus") -> None:
    """CheckpointError where the samples that the checkpoint has used up are not those of this run's data."""
    from src.data.batches import Batches

    path = initial_of(run, folder)
    if path is None or run.checkpoint.progress == "none":
        return
    values = read_values(path)
    if (position := values["position"]) > DIGEST_SAMPLES:
        return
    batches = Batches(
        corpus, run.data, seq_len=run.task.seq_len, seed=run.seed, rank=0, ranks=1, micro_batch=1, micro_batches=1
    )
    if batches.digest(position) != values["digest"]:
        raise CheckpointError(
            f"checkpoint.initial={path}: its first {position:,} samples are not those of this config: data, tokenizer, "
            "seed and task.seq_len must be the checkpoint's; checkpoint.progress=none begins this run's samples at 0"
        )


def read_values(path: Path) -> dict[str, Any]:
    """values.json of a step folder. CheckpointError where a run has not written it."""
    try:
        values: dict[str, Any] = json.loads((path / VALUES).read_text())
        assert {"step", "position", "digest", "rng.seed"} <= values.keys()
    except (OSError, ValueError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"checkpoint.initial={path}: {VALUES} is not what a run writes ({error})") from error
    return values


def _values(run: "Run", path: Path) -> list[str]:
    values, found = read_values(path), []
    if run.checkpoint.progress == "none":
        return []
    if run.checkpoint.progress == "all" and run.task.steps <= values["step"]:
        found.append(
            f"{path}: has done {values['step']} steps, with its optimizer and its samples, and goes on from there: "
            f"task.steps={run.task.steps} leaves nothing to do; pass more steps"
        )
    if run.seed != (seed := values["rng.seed"]):
        found.append(f"{path}: has drawn its samples by seed={seed}, not {run.seed}; pass seed={seed}")
    return found


def _tensors(run: "Run", path: Path) -> list[str]:
    """Weights and moments of another name, shape or dtype than the run's."""
    if run.checkpoint.trusted:
        return []  # torch reads it, on the ranks
    there = shapes(path)
    here = {f"model.{each.name}": (tuple(each.shape), run.precision.storage) for each in run.model.weights()}
    for each in run.model.weights():
        for name, kept in run.optim.state(each.name, each.shape).items():
            here[f"optimizer.{each.name}.{name}"] = (kept.shape, kept.dtype)
    if not any(name.startswith("optimizer.") for name in there):  # as task=merge writes
        return [f"{path}: has weights alone, and no optimizer to go on with; pass checkpoint.progress=none"]
    missing = here.keys() - there.keys()
    # Beside weights and moments there are each parameter's count of updates, and buffers, which the ranks look at.
    more = {each for each in there.keys() - here.keys() if each.startswith(("model.", "optimizer."))}
    more = {each for each in more if each.rpartition(".")[2] not in ("step", "expert_bias")}
    found = [f"{path}: {len(missing)} tensors missing in it: {some(missing)}"] if missing else []
    found += [f"{path}: {len(more)} tensors in it that this run has no place for: {some(more)}"] if more else []
    misfits = [name for name in here if name in there and here[name] != there[name]]
    found += [f"{path}: {name}: expected {_words(*here[name])}, found {_words(*there[name])}" for name in misfits[:6]]
    return [*found, f"{path}: {len(misfits) - 6} more do not fit"] if len(misfits) > 6 else found


def _weights(run: "Run", path: Path) -> list[str]:
    """Weights that are not there in the run's shapes; dtypes are converted."""
    there = {} if run.checkpoint.trusted else shapes(path)
    here = {f"model.{each.name}": tuple(each.shape) for each in run.model.weights()} if there else {}
    unlike = {name: shape for name, shape in here.items() if name not in there or there[name][0] != shape}
    found = [
        f"{path}: {name}: expected {list(shape)}, found {list(there[name][0]) if name in there else 'nothing'}"
        for name, shape in [*unlike.items()][:6]
    ]
    more = {each for each in there.keys() - here.keys() if each.startswith("model.") and not _is_buffer(each)}
    found += [f"{path}: {len(more)} weights in it that this run has no place for: {some(more)}"] if more else []
    return [*found, f"{path}: {len(unlike) - 6} more do not fit"] if len(unlike) > 6 else found


def _is_buffer(name: str) -> bool:
    """Whether a tensor that starts with "model." is none that the optimizer updates."""
    return name.rpartition(".")[2] == "expert_bias"


def _words(shape: tuple[int, ...], dtype: str) -> str:
    return f"{dtype} {list(shape)}"
