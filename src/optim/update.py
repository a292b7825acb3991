"""AdamW written out: moments of any width, arithmetic in float32, no wait for the host."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def update(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    skip: Tensor,
    scale: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of one tensor, in place (Loshchilov and Hutter 2019, algorithm 2); `step` counts from 1.

    The gradient is divided by `scale` first.
    """
    wide_gradient = gradient.float() / scale
    first = exp_avg.float().lerp(wide_gradient, 1.0 - beta1)
    second = exp_avg_sq.float() * beta2 + wide_gradient.square() * (1.0 - beta2)
    first_bias, second_bias = 1.0 - beta1**step, 1.0 - beta2**step
    direction = first / first_bias / ((second / second_bias).sqrt() + eps)
    wide = weight.float() * (1.0 - lr * weight_decay) - lr * direction
    weight.copy_(torch.where(skip, weight, wide.to(weight.dtype)))
    exp_avg.copy_(torch.where(skip, exp_avg, first.to(exp_avg.dtype)))
    exp_avg_sq.copy_(torch.where(skip, exp_avg_sq, second.to(exp_avg_sq.dtype)))


class PlainAdamW(Optimizer):
    """State per parameter, named as torch names it: step (float32 scalar), exp_avg and exp_avg_sq (type `moments`)."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        moments: torch.dtype,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.moments = moments
        # By the names, and with the meaning, that torch's fused optimizers know them.
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        # One kernel for a tensor instead of about fifteen, for any shape; the CPU has nothing to gain from the wait.
        self._compiled = torch.compile(update, dynamic=True, fullgraph=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            initialise_state(state, parameter, self.moments)
        found_inf = self.found_inf if self.found_inf is not None else torch.zeros((), device=parameter.device)
        scale = self.grad_scale if self.grad_scale is not None else torch.ones((), device=parameter.device)
        state["step"].add_(1.0 - found_inf)
        weight, gradient = local(parameter), local(parameter.grad)
        if weight.numel() == 0:  # an uneven shard can leave a rank without rows
            return
        beta1, beta2 = group["betas"]
        apply = self._compiled if weight.is_cuda else update
        apply(
            flat(weight),
            flat(gradient),
            flat(local(state["exp_avg"])),
            flat(local(state["exp_avg_sq"])),
            state["step"],
            torch.full((), group["lr"], device=weight.device),
            found_inf > 0,
            scale,
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
        )


def initialise_state(state: dict[str, Any], parameter: Tensor, moments: torch.dtype) -> None:
    """Zeros of a parameter's own shape and sharding."""
    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    state["exp_avg"] = torch.zeros_like(parameter, dtype=moments)
    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=moments)


def local(tensor: Tensor | None) -> Tensor:
    """Our own part of a DTensor, sharing memory; any other tensor is its own part."""
    assert tensor is not None
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)  # DTensor itself belongs to higher floors
    return tensor if to_local is None else to_local()


def flat(tensor: Tensor) -> Tensor:
    """One axis where memory allows it, so that one compiled kernel serves every shape."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor
