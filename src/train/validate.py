"""Loss on held-out samples: the same ones each time, under any layout, without a trace in training."""

from collections.abc import Callable
from itertools import islice

import torch

from src.data.batches import Batches
from src.distributed.collectives import world_sum
from src.models.cross_entropy import IGNORED
from src.train.setup import Training


def validate(training: Training, batches: Batches, samples: int, stopped: Callable[[], bool]) -> float | None:
    """Collective. Nats per valid token over the first `samples` held-out samples; None when `stopped` came true.

    One division at the end: the mean of means would weigh short rows too much.
    """
    network, mesh = training.network, training.mesh
    total = torch.zeros(2, dtype=torch.float64, device=network.device)
    held_out = iter(batches.validation(samples))
    with network.inference():
        while group := list(islice(held_out, network.width)):
            if stopped():
                return None
            total[0] += network.loss(group) / mesh.loss_copies
            total[1] += sum(int((batch.labels != IGNORED).sum()) for batch in group) / mesh.label_copies
    loss, tokens = world_sum(total).tolist()
    return float(loss / tokens)
