"""The optimizer's state as the checkpoint sees it: by parameter name, without groups or meshes."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from src.optim.base import StateTensor
from src.optim.owners import Owners


def materialise(
    optimizer: Optimizer, state: Mapping[nn.Parameter, Mapping[str, StateTensor]], owners: Owners | None = None
) -> None:
    """Zeros with each parameter's own sharding, so that a checkpoint loads in place before the first step."""
    for parameter, kept in state.items():
        mine = optimizer.state[parameter]
        mine["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for name, each in kept.items():
            mine[name] = _zeros(parameter, each, owners)


def _zeros(parameter: nn.Parameter, kept: StateTensor, owners: Owners | None) -> Tensor:
    dtype: torch.dtype = getattr(torch, kept.dtype)
    if kept.shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=dtype)
    if owners is not None:
        return owners.zeros_of_rows(parameter, dtype)
    return torch.zeros(kept.shape, dtype=dtype, device=parameter.device)


def optimizer_state(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, dict[str, Tensor]]:
    """{parameter name: {step, and the names of its `state`}}, live: loading into them loads the optimizer."""
    return {name: dict(optimizer.state[parameter]) for name, parameter in named_parameters if parameter.requires_grad}


def scale_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Each group's peak learning rate times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
