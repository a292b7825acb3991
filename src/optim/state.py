"""The optimizer's state as the checkpoint sees it: by parameter name, without groups or meshes."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from src.optim.update import initialise_state


def materialise(optimizer: Optimizer) -> None:
    """Put zero state where there is none, so that a checkpoint can be loaded in place before the first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                moments = getattr(optimizer, "moments", parameter.dtype)
                initialise_state(optimizer.state[parameter], parameter, moments)


def optimizer_state(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, dict[str, Tensor]]:
    """{parameter name: {step, exp_avg, exp_avg_sq}}: the live tensors: loading into them loads the optimizer."""
    return {
        name: {key: optimizer.state[parameter][key] for key in ("step", "exp_avg", "exp_avg_sq")}
        for name, parameter in named_parameters
        if parameter.requires_grad
    }


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
