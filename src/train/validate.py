"""Loss on held-out samples: the same ones each time, under any layout, without a trace in training."""

from collections.abc import Callable

import torch

from src.data.batches import Batches
from src.distributed.collectives import world_sum
from src.distributed.shard import inference
from src.models.cross_entropy import IGNORED
from src.train.setup import Training
from src.train.step import forward_loss


def validate(training: Training, batches: Batches, samples: int, stopped: Callable[[], bool]) -> float | None:
    """Collective. Nats per valid token over the first `samples` held-out samples; None when `stopped` came true.

    One division at the end: the mean of means would weigh short rows too much.
    """
    device = training.ranks.device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with inference(training.model):
        for batch in batches.validation(samples):
            if stopped():
                return None
            total[0] += forward_loss(training.model, batch, device) / training.mesh.loss_copies
            total[1] += (batch.labels != IGNORED).sum().to(device) / training.mesh.label_copies
    loss, tokens = world_sum(total).tolist()
    return float(loss / tokens)
