"""Top-k router (gate) of a mixture of experts: experts and weights of a token (arXiv 2412.19437, section 2.1.2)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src.models.moe.config import MixtureOfExperts


class Routing(NamedTuple):
    """The router's choice for a batch of tokens."""

    weights: Tensor  # (tokens, top_k) fp32
    experts: Tensor  # (tokens, top_k) int64, different within a row
    counts: Tensor  # (num_experts) int64: rows that each expert gets; they add up to tokens * top_k
    even: bool = False  # the counts are known to be equal before the device has counted


class Router(nn.Module):
    """Scores, bias and top-k choice in fp32: bf16 logits would tie or swap experts that are close."""

    def __init__(self, dim: int, config: MixtureOfExperts) -> None:
        super().__init__()
        self.config = config
        self.gate = Gate(dim, config.num_experts)
        self.z_loss: Tensor | None = None  # 0-dim, of a training step that has it: see `with_z_loss`

    def forward(self, x: Tensor, bias: Tensor) -> Routing:
        """x (tokens, dim); `bias` (num_experts) fp32 moves the choice, never the weights or a gradient."""
        logits = self.gate(x)
        if self.training and self.z_loss is not None:
            logits = with_z_loss(logits, self.z_loss)
        scores = logits.softmax(-1) if self.config.score_func == "softmax" else logits.sigmoid()
        experts = self._in_turn(scores) if self.config.force_load_balance else self._best(scores.detach() + bias)
        weights = scores.gather(-1, experts)
        if self.config.route_norm:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        # A sum of a map of flags: whole numbers, the same at every run, and no wait for the device as in bincount.
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, experts, value=True)
        even = self.config.force_load_balance and experts.numel() % self.config.num_experts == 0
        return Routing(weights * self.config.route_scale, experts, chosen.sum(0), even)

    def _best(self, scores: Tensor) -> Tensor:
        """Top-k experts of each row, limited to its best expert groups (group-limited routing)."""
        config = self.config
        if config.num_limited_groups < config.num_expert_groups:
            grouped = scores.unflatten(-1, (config.num_expert_groups, -1))
            best = grouped.amax(-1) if config.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
            kept = best.topk(config.num_limited_groups, dim=-1, sorted=False).indices
            out = torch.ones_like(best, dtype=torch.bool).scatter(-1, kept, value=False)
            scores = grouped.masked_fill(out.unsqueeze(-1), float("-inf")).flatten(-2)
        return scores.topk(config.top_k, dim=-1, sorted=False).indices

    def _in_turn(self, scores: Tensor) -> Tensor:
        """Expert p mod num_experts at place p of the flat (tokens, top_k): equal loads, for benchmarks."""
        places = torch.arange(len(scores) * self.config.top_k, device=scores.device)
        return (places % self.config.num_experts).view(len(scores), -1)


def with_z_loss(logits: Tensor, weight: Tensor) -> Tensor:
    """(tokens, num_experts) as they are; `weight` * the squares of their log sum exps is added to the loss by its
    gradient alone (ST-MoE, arXiv 2202.08906, equation 5).
    """
    apply: Callable[..., Tensor] = _ZLoss.apply
    return apply(logits, weight)


class _ZLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(logits, weight)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, weight = ctx.saved_tensors
        normalizer = logits.logsumexp(-1, keepdim=True)
        return grads[0] + 2.0 * weight * normalizer * (logits - normalizer).exp(), None


class Gate(nn.Linear):
    """x (tokens, dim) -> logits (tokens, num_experts) fp32."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        project: Callable[..., Tensor] = _PreciseLinear.apply
        return project(x, self.weight)


@torch.library.custom_op("router::product", mutates_args=())
def precise_product(a: Tensor, b: Tensor) -> Tensor:
    """a (n, k) @ b (k, m), both of one dtype, summed and returned in fp32.

    The product of two bf16 numbers is exact in fp32, so the fast kernels lose nothing; casting both up would take
    three times the memory traffic and the slow ones. An operator of its own, so that a compiler keeps a and b as they
    came.
    """
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@precise_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


class _PreciseLinear(torch.autograd.Function):
    """x w^T in fp32, keeping x and w as they came, and gradients as exact as their dtypes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        logits: Tensor = precise_product(x, weight.T)
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        if x.dtype != torch.bfloat16:
            return grads[0] @ weight, grads[0].T @ x
        # Two bf16 numbers add up to 16 bits of a gradient: their products are as cheap as one of half the precision.
        high = grads[0].bfloat16()
        parts = torch.cat((high, (grads[0] - high).bfloat16()), dim=-1)  # (tokens, 2 * num_experts)
        grad_x = parts @ torch.cat((weight, weight))
        grad_weight = precise_product(parts.T, x).unflatten(0, (2, -1)).sum(0)
        return grad_x, grad_weight.to(weight.dtype)
