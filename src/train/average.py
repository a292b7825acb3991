"""Exponential moving average of the weights (EMA): sharded as they are, in checkpoints, and lent to validations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from src.distributed.model_stages import ModelStages
from src.optim.base import skipped_update
from src.optim.elementwise import local


class WeightAverage:
    """average = decay * average + (1 - decay) * weights after each update; it begins as the weights are."""

    def __init__(
        self,
        network: ModelStages,
        optimizer: Optimizer,
        decay: float,
        dtype: torch.dtype,
        *,
        offload: bool = False,
    ) -> None:
        """`offload`: it rests in the host's memory."""
        self._network, self._optimizer, self._decay = network, optimizer, decay
        self._weights = {name: each for name, each in network.tensors().items() if each.is_floating_point()}
        # By name, shaped and sharded as the weights.
        self.tensors = {
            name: each.detach().to("cpu" if offload else each.device, dtype, copy=True)
            for name, each in self._weights.items()
        }

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew, as the weights are."""
        for name, weight in self._weights.items():
            local(self.tensors[name]).copy_(local(weight))

    @torch.no_grad()
    def update(self) -> None:
        """After each step; one that was skipped changes nothing. The host waits for the device only with `offload`."""
        skipped = skipped_update(self._optimizer)
        for name, weight in self._weights.items():
            average = local(self.tensors[name])
            now = local(weight).to(average.device).float()
            moved = average.float().lerp(now, 1.0 - self._decay).to(average.dtype)
            average.copy_(moved if skipped is None else torch.where(skipped.to(average.device) > 0, average, moved))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Collective. The network computes with the average; afterwards with its weights again, bit for bit.

        Meanwhile the weights are held where the average rests.
        """
        before = {
            name: local(weight).detach().to(local(self.tensors[name]).device, copy=True)
            for name, weight in self._weights.items()
        }
        self._put({name: local(average) for name, average in self.tensors.items()})
        try:
            yield
        finally:
            self._put(before)

    def tree(self) -> dict[str, Any]:
        """What a checkpoint holds; the tensors are the live ones."""
        return {"decay": self._decay, "weights": dict(self.tensors)}

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            local(weight).copy_(values[name])
        self._network.weights_written()
