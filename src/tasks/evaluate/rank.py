"""What each rank of task=evaluate does: build the layout, fill it, read every source's sequences."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, log
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from src.config.tree import read
from src.data.corpus import Corpus, read_recipe, reopen
from src.distributed.collectives import any_rank
from src.distributed.mesh import Mesh
from src.distributed.model_stages import ModelStages
from src.hugging_face.origin import origin_of
from src.run import Run
from src.storage.atomic_write import atomic_write
from src.tasks.evaluate.config import Evaluate
from src.tasks.evaluate.live import LiveEvaluation, lines, numbers
from src.tasks.evaluate.side_job import EVALUATION_FILE
from src.tasks.source import load
from src.train.setup import build_uninitialized, join_ranks
from src.train.stop import Stop
from src.train.validate import StoppedError, rows_for, summed_loss


@dataclass(frozen=True)
class Score:
    """Loss of one source, or of all together."""

    tokens: int  # that were predicted
    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float | None  # of UTF-8; from the bytes per token of the whole split

    @classmethod
    def of(cls, nats: float, tokens: float, text_bytes: float) -> "Score":
        loss = nats / tokens
        return cls(int(tokens), loss, _exp(loss), nats / log(2) / text_bytes if text_bytes else None)


def evaluate(task: Evaluate, run: Run, folder: Path) -> bool:
    """Compute and write the scores. Collective. False when a signal came before the last source was read; then
    nothing is written.
    """
    with Stop() as stop:
        ranks = join_ranks(run, folder)
        run = task.computed(run)
        network = build_uninitialized(run, ranks, Mesh(run.parallel, ranks.device.type))
        origin = load(task, run, network, folder, rounds=True)
        corpus = reopen(read_recipe(folder), run.cache)
        scores = _scores(task, run, network, corpus, stop)
        asked = None if scores is None else _asked(task, run, network, corpus, folder, stop)
        if scores is not None and asked is not None and ranks.rank == 0:
            facts = _facts(task, run, origin) | {"data": read(folder / "config.yaml")["data"]}
            values = {name: asdict(score) for name, score in scores.items()}
            told = facts | {"scores": values} | ({"tasks": asked[0]} if run.evaluate.tasks else {})
            atomic_write(folder / EVALUATION_FILE, json.dumps(told, indent=2) + "\n")
            _tell(f"{origin}, split {task.split}", scores, folder, asked[1])
        ranks.leave()
        return asked is not None


def _asked(
    task: Evaluate, run: Run, network: ModelStages, corpus: Corpus, folder: Path, stop: Stop
) -> tuple[dict[str, float], list[str]] | None:
    """Collective. Numbers and lines of the tasks of `evaluate`; None where a signal came."""
    if not run.evaluate.tasks:
        return {}, []
    rows, length = task.micro_batch, task.seq_len
    batches = rows_for(run, corpus, network.mesh, seq_len=length, micro_batch=rows)
    live = LiveEvaluation(run.evaluate, network, batches, corpus, rows, length, origin_of(folder))
    try:
        found, seconds = live.scores(lambda: any_rank(stop.seen is not None, network.device))
    except StoppedError:
        return None
    return numbers(found) | {f"evaluate/{name}/seconds": each for name, each in seconds.items()}, lines(found)


def _scores(task: Evaluate, run: Run, network: ModelStages, corpus: Corpus, stop: Stop) -> dict[str, Score] | None:
    """Collective. By source, then "all" where there are several."""
    batches = rows_for(run, corpus, network.mesh, seq_len=task.seq_len, micro_batch=task.micro_batch)
    sums: dict[str, tuple[float, float, float]] = {}
    for number, part in enumerate(corpus.parts):
        rows = batches.fixed(task.split, task.samples, source=number)
        found = summed_loss(network, rows, lambda: any_rank(stop.seen is not None, network.device))
        if found is None:
            return None
        bytes_per_token = part.shards.text_bytes(task.split) / max(part.shards.tokens(task.split), 1)
        if found[1]:  # so few samples may have left a source out
            sums[part.name] = (*found, found[1] * bytes_per_token)
    if len(sums) > 1:
        nats, tokens, text_bytes = (sum(column) for column in zip(*sums.values(), strict=True))
        sums["all"] = (nats, tokens, text_bytes)
    return {name: Score.of(*each) for name, each in sums.items()}


def _exp(loss: float) -> float:
    """Infinite where a float ends."""
    try:
        return exp(loss)
    except OverflowError:
        return float("inf")


def _facts(task: Evaluate, run: Run, origin: Path) -> dict[str, Any]:
    return {
        "weights": str(origin),
        "split": task.split,
        "samples": task.samples,
        "seq_len": task.seq_len,
        "arithmetic": run.precision.arithmetic,
        "layout": {axis: degree for axis, degree in run.parallel.axes.items() if degree > 1},
    }


def _tell(title: str, scores: dict[str, Score], folder: Path, asked: Sequence[str]) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("source", "tokens", "loss", "perplexity", "bits per byte"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for name, score in scores.items():
        bits = "" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
        table.add_row(name, f"{score.tokens:,}", f"{score.loss:.4f}", f"{score.perplexity:,.3f}", bits)
    Console(soft_wrap=True, markup=False, emoji=False).print(table, *asked, f"{folder / EVALUATION_FILE}", sep="\n")
