"""AdamW written out: moments of any width, arithmetic in float32, no wait for the host."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# A number of elements that is known to be a multiple lets a compiled kernel read and write 16 bytes at a time.
ROW = 256


def update(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    factors: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step of one tensor, in place (Loshchilov and Hutter 2019, algorithm 2).

    `factors` (4): as `PlainAdamW._factors` makes them; `skip`: change nothing.
    """
    shrink, keep, rate, root = factors.unbind()
    wide_gradient = gradient.float() * shrink
    first = exp_avg.float().lerp(wide_gradient, 1.0 - beta1)
    second = exp_avg_sq.float() * beta2 + wide_gradient.square() * (1.0 - beta2)
    wide = weight.float() * keep - rate * first / (second.sqrt() * root + eps)
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
        self._compiled = torch.compile(update, fullgraph=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step_all(parameters, group)
        return loss

    def _step_all(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                initialise_state(self.state[parameter], parameter, self.moments)
        found_inf = torch.zeros((), device=parameters[0].device) if self.found_inf is None else self.found_inf
        torch._foreach_add_([self.state[parameter]["step"] for parameter in parameters], 1.0 - found_inf)
        skip = found_inf > 0
        for parameter, factors in zip(parameters, self._factors(parameters, group), strict=True):
            state, weight = self.state[parameter], local(parameter)
            if weight.numel() == 0:  # an uneven shard can leave a rank without rows
                continue
            tensors = (weight, local(parameter.grad), local(state["exp_avg"]), local(state["exp_avg_sq"]))
            apply: Callable[..., None] = self._compiled if weight.is_cuda else update
            apply(*map(rows, tensors), factors, skip, *group["betas"], group["eps"])

    def _factors(self, parameters: list[Tensor], group: dict[str, Any]) -> Tensor:
        """(parameters, 4) float32, of which each kernel reads a row, or its every element would take powers.

        What the gradient is multiplied by, the weight for its decay, the direction, and the root of the second moment.
        """
        steps = torch.stack([self.state[parameter]["step"] for parameter in parameters])
        lr, (beta1, beta2) = group["lr"], group["betas"]
        shrink = torch.ones_like(steps) if self.grad_scale is None else self.grad_scale.reciprocal().expand_as(steps)
        keep = torch.full_like(steps, 1.0 - lr * group["weight_decay"])
        return torch.stack((shrink, keep, lr / (1.0 - beta1**steps), (1.0 - beta2**steps).rsqrt()), dim=1)


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


def rows(tensor: Tensor) -> Tensor:
    """(any, ROW), or one axis, where memory allows it, so that one or two compiled kernels serve every shape."""
    if not tensor.is_contiguous():
        return tensor
    view = tensor.view(-1, ROW) if tensor.numel() % ROW == 0 else tensor.view(-1)
    torch._dynamo.maybe_mark_dynamic(view, 0)
    return view
