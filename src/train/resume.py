"""Resume: load the run's newest complete checkpoint, else the one it was given to start from, else begin at step 0."""

from pathlib import Path

from src.checkpoint.host_group import HostGroup
from src.checkpoint.store import Store
from src.data.batches import Batches
from src.distributed.model_stages import ModelStages
from src.errors import CheckpointError, DataError
from src.hugging_face.load import load
from src.train.state import TrainState, mark_of

# Entries of the state's tree that a checkpoint may be without.
OPTIONAL = ("outer", "ema", "spikes", "digest_mark")


def adopt(network: ModelStages, foreign: Path) -> str:
    """Collective. Fill the network from a folder in Hugging Face layout; what is wrong on one rank is raised on all."""
    line = HostGroup().on_all(lambda: load(foreign, network.tensors(), network.stages[0].config))
    return f"the weights of {foreign}: {line}"


def resume(state: TrainState, store: Store, batches: Batches, steps: int, foreign: Path | None = None) -> str:
    """Collective. Fill `state`; returns a line that says from where. `foreign`: weights where nothing was saved yet."""
    origin = store.origin()
    if origin is None:
        line = "starts at step 0" if foreign is None else f"starts at step 0 with {adopt(state.network, foreign)}"
        if state.average is not None:
            state.average.restart()
        return line
    another = origin.resolve().parent != store.folder.resolve()  # run's checkpoint
    if another and store.options.progress != "all":
        return begin_from(state, store, batches, origin)
    state.adopt(store.load(origin, state.tree(0.0), optional=OPTIONAL))
    if not state.at_new_samples:
        _check_samples(state, batches, origin)
    if state.step > steps or (state.step == steps and another):
        raise CheckpointError(
            f"{origin}: has done {state.step} steps, with its optimizer and its samples, and goes on from there: "
            f"task.steps={steps} leaves nothing to do; pass more steps"
        )
    return f"goes on after step {state.step}, sample {state.position}: {origin}"


def go_back(state: TrainState, store: Store, path: Path) -> None:
    """Collective. The state of this run's checkpoint again, in the middle of its life."""
    state.adopt(store.load(path, state.tree(0.0), optional=OPTIONAL))
    state.network.weights_written()


def begin_from(state: TrainState, store: Store, batches: Batches, origin: Path) -> str:
    """Collective. Fill weights and what fits of the optimizer's state; returns a line that says from where.

    Steps begin at 0, samples too, unless checkpoint.progress=samples, and an average of the weights as they are.
    """
    tree = state.tree(0.0)
    moments = {f"optimizer.{name}": tensors for name, tensors in tree["optimizer"].items()}
    values, kept = store.load_fitting(origin, {"model": tree["model"]}, moments)
    if state.average is not None:
        state.average.restart()
    if store.options.progress == "samples":
        state.tokens, state.position, state.digest = values["tokens"], values["position"], values["digest"]
        state.mark = mark_of(values)
        _check_samples(state, batches, origin)
        if state.spikes is not None:
            state.spikes.skip(values.get("spikes.skipped", ()))
    those = "its optimizer's state" if kept else "no optimizer state, which begins at 0"
    return f"starts at step 0, sample {state.position}, with the weights of {origin} and {those}"


def recounted(batches: Batches, position: int, mark: tuple[int, int], expected: str) -> str:
    """The digest of the samples before `position`, counted from `mark` on; from the start if that gives another one."""
    batches.recall(mark)
    digest = batches.digest(position)
    if digest != expected and mark != (0, 0):
        batches.recall((0, 0))
        digest = batches.digest(position)
    return digest


def _check_samples(state: TrainState, batches: Batches, origin: Path) -> None:
    """DataError where the samples that the state has used up are not those of this config."""
    digest = recounted(batches, state.position, state.mark, state.digest)
    if digest != state.digest:
        raise DataError(
            f"{origin}: its first {state.position} samples are not those of this config (digest {state.digest}, here "
            f"{digest}): data, tokenizer, seed and task.seq_len must be the checkpoint's"
        )
