"""Global gradient norm over all meshes and gradient clipping, without waiting for the device."""

from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


class Gradients:
    """The gradients of `parameters` as local shards; `holders` ranks hold each parameter between them.

    A shard counts in the norm once, however many ranks hold a copy of it: the local sum of squares is divided by the
    number of copies, and the sum over the world is the squared norm for any mix of meshes, plain tensors included.
    """

    def __init__(self, parameters: list[nn.Parameter], holders: int) -> None:
        self.parameters = parameters
        shares = [_pieces(parameter) / holders for parameter in parameters]
        self.device = parameters[0].device  # the host, where parameters rest there
        self.shares = torch.tensor(shares, dtype=torch.float32, device=self.device)

    def local(self) -> list[Tensor]:
        """This rank's shards, without those that it has no rows of."""
        gradients = (parameter.grad for parameter in self.parameters)
        return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients if grad is not None]

    def squares(self) -> Tensor:
        """This rank's part of the squared norm; its sum over the world is the squared norm. fp32 scalar."""
        shards = self.local()
        assert len(shards) == len(self.parameters), "every parameter has a gradient"
        norms = torch.stack(torch._foreach_norm(shards, 2, dtype=torch.float32))
        return norms.square().mul(self.shares).sum()

    def excess(self, norm: Tensor, max_norm: float) -> Tensor:
        """Divisor of the gradients, at least 1, that brings their norm to at most `max_norm`."""
        return ((norm + 1e-6) / max_norm).clamp(min=1.0).to(self.device)


def _pieces(parameter: nn.Parameter) -> int:
    """Into how many different shards the ranks of the parameter's mesh cut it."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh, placements = parameter.device_mesh, parameter.placements
    return prod(mesh.size(axis) for axis, placement in enumerate(placements) if not isinstance(placement, Replicate))
