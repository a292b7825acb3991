"""The optimizer's state as the checkpoint sees it: by parameter name, without groups or meshes."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def materialise(optimizer: Optimizer, state: Mapping[str, torch.dtype]) -> None:
    """Zeros of each parameter's own shape and sharding, so that a checkpoint loads in place before the first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            mine = optimizer.state[parameter]
            mine["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name, dtype in state.items():
                mine[name] = torch.zeros_like(parameter, dtype=dtype)


def optimizer_state(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, dict[str, Tensor]]:
    """{parameter name: {step, and the names of the config's `state`}}, live: loading into them loads the optimizer."""
    return {name: dict(optimizer.state[parameter]) for name, parameter in named_parameters if parameter.requires_grad}


def scale_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Each group's peak learning rate times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
