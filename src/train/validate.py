"""Validation loss on held-out samples: the same samples each time and under any layout; training state is untouched."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

import torch

from src.data.batches import Batch, Batches
from src.data.corpus import Corpus
from src.distributed.collectives import world_sum
from src.distributed.mesh import Mesh
from src.distributed.model_stages import ModelStages
from src.models.cross_entropy import IGNORED
from src.run import Run


def rows_for(run: Run, corpus: Corpus, mesh: Mesh, *, seq_len: int, micro_batch: int) -> Batches:
    """What this rank reads of the corpus in a task that takes no step; `micro_batch`: rows of a pass."""
    return Batches(
        corpus,
        run.data,
        seq_len=seq_len,
        seed=run.seed,
        rank=mesh.data_rank,
        ranks=mesh.data_ranks,
        micro_batch=micro_batch,
        micro_batches=1,
    )


def validate(network: ModelStages, batches: Batches, samples: int | None, stopped: Callable[[], bool]) -> float | None:
    """Collective. Nats per valid token over the first `samples` held-out samples, or all (None); None when `stopped`
    came true.

    One division at the end: the mean of means would weigh short rows too much.
    """
    found = summed_loss(network, batches.validation(samples), stopped)
    if found is None:
        return None
    nats, tokens = found
    return nats / tokens


def summed_loss(
    network: ModelStages, batches: Iterable[Batch], stopped: Callable[[], bool]
) -> tuple[float, float] | None:
    """Collective, with equally many batches on all data ranks: cross entropy in nats, and over how many tokens."""
    mesh, waiting = network.mesh, iter(batches)
    total = torch.zeros(2, dtype=torch.float64, device=network.device)
    with network.inference():
        while group := list(islice(waiting, network.width)):
            if stopped():
                return None
            total[0] += network.loss(group) / mesh.loss_copies
            total[1] += sum(int((batch.labels != IGNORED).sum()) for batch in group) / mesh.label_copies
    nats, tokens = world_sum(total).tolist()
    return nats, tokens


class Evaluator(Protocol):
    """Scores the weights between two steps."""

    def due(self, step: int, /) -> bool:
        """Whether the weights after this step are scored."""

    def aside(self) -> None:
        """Between two steps, whichever: start and hear of what runs beside training; not collective."""

    def __call__(self, step: int, stopped: Callable[[], bool], /) -> bool:
        """Collective. Score them, if that is due and not done yet; false where `stopped` came true, and nothing is told
        then.
        """


class StoppedError(Exception):
    """A signal asked for an end between two batches; on all ranks at the same one."""


def row_sums(
    network: ModelStages, batches: Iterable[Batch], stopped: Callable[[], bool]
) -> tuple[list[float], list[int]]:
    """Collective, with equally many batches on all data ranks: cross entropy in nats and how many tokens it is over, of
    each row; those of a batch follow each other, data rank by data rank. StoppedError when `stopped` came true.
    """
    mesh, waiting = network.mesh, iter(batches)
    found: list[torch.Tensor] = []
    with network.inference():
        while group := list(islice(waiting, network.width)):
            if stopped():
                raise StoppedError
            shape = (2, len(group), mesh.data_ranks, len(group[0].tokens))
            sums = torch.zeros(shape, dtype=torch.float64, device=network.device)
            sums[0, :, mesh.data_rank] = network.row_losses(group).double() / mesh.loss_copies
            counts = torch.stack([(batch.labels != IGNORED).sum(-1) for batch in group])
            sums[1, :, mesh.data_rank] = counts.to(network.device).double() / mesh.label_copies
            found.append(sums.flatten(1))
    nats, tokens = world_sum(torch.cat(found, dim=1)).tolist() if found else ([], [])
    return nats, [round(each) for each in tokens]
