"""Attention kernels for ring attention: they return the log-sum-exp of each query, and their backward takes it.

The operators below are those that torch's scaled dot product attention itself calls on CUDA; their signatures are the
same in torch 2.11 and 2.13.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

from src.models.attention.flash_attention import backward as flash_backward
from src.models.attention.flash_attention import forward as flash_forward
from src.models.attention.flash_attention import here, takes

aten = torch.ops.aten


class AttentionKernel(Protocol):
    """q (batch, heads, queries, width), k and v (batch, kv heads, keys, width); causal: as many queries as keys."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
        """The result (batch, heads, queries, v width) and its log sum exp (batch, heads, queries, 1), natural, fp32."""

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, where `out` and `lse` may be those of a softmax over more keys than these."""


def fastest(q: Tensor, k: Tensor, v: Tensor) -> type[AttentionKernel]:
    """flash-attn-4, cuDNN, then flash, where the GPU, its packages and the shapes allow (half precision); else plain
    matrices, on the CPU too.
    """
    if not q.is_cuda:
        return PlainKernel
    if here() and takes(q, k, v):
        return FlashAttention4
    how = (None, 0.0, True, q.shape[1] != k.shape[1])  # mask, dropout, causal, grouped
    if can_use_cudnn_attention(SDPAParams(q, k, v, *how)):
        return Cudnn
    # The width of v is made that of k.
    return Flash if can_use_flash_attention(SDPAParams(q, k, k, *how)) else PlainKernel


class FlashAttention4:
    """702 / 580 TFLOP/s forward / backward on an H200 at 8192 tokens: src/models/attention/flash_attention.py."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
        out, lse = flash_forward(q, k, v, scale, causal)
        return out, lse.unsqueeze(-1)

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor, Tensor] = flash_backward(grad, q, k, v, out, lse.squeeze(-1), scale, causal)
        return gradients


class Cudnn:
    """555 / 484 TFLOP/s forward / backward on an H100 at 8192 tokens."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, compute_log_sumexp=True, is_causal=causal, scale=scale
        )
        return out, lse.view(*q.shape[:3], 1)

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        no_seed = torch.zeros((), dtype=torch.int64, device=q.device)  # read only with dropout
        sizes = (q.shape[2], k.shape[2])
        gradients: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, no_seed, no_seed, None, None, None, *sizes, 0.0, causal, scale=scale
        )
        return gradients


class Flash:
    """299 / 258 TFLOP/s there; wants values as wide as keys."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, _widened(v, k), is_causal=causal, scale=scale)
        return out[..., : v.shape[-1]], lse.unsqueeze(-1)

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        no_seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # read only with dropout
        grad, wide, out = (_widened(x, k) for x in (grad, v, out))
        sizes = (q.shape[2], k.shape[2])
        grad_q, grad_k, grad_v = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, wide, out, lse.squeeze(-1), None, None, *sizes, 0.0, causal, no_seed, no_seed, scale=scale
        )
        return grad_q, grad_k, grad_v[..., : v.shape[-1]]


def _widened(x: Tensor, like: Tensor) -> Tensor:
    """Zeros behind the last elements, until rows are as wide as those of `like`."""
    missing = like.shape[-1] - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


class PlainKernel:
    """The definition, with all scores in memory, in fp32 or better."""

    @staticmethod
    def _scores(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor, Tensor, float]:
        """(batch, kv heads, heads of each, queries, keys), with q and k in that shape, and the scale."""
        precise = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(precise).unflatten(1, (k.shape[1], -1)), k.to(precise).unsqueeze(2)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        scores = q @ k.mT * factor
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return scores, q, k, factor

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
        scores, *_ = PlainKernel._scores(q, k, causal, scale)
        lse = scores.logsumexp(-1, keepdim=True)
        out = (scores - lse).exp() @ v.to(lse.dtype).unsqueeze(2)
        return out.flatten(1, 2), lse.flatten(1, 2)

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores, q, k, factor = PlainKernel._scores(q, k, causal, scale)
        grad, out, lse = (x.to(scores.dtype).unflatten(1, (k.shape[1], -1)) for x in (grad, out, lse))
        probability = (scores - lse).exp()
        grad_probability = grad @ v.to(scores.dtype).unsqueeze(2).mT
        grad_scores = probability * (grad_probability - (grad * out).sum(-1, keepdim=True)) * factor
        grad_q = (grad_scores @ k).flatten(1, 2)
        return grad_q, (grad_scores.mT @ q).sum(2), (probability.mT @ grad).sum(2)
