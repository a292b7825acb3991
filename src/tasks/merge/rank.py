"""What each rank of task=merge does: read one set of weights after the other, validate it, take it into the mean."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from src.checkpoint.config import FOREIGN
from src.checkpoint.folder import VALUES, step_folder
from src.checkpoint.store import Store
from src.data.batches import Batches
from src.data.corpus import read_recipe, reopen
from src.distributed.collectives import any_rank
from src.distributed.mesh import Mesh
from src.distributed.model_stages import ModelStages
from src.distributed.process.rank_context import RankContext
from src.run import Run
from src.storage.atomic_write import atomic_write
from src.tasks.merge.config import Merge
from src.tasks.merge.mean import RunningMean
from src.tasks.merge.part import MergePart
from src.train.resume import adopt
from src.train.setup import build_uninitialized, join_ranks
from src.train.stop import Stop
from src.train.validate import rows_for, validate

MERGE_FILE = "merge.json"


def merge(task: Merge, run: Run, folder: Path) -> bool:
    """Write the mean as a checkpoint, and the losses. Collective. False when a signal came before; then nothing is
    written.
    """
    with Stop() as stop:
        ranks = join_ranks(run, folder)
        network = build_uninitialized(run, ranks, Mesh(run.parallel, ranks.device.type))
        store, batches = Store(folder / "checkpoints", run.checkpoint), _batches(task, run, network, folder)
        mean, losses, tokens = RunningMean(network), list[float | None](), 0

        def stopped() -> bool:
            return any_rank(stop.seen is not None, network.device)

        for part in task.parts():
            tokens = max(tokens, _read(part, network, store))
            network.weights_written()
            losses.append(_loss(task, network, batches, stopped))
            mean.add(part.weight)
            if stopped():
                return _left(ranks, done=False)
        mean.put()
        losses.append(_loss(task, network, batches, stopped))
        if stopped():
            return _left(ranks, done=False)
        step = max(part.step or 1 for part in task.parts())
        facts = _facts(task, run, losses)
        store.save(step, _state(run, network, batches, step, tokens), facts, wait=True)
        if ranks.rank == 0:
            content = {"step": step, "samples": task.samples, "seq_len": task.seq_len} | facts
            atomic_write(folder / MERGE_FILE, json.dumps(content, indent=2) + "\n")
            _tell(task, losses, step_folder(folder / "checkpoints", step))
        return _left(ranks, done=True)


def _left(ranks: RankContext, *, done: bool) -> bool:
    ranks.leave()
    return done


def _facts(task: Merge, run: Run, losses: list[float | None]) -> dict[str, Any]:
    """Of what the mean was made; `losses`: of each part, then of the mean, which a checkpoint has under this name."""
    told = [asdict(part) | {"validation_loss": loss} for part, loss in zip(task.parts(), losses[:-1], strict=True)]
    layout = {axis: degree for axis, degree in run.parallel.axes.items() if degree > 1}
    return {"layout": layout, "merged": told, "validation_loss": losses[-1]}


def _batches(task: Merge, run: Run, network: ModelStages, folder: Path) -> Batches | None:
    """None: nothing is validated."""
    if not task.needs_corpus:
        return None
    corpus = reopen(read_recipe(folder), run.cache)
    return rows_for(run, corpus, network.mesh, seq_len=task.seq_len, micro_batch=task.micro_batch)


def _read(part: MergePart, network: ModelStages, store: Store) -> int:
    """Collective. Fill the network; returns the tokens that these weights were trained on, as far as they say."""
    if part.source.startswith(FOREIGN):
        adopt(network, Path(part.source.removeprefix(FOREIGN)).expanduser())
        return 0
    assert part.step is not None, "the launcher settles it"
    path = step_folder(Path(part.source) / "checkpoints", part.step)
    store.load(path, {"model": network.tensors()}, rounds=True)
    values: dict[str, Any] = store.shared(lambda: json.loads((path / VALUES).read_text()))
    return int(values.get("tokens", 0))


def _loss(task: Merge, network: ModelStages, batches: Batches | None, stopped: Callable[[], bool]) -> float | None:
    """Collective. Of what the network holds; None where nobody asks, or a signal came."""
    if batches is None:
        return None
    return validate(network, batches, task.samples, stopped)


def _state(run: Run, network: ModelStages, batches: Batches | None, step: int, tokens: int) -> dict[str, Any]:
    """As src/train/state.py has it, without an optimizer: no sample of this run is used up."""
    return {
        "model": network.tensors(),
        "step": step,
        "tokens": tokens,
        "position": 0,
        "digest": "" if batches is None else batches.digest(0),
        "rng": {"seed": run.seed, "torch": torch.get_rng_state()},
    }


def _tell(task: Merge, losses: list[float | None], path: Path) -> None:
    table = Table(title="weights", title_justify="left")
    table.add_column("of")
    table.add_column("share", justify="right")
    table.add_column("validation loss", justify="right")
    for part, loss in zip(task.parts(), losses[:-1], strict=True):
        table.add_row(part.name, f"{part.weight:.4f}", _shown(loss))
    table.add_row("their mean", "", _shown(losses[-1]))
    Console(soft_wrap=True, markup=False, emoji=False).print(table, f"{path}")


def _shown(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
