"""Where a run goes on: its own newest checkpoint, else the one it was told to start from, else step 0."""

from src.checkpoint.store import Store
from src.data.batches import Batches
from src.errors import CheckpointError, DataError
from src.train.state import TrainState


def resume(state: TrainState, store: Store, batches: Batches, steps: int) -> str:
    """Collective. Fill `state`; returns a line that says from where."""
    origin = store.origin()
    if origin is None:
        return "starts at step 0"
    state.adopt(store.load(origin, state.tree(0.0)))
    digest = batches.digest(state.position)
    if digest != state.digest:
        raise DataError(
            f"{origin}: its first {state.position} samples are not those of this config (digest {state.digest}, here "
            f"{digest}): data, tokenizer, seed and task.seq_len must be the checkpoint's"
        )
    if state.step > steps or (state.step == steps and origin.resolve().parent != store.folder.resolve()):
        raise CheckpointError(
            f"{origin}: has done {state.step} steps, with its optimizer and its samples, and goes on from there: "
            f"task.steps={steps} leaves nothing to do; pass more steps"
        )
    return f"goes on after step {state.step}, sample {state.position}: {origin}"
