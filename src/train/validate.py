"""Validation loss on held-out samples: the same samples each time and under any layout; training state is untouched."""

from collections.abc import Callable, Iterable
from itertools import islice

import torch

from src.data.batches import Batch, Batches
from src.distributed.collectives import world_sum
from src.distributed.model_stages import ModelStages
from src.models.cross_entropy import IGNORED


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
