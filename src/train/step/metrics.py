"""The numbers that every step measures. Who wants another one adds it to `STEP_METRICS`, and nothing else.

All of them travel in one all-reduce, together with the votes to stop, and are read by the host a step late. They are
in metrics.jsonl and in every tracker under their names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from src.data.batches import Batch
from src.distributed.fsdp.gradient_norm import Gradients
from src.distributed.model_stages import ModelStages


@dataclass(frozen=True)
class AfterBackward:
    """What a metric may look at on this rank, between the backward pass and the update."""

    loss: Tensor  # 0-dim: this rank's share of the mean over all valid labels of the step, in nats
    tokens: Tensor  # 0-dim: those labels, of all ranks, at least 1
    gradients: Gradients  # summed over ranks, not clipped yet
    network: ModelStages
    batches: Sequence[Batch]  # this rank's micro-batches


@dataclass(frozen=True)
class StepMetric:
    """One number of a step.

    measure: a 0-dim tensor on the device, each step; it must not wait for the device.
    reduction: over all ranks; a sum counts a value as often as ranks hold it. (A maximum would be a second collective.)
    finish: from the reduced value to the one that is recorded.
    """

    name: str
    reduction: Literal["sum", "mean"]
    measure: Callable[[AfterBackward], Tensor]
    finish: Callable[[Tensor], Tensor] | None = None

    def of_sum(self, total: Tensor, ranks: int) -> Tensor:
        """What is recorded of the sum over `ranks` ranks."""
        value = total / ranks if self.reduction == "mean" else total
        return value if self.finish is None else self.finish(value)


STEP_METRICS: tuple[StepMetric, ...] = (
    # Ranks of a tensor or context axis all have the loss of their data rank, those of the other stages have 0.
    StepMetric("loss", "sum", lambda now: now.loss / now.network.mesh.loss_copies),
    StepMetric("grad_norm", "sum", lambda now: now.gradients.squares().to(now.network.device), torch.sqrt),
)


def _prediction_loss(now: AfterBackward) -> Tensor:
    lost = [part.mtp.nats for part in now.network.stages if part.mtp is not None]
    nats = lost[0] if lost else torch.zeros((), device=now.network.device)
    return nats / now.tokens / now.network.mesh.loss_copies


# Of multi-token prediction, if the model has it: the mean over its depths, unweighted, divided by the labels of `loss`.
PREDICTION_METRICS = (StepMetric("mtp_loss", "sum", _prediction_loss),)
