"""Sharded weight initialization from the meta device: the same numbers on every mesh, without communication.

Each parameter is drawn whole from a generator seeded by (seed, name) and cut locally, so a run starts from the same
weights on one rank or a thousand. A seed checkpoint is not needed.
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from src.models.decoder import Decoder

if TYPE_CHECKING:
    from src.models.parametrization.init import Initializer


def seed_of(seed: int, name: str) -> int:
    """63 bits that depend on both; stable over processes and versions."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1


@torch.no_grad()
def initialise(model: Decoder, seed: int, initializers: "Mapping[str, Initializer] | None" = None) -> None:
    """Fill every parameter of a model that is on its device already. The largest whole parameter exists for a
    moment. `initializers`: by name; None: as the model says.
    """
    initializers = model.initializers() if initializers is None else initializers
    for name, parameter in model.named_parameters():
        # Drawn where ranks compute, for a host's generator gives other numbers than a GPU's.
        device = torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device
        whole = torch.empty(parameter.shape, dtype=torch.float32, device=device)
        generator = torch.Generator(device).manual_seed(seed_of(seed, name))
        initializers[name].fill(whole, generator)
        if isinstance(parameter, DTensor):
            mine = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(mine.to_local())
        else:
            parameter.copy_(whole)


def materialise(model: Decoder, device: torch.device, *, offload: bool = False) -> None:
    """Give a model on the meta device real, unfilled storage, and its buffers their values.

    `offload`: parameters rest in the host's memory; buffers are always where ranks compute.
    """
    tied = [(module, name, parameter) for module in model.modules() for name, parameter in module._parameters.items()]
    model.to_empty(device=torch.device("cpu") if offload else device)
    first: dict[nn.Parameter | None, nn.Parameter | None] = {}
    for module, name, parameter in tied:  # of each shared parameter `to_empty` makes as many as there are places
        module._parameters[name] = first.setdefault(parameter, module._parameters[name])
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    model.reset_buffers()
