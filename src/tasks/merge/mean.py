"""A weighted mean of sets of weights, in float32, one set after another: as many bytes for a hundred as for two."""

import torch
from torch import Tensor

from src.distributed.model_stages import ModelStages
from src.optim.elementwise import local


class RunningMean:
    """After each set the mean of all so far; equal sets have themselves as mean, bit for bit."""

    def __init__(self, network: ModelStages) -> None:
        """`network`: whose tensors hold one set at a time."""
        self._network = network
        self._total = 0.0
        self._mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, weight: float) -> None:
        """Take in what the network holds, with a weight above 0."""
        self._total += weight
        for name, tensor in self._floats().items():
            now = local(tensor)
            if name in self._mean:
                # Toward the new one by its share of the weight so far.
                self._mean[name].lerp_(now.float(), weight / self._total)
            else:
                self._mean[name] = now.to(torch.float32, copy=True)

    @torch.no_grad()
    def put(self) -> None:
        """Collective. The network holds the mean, rounded to its dtype; what is no floating number stays the last
        one's.
        """
        for name, tensor in self._floats().items():
            local(tensor).copy_(self._mean[name])
        self._network.weights_written()

    def _floats(self) -> dict[str, Tensor]:
        return {name: each for name, each in self._network.tensors().items() if each.is_floating_point()}
